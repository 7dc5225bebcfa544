"""Steps of second order against their formula, the order that they claim, and their limits."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mmalign.sde import euler
from mmalign.solvers import Estimate, compressed, multistep


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def state() -> list[Tensor]:
    return list(torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


@settings(deadline=None)
@given(before=st.floats(0.3, 0.99), first=st.floats(0.1, 0.95), second=st.floats(0.1, 0.95))
def test_a_step_is_the_formula_in_lambda(before, first, second):
    t, u = before * first, before * first * second
    x, v, clean_before = state()
    found, now = multistep(x, v, scalar(t), scalar(u), Estimate(clean_before, scalar(before)))
    lam = {s: math.log((1 - s) / s) for s in (before, t, u)}
    clean, h = x - t * v, lam[u] - lam[t]
    change = (clean - clean_before) / ((lam[t] - lam[before]) / h)
    factor = (1 - u) * math.expm1(-h)
    assert_close(found, u / t * x - factor * clean - 0.5 * factor * change, rtol=1e-6, atol=1e-9)
    assert_close(now.clean, clean)
    assert float(now.sigma) == t


@settings(deadline=None)
@given(t=st.floats(0.05, 1.0), share=st.floats(0.0, 0.95))
def test_without_a_past_it_is_the_step_of_first_order_which_is_eulers(t, share):
    x, v, _ = state()
    u = t * share
    found, _ = multistep(x, v, scalar(t), scalar(u), None)
    assert torch.equal(found, euler(x, v, scalar(t), scalar(u)))
    assert_close(found, (1 - u) * (x - t * v) + u * (x + (1 - t) * v))
    if share > 0.01 and t < 1:
        shrunk = -(1 - u) * math.expm1(-(math.log((1 - u) / u) - math.log((1 - t) / t)))
        assert_close(found, u / t * x + shrunk * (x - t * v), rtol=1e-6, atol=1e-9)


def test_the_last_step_gives_the_clean_estimate():
    x, v, before = state()
    assert_close(multistep(x, v, scalar(0.2), scalar(0.0), Estimate(before, scalar(0.4)))[0], x - 0.2 * v)


def test_the_estimate_at_pure_noise_lies_infinitely_far_back_and_tells_nothing():
    x, v, before = state()
    found, _ = multistep(x, v, scalar(0.9), scalar(0.8), Estimate(before, scalar(1.0)))
    assert torch.equal(found, euler(x, v, scalar(0.9), scalar(0.8)))


def solved(steps: int, spread: float) -> float:
    """Where x = 1 at noise ends if x0 ~ N(0, spread^2); the truth is `spread`."""
    x, before = torch.ones(1, 1, dtype=torch.float64), None
    for sigma, sigma_next in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64)):
        gain = (sigma - (1 - sigma) * spread**2) / ((1 - sigma) ** 2 * spread**2 + sigma**2)
        x, before = multistep(x, gain * x, sigma, sigma_next, before)
    return float(x)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_the_error_falls_by_four_when_the_steps_double(spread):
    errors = [abs(solved(steps, spread) - spread) for steps in (128, 256, 512)]
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(3.3 < ratio < 5 for ratio in ratios), (errors, ratios)
    straight = math.sqrt(0.773)  # Euler with ten steps and a spread of 1
    assert abs(solved(10, 1.0) - 1) < abs(straight - 1) / 4


@settings(deadline=None)
@given(length=st.integers(2, 40), steps=st.integers(1, 40))
def test_a_compressed_schedule_falls_from_one_end_to_the_other(length, steps):
    sigmas = torch.linspace(1, 0, length + 1)[1:]
    shifted = 3 * sigmas / (1 + 2 * sigmas)
    found = compressed(shifted, steps)
    assert len(found) == steps + 1
    assert (found[0], found[-1]) == (shifted[0], 0)
    assert (found.diff() < 0).all()


def test_a_compressed_schedule_takes_every_nth_entry_where_it_can():
    sigmas = torch.tensor([0.9, 0.8, 0.6, 0.5, 0.3, 0.2, 0.0])
    assert_close(compressed(sigmas, 3), sigmas[::2])
    assert torch.equal(compressed(sigmas, 6), sigmas)
    assert_close(compressed(sigmas, 4), torch.tensor([0.9, 0.7, 0.5, 0.25, 0.0]))
