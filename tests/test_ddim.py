"""The step of DDIM (arXiv:2010.02502, eq. 12 and 16) is the kernel's step `ddim` in other coordinates."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mmalign.sde import Noise, euler, log_prob, transition

ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def ddim(y: Tensor, noise: Tensor, a: Tensor, after: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the next y, as the paper writes them."""
    std = eta * ((1 - after) / (1 - a)).sqrt() * (1 - a / after).sqrt()
    clean = (y - (1 - a).sqrt() * noise) / a.sqrt()
    return after.sqrt() * clean + (1 - after - std**2).sqrt() * noise, std


def coordinates(a: Tensor) -> tuple[Tensor, Tensor]:
    """(c, sigma) of a level: x = y / c."""
    c = a.sqrt() + (1 - a).sqrt()
    return c, (1 - a).sqrt() / c


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 999), st.integers(1, 999), st.floats(0, 1))
def test_the_step_is_that_of_the_paper_at_every_time_and_eta(t, hop, eta):
    a, after = ALPHAS[t], ALPHAS[max(0, t - hop)]
    y, noise = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = ddim(y, noise, a, after, eta)
    (c, sigma), (c_after, sigma_after) = coordinates(a), coordinates(after)
    x = y / c
    step = transition(x, (noise - x) / (1 - sigma), sigma, sigma_after, Noise("ddim", eta), 0.9)
    assert_close(step.mean * c_after, mean)
    assert_close(step.std * c_after, std, rtol=1e-6, atol=1e-9)


def test_densities_differ_by_the_change_of_scale_alone():
    a, after = ALPHAS[800], ALPHAS[780]
    y, noise, y_next = torch.randn(3, 4, 6, dtype=torch.float64)
    mean, std = ddim(y, noise, a, after, 1.0)
    theirs = torch.distributions.Normal(mean, std).log_prob(y_next).mean(1)
    (c, sigma), (c_after, sigma_after) = coordinates(a), coordinates(after)
    x, kind = y / c, Noise("ddim", 1.0)
    step = transition(x, (noise - x) / (1 - sigma), sigma, sigma_after, kind, 0.9)
    assert_close(log_prob(y_next / c_after, step, kind, (1,)), theirs + c_after.log())


def test_without_eta_it_is_the_euler_step_bit_for_bit():
    x, v = torch.randn(2, 4, 6)
    at, to = torch.tensor([1.0, 0.9, 0.5, 0.1]), torch.tensor([0.8, 0.5, 0.1, 0.0])
    step = transition(x, v, at, to, Noise("ddim", 0.0), 0.9)
    assert torch.equal(step.mean, euler(x, v, at, to))
    assert not step.std.any()


@settings(deadline=None)
@given(sigma=st.floats(0.05, 1.0), share=st.floats(0.05, 0.95), eta=st.floats(0.0, 1.0))
def test_it_keeps_the_coefficients_of_the_schedule(sigma, share, eta):
    at, to = torch.tensor(sigma).double(), torch.tensor(sigma * share).double()
    x, v = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean, noise = x - at * v, x + (1 - at) * v
    step = transition(x, v, at, to, Noise("ddim", eta), 0.9)
    kept = (step.mean - (1 - to) * clean) / noise
    assert_close(kept**2 + step.std**2, (to**2).expand_as(kept))


def test_the_last_step_draws_nothing_and_no_number_is_infinite_at_pure_noise():
    x, v = torch.randn(2, 1, 4)
    last = transition(x, v, torch.tensor(0.2), torch.tensor(0.0), Noise("ddim", 1.0), 0.9)
    assert_close(last.mean, x - 0.2 * v)
    assert float(last.std) == 0
    first = transition(x, v, torch.tensor(1.0), torch.tensor(0.9), Noise("ddim", 1.0), 0.9)
    assert_close(first.std, torch.tensor(0.9))
    assert first.mean.isfinite().all()


def final_variance(noise: Noise, steps: int) -> float:
    """Variance of a unit Gaussian at the end, by the recursion of x' = a x + std z."""
    one, variance = torch.ones(1, 1, dtype=torch.float64), 1.0
    for sigma, after in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64)):
        velocity = one * (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)
        step = transition(one, velocity, sigma, after, noise, 0.9)
        variance = float(step.mean) ** 2 * variance + float(step.std) ** 2
    return variance


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_its_law_is_that_of_the_data_as_steps_grow(eta):
    found = [final_variance(Noise("ddim", eta), steps) for steps in (10, 100, 1000)]
    assert found[2] == pytest.approx(1, abs=0.01)
    assert abs(found[0] - 1) > abs(found[1] - 1) > abs(found[2] - 1)


def test_eta_one_is_the_posterior_of_the_noising_process():
    """The noise that is drawn anew has the variance that x' has given x and x0."""
    sigma, after = 0.8, 0.7
    a, b = ((1 - s) ** 2 / ((1 - s) ** 2 + s**2) for s in (sigma, after))
    exact = (1 - b) / (1 - a) * (1 - a / b)
    step = transition(
        torch.zeros(1, 1),
        torch.zeros(1, 1),
        torch.tensor(sigma),
        torch.tensor(after),
        Noise("ddim", 1.0),
        0.9,
    )
    assert float(step.std) == pytest.approx(math.sqrt(exact) * math.hypot(after, 1 - after), abs=1e-6)


def test_an_eta_beyond_one_is_refused():
    with pytest.raises(ValueError, match=r"noise.level of ddim must lie in \[0, 1\], got 1.5"):
        Noise("ddim", 1.5)
