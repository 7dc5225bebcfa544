"""Features of pictures: those of the plain library, on tiny random networks of the real classes."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmalign.rewardmodels.artifact_training import fresh_tower
from mmalign.rewardmodels.features import load_features

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A tiny DINOv2, DINOv3 and CLIP, saved as transformers saves them."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        DINOv3ViTConfig,
        DINOv3ViTModel,
    )

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dino = Dinov2Model(Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **small))
        registers = {"image_size": 32, "patch_size": 8, "num_register_tokens": 4}
        dinov3 = DINOv3ViTModel(DINOv3ViTConfig(**registers, **small))
        vision = {**small, "image_size": 32, "patch_size": 8}
        clip = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 99}, vision_config=vision))
    folders = {}
    for name, model in (("dino", dino), ("dinov3", dinov3), ("clip", clip)):
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        (folders[name] / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": MEAN, "image_std": STD})
        )
    return folders, {"dino": dino.eval(), "dinov3": dinov3.eval(), "clip": clip.eval().vision_model}


@pytest.mark.parametrize(
    ("name", "side", "first"),
    [("dino", 28, 1), ("dinov3", 32, 5), ("clip", 32, 1)],  # a class, and four registers, before the places
)
def test_features_are_those_of_the_library(towers, name, side, first):
    folders, models = towers
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    extract = load_features(str(folders[name]))
    pixels = (images.numpy() - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    with torch.no_grad():
        expected = models[name](pixel_values=torch.from_numpy(pixels).float())
    assert_close(extract(images), expected.pooler_output, atol=1e-5, rtol=1e-4)
    tokens = extract.tokens(images)
    assert_close(tokens[:, 0], expected.pooler_output, atol=1e-5, rtol=1e-4)
    assert_close(tokens[:, 1:], expected.last_hidden_state[:, first:], atol=1e-5, rtol=1e-4)


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


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory):
    """A small ResNet as transformers saves it: maps in place of tokens, and no size in its config."""
    folder = tmp_path_factory.mktemp("resnet")
    fresh_tower(folder, side=64, widths=(8, 12, 16), seed=1)
    return folder


def test_places_of_a_network_of_convolutions_are_those_of_its_map(convolutions):
    from transformers import ResNetModel

    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    tokens = load_features(str(convolutions)).tokens(images)
    with torch.no_grad():
        out = ResNetModel.from_pretrained(convolutions).eval()(pixel_values=images * 2 - 1)
    assert out.last_hidden_state.shape == (2, 16, 4, 4)
    assert_close(tokens[:, 0], out.pooler_output[:, :, 0, 0])
    for row, column in ((0, 1), (2, 3)):
        assert_close(tokens[:, 1 + 4 * row + column], out.last_hidden_state[:, :, row, column])


def test_a_network_that_does_not_say_how_large_pictures_are_is_refused(convolutions, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((convolutions / name).read_bytes())
    with pytest.raises(ValueError, match="how large pictures are"):
        load_features(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "settings", "side"), [("test_vit", {"img_size": 64}, 64), ("test_resnet", {}, 160)]
)
def test_any_network_of_timm_gives_its_features(tmp_path, name, settings, side):
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(name, pretrained=False, **settings).eval()
    timm.models.save_for_hf(network, tmp_path, model_args=settings, safe_serialization=True)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    tokens = load_features(str(tmp_path)).tokens(images)
    with torch.no_grad():
        last = network.forward_features((images - mean) / std)
        pooled = network.forward_head(last, pre_logits=True)
    if last.ndim == 3:
        expected = last[:, network.num_prefix_tokens :]
    else:
        expected = last.flatten(2).transpose(1, 2)
    assert_close(tokens[:, 0], pooled, atol=1e-5, rtol=1e-4)
    assert_close(tokens[:, 1:], expected, atol=1e-5, rtol=1e-4)


def test_on_a_cpu_few_pictures_are_looked_at_together_with_what_all_of_them_have(convolutions, monkeypatch):
    from transformers import ResNetModel

    from mmalign.rewardmodels import features

    extract = load_features(str(convolutions))
    images, seen = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1)), []
    extract.network.register_forward_pre_hook(
        lambda _, given, named: seen.append(len(named["pixel_values"])), with_kwargs=True
    )
    whole = extract.tokens(images)
    monkeypatch.setattr(features, "CPU_PIXELS", 2 * extract.size**2)
    parts = extract.tokens(images)
    assert seen == [5, 2, 2, 1]
    with torch.no_grad():
        out = ResNetModel.from_pretrained(convolutions).eval()(pixel_values=images * 2 - 1)
    for found in (whole, parts):
        assert_close(found[:, 0], out.pooler_output[:, :, 0, 0])
        assert_close(found[:, 1:], out.last_hidden_state.flatten(2).transpose(1, 2))
