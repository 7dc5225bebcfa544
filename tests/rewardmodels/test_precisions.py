"""Rewards that look through a tower: half precision gives nearly what fp32 does; heads stay in fp32."""

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from mmalign.contracts import DifferentiableReward
from mmalign.records import Outcome, Prompts
from mmalign.rewardmodels import load
from mmalign.rewardmodels.artifact import Detector
from mmalign.rewardmodels.features import load_features
from mmalign.rewardmodels.precisions import DTYPES

REWARDS = ("dino_similarity", "adversarial", "artifact", "temporal_consistency")
HALVES = ("bf16", "fp16")


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A tiny DINOv2 whose features differ from picture to picture."""
    from transformers import Dinov2Config, Dinov2Model

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(Dinov2Config(**small, image_size=16, patch_size=4, initializer_range=0.2))
    folder = tmp_path_factory.mktemp("dino")
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    return str(folder)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    pixels = torch.randint(
        0, 256, (12, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    for i, picture in enumerate(pixels):
        Image.fromarray(picture.numpy()).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def detector(tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    Detector(tower, width=8).save(folder)
    return str(folder)


@pytest.fixture
def made(tower, references, detector):
    def make(name, precision):
        settings = {
            "dino_similarity": {"model": tower},
            "temporal_consistency": {"model": tower},
            "adversarial": {
                "references": str(references),
                "features": tower,
                "width": 16,
                "learning_rate": 1e-2,
            },
            "artifact": {"detector": detector},
        }[name]
        reward = load(name, **settings, precision=precision)
        if name == "adversarial":
            reward.fit(shown(references, seed=2))  # before it all have the same score
        return reward

    return make


def shown(references, seed=0, frames=0):
    size = (8, frames, 3, 16, 16) if frames else (8, 3, 16, 16)
    media = torch.rand(size, generator=torch.Generator().manual_seed(seed)) ** 2
    rows = torch.arange(8)
    extra = [{"reference_image": str(references / f"{i:02d}.png")} for i in range(8)]
    return Outcome(Prompts(["x"] * 8, rows // 4, rows % 4, extra), media)


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", REWARDS)
def test_half_precision_gives_nearly_the_same(name, precision, made, references):
    outcome = shown(references, frames=3 if name == "temporal_consistency" else 0)
    reward, other = made(name, "fp32"), made(name, precision)
    if name == "adversarial":
        other.load_state_dict(reward.state_dict())  # the same head, that learned from features in fp32
    full, half, eps = reward(outcome).values, other(outcome).values, torch.finfo(DTYPES[precision]).eps
    assert half.dtype == torch.float32
    assert_close(half, full, atol=8 * eps, rtol=8 * eps)
    assert (half - full).abs().max() > eps / 200  # the network did compute in it


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", REWARDS[:3])
def test_gradients_pass_a_network_in_half_precision(name, precision, made, references):
    outcome, slopes = shown(references), {}
    for each in ("fp32", precision):
        reward, media = made(name, each), outcome.media.clone().requires_grad_()
        assert isinstance(reward, DifferentiableReward)
        reward.differentiate(Outcome(outcome.prompts, media)).sum().backward()
        slopes[each] = media.grad.flatten()
    assert slopes[precision].dtype == torch.float32
    assert torch.cosine_similarity(*slopes.values(), dim=0) > 0.99


@pytest.mark.parametrize("precision", HALVES)
def test_only_the_network_of_a_critic_is_in_half_precision(precision, made):
    critic = made("adversarial", precision)
    assert critic._backbone.__self__.network.dtype == DTYPES[precision]
    assert all(p.dtype == torch.float32 for p in critic.head.parameters())
    learned = [x for one in critic._optimizer.state.values() for x in one.values()]
    assert learned
    assert all(x.dtype == torch.float32 for x in [*learned, critic._past, critic._anchors])


@pytest.mark.parametrize("precision", HALVES)
def test_only_the_tower_of_a_detector_is_in_half_precision(precision, made):
    detector = made("artifact", precision)._detector
    assert detector.network.dtype == DTYPES[precision]
    heads = {p.dtype for name, p in detector.named_parameters() if not name.startswith("network.")}
    assert heads == {torch.float32}


def test_features_of_a_real_network_in_half_precision():
    pytest.importorskip("efficientnet_lite_pytorch")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full, half = (load_features("efficientnet", dtype=DTYPES[p])(images) for p in ("fp32", "bf16"))
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(full, half).min() > 0.999
    assert not torch.equal(full, half)


@pytest.mark.parametrize("name", REWARDS)
def test_an_unknown_precision_is_refused_in_the_name_of_the_reward(name, made):
    with pytest.raises(ValueError, match=f"{name}: precision must be one of fp32, bf16, fp16, got 'fp8'"):
        made(name, "fp8")
