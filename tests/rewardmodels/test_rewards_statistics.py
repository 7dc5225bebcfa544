"""Contrast, colorfulness and sharpness against numbers one can check by hand."""

import pytest
import torch
from torch.testing import assert_close

from mmalign.records import Outcome, Prompts
from mmalign.rewardmodels.statistics import LUMA, Colorfulness, Contrast, Sharpness
from mmalign.testing import check_reward


def outcome(*images) -> Outcome:
    return outcome_of(torch.stack(images))


def outcome_of(media: torch.Tensor) -> Outcome:
    count = len(media)
    prompts = Prompts(["a"] * count, torch.zeros(count, dtype=torch.int64), torch.arange(count), [{}] * count)
    return Outcome(prompts, media)


def flat(*rgb: float) -> torch.Tensor:
    return torch.tensor(rgb)[:, None, None].expand(3, 8, 8).clone()


def halves(left, right) -> torch.Tensor:
    image = flat(*left)
    image[:, :, 4:] = torch.tensor(right)[:, None, None]
    return image


@pytest.mark.parametrize("reward", [Contrast(), Colorfulness(), Sharpness()], ids=lambda r: r.name)
def test_it_keeps_the_contract_and_has_the_gradient_of_its_value(reward):
    generator = torch.Generator().manual_seed(0)
    shown = outcome(*torch.rand(3, 3, 8, 8, generator=generator))
    check_reward(reward, shown)
    media = shown.media.clone().requires_grad_()
    value = reward.differentiate(Outcome(shown.prompts, media))
    assert_close(value[:, None].detach(), reward(shown).values)
    value.sum().backward()
    step = 1e-3 * media.grad / media.grad.norm()
    moved = reward(Outcome(shown.prompts, shown.media + step)).values - reward(shown).values
    assert_close(moved.sum(), (step * media.grad).sum(), atol=1e-6, rtol=1e-2)


def test_contrast_is_the_deviation_of_the_brightness():
    found = Contrast()(
        outcome(flat(0.3, 0.3, 0.3), halves((0.0,) * 3, (1.0,) * 3), halves((0, 0, 0), (1, 0, 0)))
    )
    assert_close(found.values[:, 0], torch.tensor([0.0, 0.5, 0.1495]), atol=1e-5, rtol=0)


def test_colorfulness_is_its_formula():
    gray, red = flat(0.6, 0.6, 0.6), flat(1.0, 0.0, 0.0)
    both = halves((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))  # rg 1 and 0, yb 0.5 and -1
    found = Colorfulness()(outcome(gray, red, both)).values[:, 0]
    expected = [0.0, 0.3 * 1.25**0.5, (0.25 + 0.5625) ** 0.5 + 0.3 * (0.25 + 0.0625) ** 0.5]
    assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def bright(row: int, column: int) -> torch.Tensor:
    image = flat(0.0, 0.0, 0.0)
    image[:, row, column] = 1
    return image


def test_sharpness_is_the_mean_square_of_the_laplacian_of_inner_pixels():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2  # -4 or 4 at all of the 6 x 6 places inside
    shown = outcome(
        bright(3, 3),  # -4 there and 1 at each of its four neighbors
        bright(0, 3),  # its one neighbor inside
        bright(0, 0),
        board.float().expand(3, 8, 8),
        flat(0.2, 0.7, 0.4),
        halves((0.0,) * 3, (1.0, 0.0, 0.0)),  # +.299 and -.299 in two of the six inner columns
    )
    expected = [20 / 36, 1 / 36, 0.0, 16.0, 0.0, 0.299**2 / 3]
    assert_close(Sharpness()(shown).values[:, 0], torch.tensor(expected))


def test_the_gradient_of_sharpness_is_the_laplacian_of_the_laplacian():
    media = (0.5 + 0.2 * bright(3, 3))[None].requires_grad_()
    Sharpness().differentiate(outcome_of(media)).sum().backward()
    twice = torch.zeros(8, 8)
    twice[1:6, 1:6] = torch.tensor(
        [[0, 0, 1, 0, 0], [0, 2, -8, 2, 0], [1, -8, 20, -8, 1], [0, 2, -8, 2, 0], [0, 0, 1, 0, 0]]
    )
    assert_close(media.grad[0], torch.tensor(LUMA)[:, None, None] * 0.2 * 2 / 36 * twice, atol=1e-6, rtol=0)


def test_a_blank_picture_has_a_finite_gradient():
    media = flat(0.5, 0.5, 0.5)[None].requires_grad_()
    for reward in (Contrast(), Colorfulness(), Sharpness()):
        reward.differentiate(outcome_of(media)).sum().backward()
    assert media.grad.isfinite().all()
