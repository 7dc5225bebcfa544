"""The colors of the lab as a differentiable reward."""

import pytest
import torch

from mmalign.contracts import DifferentiableReward
from mmalign.lab.scenes import BACKGROUND, COLORS
from mmalign.rewardmodels.lab_colors import LabColors, asked
from mmalign.testing import check_reward


def canvas(*colors: str) -> torch.Tensor:
    """A picture [3, 64, 64] of 18 x 18 squares."""
    picture = (torch.tensor(BACKGROUND) / 255)[:, None, None].repeat(1, 64, 64)
    for i, color in enumerate(colors):
        picture[:, 4:22, 4 + 20 * i : 22 + 20 * i] = (torch.tensor(COLORS[color]) / 255)[:, None, None]
    return picture


def test_the_prompt_says_which_colors_are_wanted():
    found = asked(["a red square", "two RED stars, one blue.", "a redder thing", ""])
    assert [[c for c, yes in zip(COLORS, row, strict=True) if yes] for row in found] == [
        ["red"], ["red", "blue"], [], []
    ]  # fmt: skip


def test_the_right_color_beats_no_color_and_that_beats_a_wrong_one(outcome_of):
    media = torch.stack([canvas("red"), canvas(), canvas("green"), canvas("red", "green")])
    right, none, wrong, mixed = LabColors()(outcome_of(media, ["a red square"] * 4)).values[:, 0].tolist()
    assert right > 0.7
    assert none == pytest.approx(0, abs=0.02)
    assert wrong < -0.1
    assert wrong < mixed < right
    assert LabColors()(outcome_of(media[:1], ["a square"])).values.item() > 0.7


def test_it_passes_the_checks_of_rewards_and_says_the_same_with_a_gradient(outcome_of):
    media = torch.stack([canvas("red"), canvas("blue", "green"), canvas()])
    media = (media + 0.2 * torch.rand(media.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    media = (media * 255).round() / 255  # as a picture that was saved
    outcome = outcome_of(media, ["a red square", "a blue cross", "a star"])
    reward = LabColors()
    check_reward(reward, outcome)
    assert isinstance(reward, DifferentiableReward)
    assert torch.equal(reward.differentiate(outcome), reward(outcome).values[:, 0])


def test_the_gradient_is_that_of_differences(outcome_of):
    draw = torch.Generator().manual_seed(0)
    media = torch.rand(1, 3, 6, 6, generator=draw).requires_grad_()
    way = torch.randn(media.shape, generator=draw)
    way = way / way.norm()
    reward = LabColors(width=0.5, area=0.5)
    (gradient,) = torch.autograd.grad(
        reward.differentiate(outcome_of(media, ["a red and green thing"])).sum(), media
    )
    inside = media.detach() * 0.8 + 0.1  # away from the edges, where pixels are clamped
    probe = inside.clone().requires_grad_()
    value = reward.differentiate(outcome_of(probe, ["a red and green thing"]))
    (at,) = torch.autograd.grad(value.sum(), probe)
    ends = [
        reward.differentiate(outcome_of(inside + m * way, ["a red and green thing"])) for m in (0.01, -0.01)
    ]
    assert float((ends[0] - ends[1]) / 0.02) == pytest.approx(float((at * way).sum()), abs=2e-4)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("setting", ["width", "area"])
def test_settings_that_mean_nothing_are_refused(setting):
    with pytest.raises(ValueError, match=f"lab_colors: {setting} must be positive, got 0.0"):
        LabColors(**{setting: 0.0})
