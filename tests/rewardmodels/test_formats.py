"""Folders of open_clip's and timm's become models of transformers that compute the same."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mmalign.lab.clip import CLIP, CLIPSize, Tower, vocabulary_of
from mmalign.lab.pretrain_clip import lab_words, write_tokenizer
from mmalign.lab.vit import ViT, ViTSize, normalized
from mmalign.rewardmodels import load
from mmalign.rewardmodels.features import Tower as Features
from mmalign.rewardmodels.formats import read_open_clip, read_timm

TEXTS = ["two red circles", 'the word "cat" in blue', "a blue star above a red ring, outlined"]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[str, CLIP]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = CLIPSize(32, 8, Tower(16, 2, 2), Tower(12, 2, 3), 24, 8)
        model = CLIP(size, vocabulary_of(lab_words())).half().float().eval()
    folder = tmp_path_factory.mktemp("clip")
    model.save(folder)
    write_tokenizer(list(model.words), size.context, folder)
    return str(folder), model


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> tuple[str, ViT]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViT(ViTSize(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)).half().float()
    folder = tmp_path_factory.mktemp("vit")
    model.save(folder)
    return str(folder), model.eval()


@torch.no_grad()
def test_clip_score_of_an_open_clip_folder_is_its_formula(clip, outcome_of):
    folder, model = clip
    cosine = (model.encode_images(IMAGES) * model.encode_texts(TEXTS)).sum(1)
    found = load("clip_score", model=folder, weight=2.5)(outcome_of(IMAGES, TEXTS)).values[:, 0]
    assert_close(found, 2.5 * cosine.clamp(min=0), atol=2e-5, rtol=1e-4)
    assert cosine.std() > 1e-3  # they differ, so that an exchanged pair would show


@torch.no_grad()
def test_a_text_of_open_clip_is_embedded_up_to_its_end(clip):
    folder, model = clip
    ids = model.ids(TEXTS)
    found = read_open_clip(folder)[0].get_text_features(input_ids=ids)
    found = found if isinstance(found, torch.Tensor) else found.pooler_output
    assert_close(torch.nn.functional.normalize(found, dim=1), model.encode_ids(ids), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_features_of_a_timm_folder_are_its_tokens(vit):
    folder, model = vit
    whole, places = model(normalized(IMAGES))
    found = Features(folder).tokens(IMAGES)
    assert_close(found, torch.cat([whole[:, None], places], 1), atol=2e-5, rtol=1e-4)
    assert_close(Features(folder)(IMAGES), whole, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_features_of_an_open_clip_folder_are_its_class_token(clip):
    folder, model = clip
    assert_close(Features(folder)(IMAGES), model.features(IMAGES)[0], atol=2e-5, rtol=1e-4)


def test_what_has_no_counterpart_is_named(vit, clip, tmp_path: Path):
    config = json.loads((Path(vit[0]) / "config.json").read_text())
    config["model_args"]["reg_tokens"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="reg_tokens cannot be read"):
        read_timm(str(tmp_path))
    config = json.loads((Path(clip[0]) / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "convnext"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="timm_model_name cannot be read"):
        read_open_clip(str(tmp_path))
    del config["model_cfg"]["vision_cfg"]["timm_model_name"]
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "xlm-roberta-base"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hf_model_name cannot be read"):
        read_open_clip(str(tmp_path))
