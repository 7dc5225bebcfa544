"""Features of pictures: those of the plain library, on tiny random networks of the real classes."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmalign.rewardmodels.features import load_features

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A tiny DINOv2 and a tiny CLIP, saved as transformers saves them."""
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dino = Dinov2Model(Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **small))
        vision = {**small, "image_size": 32, "patch_size": 8}
        clip = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 99}, vision_config=vision))
    folders = {}
    for name, model in (("dino", dino), ("clip", clip)):
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        (folders[name] / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": MEAN, "image_std": STD})
        )
    return folders, {"dino": dino.eval(), "clip": clip.eval().vision_model}


@pytest.mark.parametrize("name", ["dino", "clip"])
def test_features_are_those_of_the_library(towers, name):
    folders, models = towers
    side = {"dino": 28, "clip": 32}[name]
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    found = load_features(str(folders[name]))(images)
    pixels = (images.numpy() - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    with torch.no_grad():
        expected = models[name](pixel_values=torch.from_numpy(pixels).float()).pooler_output
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_pictures_of_any_size_are_seen(towers):
    extract = load_features(str(towers[0]["dino"]))
    assert extract(torch.rand(2, 3, 50, 40)).shape == (2, 16)


def test_a_network_asks_for_no_gradient(towers):
    assert not load_features(str(towers[0]["clip"]))(torch.rand(1, 3, 8, 8)).requires_grad


def test_features_of_a_real_network():
    pytest.importorskip("efficientnet_lite_pytorch")
    extract = load_features("efficientnet")
    found = extract(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert found.shape == (2, 1280)
    assert found.isfinite().all()


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no features 'inception'; pixels, efficientnet"):
        load_features("inception")
