"""Intervals over runs and prompts against closed forms, and curves against hand-made ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmalign.comparison import Estimate, Measured, at, counts, curves, difference, reaches, speedup

RUNS, PROMPTS = 4, 60


def drawn(runs: int = RUNS, points: int = 1, prompts: int = PROMPTS, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        runs, points, prompts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def measured(values: torch.Tensor, forwards=None, seconds=None) -> Measured:
    x = torch.arange(values.shape[1], dtype=torch.float64)
    return Measured(
        values,
        x if forwards is None else torch.tensor(forwards).double(),
        x if seconds is None else torch.tensor(seconds).double(),
    )


def test_a_draw_takes_as_many_things_as_there_are_and_the_first_row_takes_each_once():
    found = counts(7, 50, "things")
    assert found.shape == (51, 7)
    assert found[0].tolist() == [1] * 7
    assert found.sum(1).tolist() == [7] * 51
    assert found[1:].std(0).min() > 0


def test_the_estimate_is_the_plain_mean():
    values = drawn(points=3)
    assert_close(curves(measured(values), "a", 10)[0], values.mean((0, 2)))


def test_a_prompt_without_a_verdict_is_left_out():
    values = drawn()
    values[1, 0, 5] = math.nan
    assert_close(curves(measured(values), "a", 10)[0], values.nanmean().reshape(1))


def test_the_spread_over_prompts_is_their_standard_error():
    values = drawn(runs=1, prompts=400)
    spread = curves(measured(values), "a", 4000)[1:].std()
    assert float(spread) == pytest.approx(float(values.std(correction=0)) / math.sqrt(400), rel=0.05)


def test_the_spread_over_runs_is_their_standard_error():
    """Runs that differ and prompts that do not."""
    values = torch.tensor([0.0, 1.0, 2.0, 5.0]).double()[:, None, None].expand(-1, 1, PROMPTS)
    spread = curves(measured(values), "a", 4000)[1:].std()
    assert float(spread) == pytest.approx(float(values[:, 0, 0].std(correction=0)) / 2, rel=0.05)


def test_prompts_are_the_same_for_both_arms():
    """However much prompts differ, a gain that all of them have is certain."""
    values = 100 * drawn(runs=1).expand(3, -1, -1)
    found = Estimate.of(difference(measured(values + 2), measured(values), ("a", "b"), resamples=200))
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))


def test_runs_are_drawn_apart_for_each_arm():
    values = drawn(prompts=1)
    found = difference(measured(values), measured(values), ("a", "b"), resamples=200)
    assert float(found[0]) == 0
    assert float(found[1:].std()) > 0.1


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Prompts are drawn anew for each of 200 worlds, of mean 0; a bootstrap over 60 is a little short."""
    hits = 0
    for world in range(200):
        found = Estimate.of(curves(measured(drawn(runs=1, seed=world)), "a", 400)[:, 0])
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_curve_between_its_points_is_a_line():
    x, y = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([[0.0, 2.0, 8.0], [1.0, 1.0, -1.0]])
    for place in (-1.0, 0.0, 0.5, 1.0, 3.0, 4.0, 9.0):
        expected = [np.interp(place, x, row) for row in y]
        assert at(y, x, place).tolist() == pytest.approx(expected)


def test_where_a_curve_first_reaches_a_score():
    x = torch.tensor([0.0, 10.0, 20.0, 30.0])
    curve = torch.tensor([0.0, 1.0, 0.5, 3.0]).expand(5, -1)
    targets = torch.tensor([-1.0, 0.5, 1.0, 2.0, 4.0])
    assert reaches(curve, x, targets).tolist() == pytest.approx([0, 5, 10, 26, math.inf])


def test_a_faster_arm_needs_a_share_of_the_forwards():
    rise = torch.linspace(0, 1, 5).double().reshape(1, 5, 1)
    slow = measured(rise, [0, 100, 200, 300, 400], [0, 1, 2, 3, 4])
    fast = measured(2 * rise, [0, 100, 200, 300, 400], [0, 4, 8, 12, 16])
    assert float(speedup(fast, slow, ("a", "b"), resamples=5)[0]) == pytest.approx(2)
    assert float(speedup(slow, fast, ("a", "b"), resamples=5)[0]) == 0
    assert float(speedup(fast, slow, ("a", "b"), seconds=True, resamples=5)[0]) == pytest.approx(0.5)


def test_what_never_rose_is_reached_at_once():
    flat, rise = torch.zeros(1, 2, 1).double(), torch.tensor([0.0, 1.0]).double().reshape(1, 2, 1)
    assert float(speedup(measured(rise), measured(flat), ("a", "b"), resamples=5)[0]) == math.inf


def test_at_equal_seconds_the_slower_arm_is_taken_before_its_end():
    rise = torch.tensor([0.0, 1.0, 2.0]).double().reshape(1, 3, 1)
    quick, slow = measured(rise, seconds=[0, 5, 10]), measured(rise, seconds=[0, 10, 20])
    assert float(difference(quick, slow, ("a", "b"), resamples=5)[0]) == 0
    assert float(difference(quick, slow, ("a", "b"), seconds=True, resamples=5)[0]) == pytest.approx(1)


def test_infinite_draws_count_in_an_interval_and_undefined_ones_do_not():
    found = Estimate.of(torch.tensor([2.0, 1.0, math.inf, math.inf, math.nan]).double())
    assert (found.value, found.low, found.high) == (2, 1, math.inf)
    assert math.isnan(Estimate.of(torch.tensor([2.0, math.nan]).double()).low)


def test_points_and_what_was_spent_there_must_fit():
    with pytest.raises(ValueError, match=r"\[runs, points, prompts\]"):
        Measured(torch.zeros(2, 3, 4), torch.zeros(2), torch.zeros(3))
