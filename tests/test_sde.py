"""The stochastic steps against closed forms of a Gaussian world, and against their formulas written out."""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmalign.sde import Kind, Noise, Transition, euler, log_prob, transition

T, U = 0.8, 0.7  # the step of the reference values
KINDS = [
    *(Noise("flow", 0.7), Noise("dance", 0.3), Noise("linear", 1.0), Noise("sage", 0.7)),
    *(Noise("cps", 0.8), Noise("precise", 0.7), Noise("precise", 1.5), Noise("dance_precise", 0.3)),
]


def named(noise: Noise) -> str:
    return f"{noise.kind}-{noise.level}"


UNSCALED = Noise("cps", 0.8, density="unscaled")


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def coefficients(
    noise: Noise, sigma: float, sigma_next: float, guard: float = 0.9
) -> tuple[float, float, float]:
    """How the mean depends on x and on the velocity, and the standard deviation, read off the kernel."""
    x, v = (
        torch.tensor([[1.0], [0.0]], dtype=torch.float64),
        torch.tensor([[0.0], [1.0]], dtype=torch.float64),
    )
    step = transition(x, v, scalar(sigma), scalar(sigma_next), noise, guard)
    return step.mean[0].item(), step.mean[1].item(), float(step.std)


@pytest.mark.parametrize(
    ("noise", "of_x", "of_v", "std"),
    [
        (Noise("flow", 0.7), 0.8775, -0.1245, 0.442719),
        (Noise("dance", 0.3), 0.994375, -0.101125, 0.094868),
        (Noise("linear", 1.0), 0.96, -0.108, 0.252982),
        (Noise("cps", 0.8), 0.3 + 0.216312, -0.24 + 0.2 * 0.216312, 0.665740),
        (Noise("precise", 0.7), 0.3 + 0.613405, -0.24 + 0.2 * 0.613405, 0.337244),
        (Noise("precise", 1.0), 0.3 + 0.534634, -0.24 + 0.2 * 0.534634, 0.451848),
        (
            Noise("dance_precise", 0.3),
            0.3 + math.sqrt(0.49 - 0.088386**2),
            -0.24 + 0.2 * math.sqrt(0.49 - 0.088386**2),
            0.088386,
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Noise) else "",
)
def test_one_step_has_the_published_coefficients(noise, of_x, of_v, std):
    found = coefficients(noise, T, U)
    assert found == pytest.approx((of_x, of_v, std), abs=1e-6)


def test_other_published_deviations():
    assert coefficients(Noise("precise", 1.5), T, U)[2] == pytest.approx(0.586757, abs=1e-6)
    assert coefficients(Noise("sage", 0.7), T, U)[2] == pytest.approx(0.386882, abs=1e-6)
    # The second step of ten with shift 3, 27/28 to 12/13.
    assert coefficients(Noise("sage", 0.7), 27 / 28, 12 / 13)[2] == pytest.approx(0.5965, abs=1e-4)
    assert coefficients(Noise("flow", 0.7), 27 / 28, 12 / 13)[2] == pytest.approx(0.7384, abs=1e-4)


@pytest.mark.parametrize("noise", KINDS, ids=named)
@pytest.mark.parametrize(("sigma", "sigma_next"), [(T, U), (1.0, 0.9), (0.1, 0.02), (0.5, 0.0)])
def test_the_slope_is_how_the_mean_moves_against_the_velocity(noise, sigma, sigma_next):
    one = torch.zeros(1, 1, dtype=torch.float64)
    step = transition(one, one, scalar(sigma), scalar(sigma_next), noise, 0.9)
    _, of_v, std = coefficients(noise, sigma, sigma_next)
    assert float(step.slope) == pytest.approx(-of_v, rel=1e-12)
    if noise.kind in ("cps", "precise", "dance_precise"):
        kept = math.sqrt(sigma_next**2 - std**2)
        assert of_v == pytest.approx(-sigma * (1 - sigma_next) + (1 - sigma) * kept, abs=1e-9)
    else:
        by_hand = sigma - sigma_next + std**2 * (1 - sigma) / (2 * sigma)
        assert float(step.slope) == pytest.approx(by_hand, rel=1e-12)


def test_flow_uses_its_g_of_one_point_four_at_the_reference_step():
    step = transition(
        torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor(T), torch.tensor(U), Noise("flow", 0.7), 0.9
    )
    assert_close(step.g, torch.tensor(1.4))
    assert_close(step.step, torch.tensor(0.1))
    assert_close(step.std, step.g * step.step.sqrt())


@given(sigma=st.floats(0.05, 0.95), share=st.floats(0.05, 0.95), level=st.floats(0.05, 1.5))
def test_flow_moves_with_the_velocity_alike_at_every_time(sigma, share, level):
    sigma_next = sigma * share
    d = sigma - sigma_next
    of_x, of_v, _ = coefficients(Noise("flow", level), sigma, sigma_next)
    assert of_v == pytest.approx(-d * (1 + level**2 / 2), rel=1e-9)
    assert of_x == pytest.approx(1 - level**2 * d / (2 * (1 - sigma)), rel=1e-9, abs=1e-9)


@given(sigma=st.floats(0.05, 0.95), share=st.floats(0.05, 0.95), level=st.floats(0.05, 1.5))
def test_both_forms_of_the_flow_divergence_agree(sigma, share, level):
    d = sigma * (1 - share)
    g = level * math.sqrt(sigma / (1 - sigma))
    _, of_v, std = coefficients(Noise("flow", level), sigma, sigma - d)
    by_mean = of_v**2 / (2 * std**2)  # for a velocity that differs by 1
    assert by_mean == pytest.approx(d / 2 * ((1 + level**2 / 2) / g) ** 2, rel=1e-9)
    assert by_mean == pytest.approx(d / 2 * (g * (1 - sigma) / (2 * sigma) + 1 / g) ** 2, rel=1e-9)


def test_divergence_of_the_reference_step():
    _, of_v, std = coefficients(Noise("flow", 0.7), T, U)
    assert of_v**2 / (2 * std**2) == pytest.approx(0.0395414, abs=1e-7)


@pytest.mark.parametrize(("kind", "rate"), [("dance", lambda t: 1.0), ("linear", lambda t: t)])
@given(sigma=st.floats(0.05, 1.0), share=st.floats(0.05, 0.95), eta=st.floats(0.05, 1.0))
def test_dance_and_linear_are_the_same_written_with_the_score(kind, rate, sigma, share, eta):
    x, v = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d, g = sigma * (1 - share), eta * rate(sigma)
    clean = x - sigma * v
    score = -(x - (1 - sigma) * clean) / sigma**2
    step = transition(x, v, scalar(sigma), scalar(sigma - d), Noise(kind, eta), 0.9)
    assert_close(step.mean, x - d * v + g**2 / 2 * score * d)
    assert_close(step.std, scalar(g * math.sqrt(d)))


def test_linear_draws_ever_less_towards_the_end_and_needs_no_guard():
    for sigma, sigma_next, std in ((1.0, 0.9, 0.5 * math.sqrt(0.1)), (0.1, 0.0, 0.05 * math.sqrt(0.1))):
        assert coefficients(Noise("linear", 0.5), sigma, sigma_next, guard=1.0)[2] == pytest.approx(std)


@given(
    sigma=st.floats(0.05, 1.0),
    share=st.just(0.0) | st.floats(1e-6, 0.95),
    eta=st.floats(0.0, 1.0),
    kind=st.sampled_from(["cps", "precise", "dance_precise"]),
)
def test_three_kinds_keep_the_coefficients_of_the_schedule(sigma, share, eta, kind):
    sigma_next = sigma * share
    x, v = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    step = transition(x, v, scalar(sigma), scalar(sigma_next), Noise(kind, eta), 0.9)
    kept = (step.mean - (1 - sigma_next) * clean) / noise
    with_noise = {
        "cps": lambda: math.cos(eta * math.pi / 2),
        "precise": lambda: (sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))) ** (eta**2 / 2),
        "dance_precise": lambda: math.exp(eta**2 / 2 * (1 / sigma - 1 / sigma_next)) if share else 0.0,
    }
    assert_close(kept, torch.full_like(kept, sigma_next * with_noise[kind]()), atol=1e-9, rtol=1e-6)
    assert_close(kept**2 + step.std**2, torch.full_like(kept, sigma_next**2), atol=1e-9, rtol=1e-6)


def test_precise_at_root_two_is_the_posterior_of_ddpm():
    """x_u given x_t and x0, where x_t = (1 - t) x0 + t e is a Markov chain in t."""
    sigma, sigma_next = T, U
    ratio = (1 - sigma) / (1 - sigma_next)  # x_t = ratio x_u + fresh noise of this variance
    fresh = sigma**2 - ratio**2 * sigma_next**2
    variance = fresh * sigma_next**2 / sigma**2
    of_xt, of_x0 = ratio * sigma_next**2 / sigma**2, (1 - sigma_next) * fresh / sigma**2
    of_x, of_v, std = coefficients(Noise("precise", math.sqrt(2)), sigma, sigma_next)
    assert std**2 == pytest.approx(variance, rel=1e-12)
    assert (of_x, of_v) == pytest.approx((of_xt + of_x0, -sigma * of_x0), rel=1e-12)


def test_the_first_step_of_precise_redraws_all_noise_and_keeps_the_clean_estimate():
    x, v = torch.randn(2, 3, 5)
    step = transition(x, v, torch.tensor(1.0), torch.tensor(0.9), Noise("precise", 0.7), 0.9)
    assert_close(step.std, torch.tensor(0.9))
    assert_close(step.mean, 0.1 * (x - v))


@pytest.mark.parametrize("kind", ["precise", "dance_precise", "sage"])
@given(sigma=st.floats(0.1, 0.95), level=st.floats(0.1, 1.5))
def test_small_steps_have_the_noise_rate_of_the_equation_that_they_integrate(kind, sigma, level):
    like = "dance" if kind == "dance_precise" else "flow"
    deviations = [coefficients(Noise(k, level), sigma, sigma * (1 - 1e-5))[2] for k in (kind, like)]
    assert deviations[0] / deviations[1] == pytest.approx(1, abs=2e-3)


@given(sigma=st.floats(0.05, 0.95), share=st.floats(0.0, 0.95), between=st.floats(0.1, 0.9))
def test_sage_adds_up_over_parts_of_a_step_and_is_below_flow(sigma, share, between):
    sage, after = Noise("sage", 0.7), sigma * share
    middle = after + between * (sigma - after)
    variances = [coefficients(sage, *ends)[2] ** 2 for ends in ((sigma, middle), (middle, after))]
    whole = coefficients(sage, sigma, after)[2]
    assert sum(variances) == pytest.approx(whole**2, rel=1e-9)
    assert whole < coefficients(Noise("flow", 0.7), sigma, after)[2]


def test_sage_at_the_guard_integrates_what_flow_takes_at_its_upper_end():
    level, guard, after = 0.7, 0.9, 0.8
    found = coefficients(Noise("sage", level), 1.0, after, guard)[2] ** 2
    fine = torch.linspace(after, 1, 100_001, dtype=torch.float64)
    rate = level**2 * fine / (1 - fine.clamp(max=guard))
    assert found == pytest.approx(float(torch.trapezoid(rate, fine)), rel=1e-7)
    assert found < coefficients(Noise("flow", level), 1.0, after, guard)[2] ** 2


def test_cps_at_level_one_redraws_all_noise():
    x, v = torch.randn(2, 3, 5, dtype=torch.float64)
    step = transition(x, v, scalar(T), scalar(U), Noise("cps", 1.0), 0.9)
    assert_close(step.mean, (1 - U) * (x - T * v))
    assert_close(step.std, scalar(U))


def test_flow_carries_more_noise_than_its_schedule():
    of_x, of_v, std = coefficients(Noise("flow", 0.7), T, U)
    of_noise = of_x * T + of_v  # of e in the mean, for x = (1 - t) x0 + t e and v = e - x0
    assert math.sqrt(of_noise**2 + std**2) == pytest.approx(0.727672, abs=1e-6)


# ---- the law it samples: x0 ~ N(0, 1) has the exact velocity v(x, t) = x (2t - 1) / ((1 - t)^2 + t^2)


def gaussian_velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x * (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)


def final_variance(noise: Noise, steps: int) -> float:
    """Variance at the end, by the recursion of x' = a x + std z with a and std from the kernel."""
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    variance = 1.0
    for sigma, sigma_next in pairwise(sigmas):
        step = transition(one, gaussian_velocity(one, sigma), sigma, sigma_next, noise, sigmas[1])
        variance = float(step.mean) ** 2 * variance + float(step.std) ** 2
    return variance


TABLE = [
    (Noise("flow", 0.0), 0.773, 0.938, 0.999),
    (Noise("flow", 0.7), 0.931, 0.999, 1.004),
    (Noise("flow", 1.0), 0.992, 1.004, 1.001),
    (Noise("dance", 0.3), 0.787, 0.942, 0.999),
    (Noise("linear", 1.0), 0.827, 0.951, 0.999),
    (Noise("cps", 0.5), 0.677, 0.802, 0.851),
    (Noise("cps", 0.8), 0.524, 0.611, 0.652),
    (Noise("precise", 0.7), 0.741, 0.926, 0.998),
    (Noise("precise", 1.5), 0.635, 0.880, 0.997),
    (Noise("dance_precise", 0.3), 0.761, 0.931, 0.998),
]


@pytest.mark.parametrize(("noise", "ten", "forty", "many"), TABLE, ids=lambda v: str(getattr(v, "kind", "")))
def test_variance_of_a_gaussian_is_the_closed_form(noise, ten, forty, many):
    found = [final_variance(noise, steps) for steps in (10, 40, 2000)]
    assert found == pytest.approx([ten, forty, many], abs=1e-3)


def test_all_but_cps_reach_the_data_law_and_cps_its_own_limit():
    for noise in (*(noise for noise in KINDS if noise.kind != "cps"), Noise("flow", 1.0)):
        assert final_variance(noise, 2000) == pytest.approx(1, abs=5e-3)
    for eta in (0.5, 0.8):
        limit = (1 + math.cos(eta * math.pi / 2)) / 2
        assert final_variance(Noise("cps", eta), 2000) == pytest.approx(limit, abs=4e-3)


@pytest.mark.parametrize("noise", KINDS, ids=named)
def test_samples_have_the_variance_of_the_recursion(noise):
    steps, many = 100, 40_000
    sigmas = torch.linspace(1, 0, steps + 1)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(many, 1, generator=draw)
    for sigma, sigma_next in pairwise(sigmas):
        step = transition(x, gaussian_velocity(x, sigma), sigma, sigma_next, noise, sigmas[1])
        x = step.mean + step.std * torch.randn(many, 1, generator=draw)
    expected = final_variance(noise, steps)
    error = expected * math.sqrt(2 / many)
    assert x.var().item() == pytest.approx(expected, abs=5 * error)
    assert x.mean().item() == pytest.approx(0, abs=5 * math.sqrt(expected / many))


# ---- the ODE is the limit without noise


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    sigma=st.floats(0.05, 1.0),
    share=st.floats(0, 0.95),
    kind=st.sampled_from(get_args(Kind)),
    scale=st.floats(1e-3, 1e3),
)
def test_without_noise_a_step_is_the_euler_step_bit_for_bit(shape, sigma, share, kind, scale):
    draw = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, *shape, generator=draw) * scale
    at, to = torch.tensor(sigma), torch.tensor(sigma * share)
    step = transition(x, v, at, to, Noise(kind, 0.0), 0.9)
    assert torch.equal(step.mean, euler(x, v, at, to))
    assert torch.equal(step.std, torch.zeros(()))


def test_euler_is_the_straight_line_between_estimates():
    x, v = torch.randn(2, 3, 5, dtype=torch.float64)
    assert_close(euler(x, v, scalar(T), scalar(U)), (1 - U) * (x - T * v) + U * (x + (1 - T) * v))


# ---- the first step


def test_guard_stands_under_the_square_root_alone():
    x, v = torch.randn(2, 1, 5, dtype=torch.float64)
    step = transition(x, v, scalar(1.0), scalar(0.9), Noise("flow", 0.7), 0.9)
    g = 0.7 * math.sqrt(1 / (1 - 0.9))
    assert_close(step.g, scalar(g))
    assert_close(step.mean, x - 0.1 * v - g**2 * 0.1 / 2 * x)  # 2 sigma is 2, e is x


@pytest.mark.parametrize("noise", KINDS, ids=named)
def test_the_guard_changes_no_other_step(noise):
    x, v = torch.randn(2, 2, 5)
    at, to = torch.tensor([0.95, 0.4]), torch.tensor([0.9, 0.3])
    near, far = (transition(x, v, at, to, noise, guard) for guard in (0.9, 0.1))
    assert torch.equal(near.mean, far.mean)
    assert torch.equal(near.std.expand(2, 1), far.std.expand(2, 1))


# ---- log-probability


@pytest.mark.parametrize("noise", KINDS, ids=named)
def test_log_prob_is_the_normal_density(noise):
    x, v, x_next = torch.randn(3, 4, 2, 3, 3)
    step = transition(x, v, torch.tensor(T), torch.tensor(U), noise, 0.9)
    naive = torch.distributions.Normal(step.mean, step.std.expand_as(step.mean)).log_prob(x_next)
    assert_close(log_prob(x_next, step, noise), naive)
    assert_close(log_prob(x_next, step, noise, (1, 2, 3)), naive.mean((1, 2, 3)))
    total = Noise(noise.kind, noise.level, reduction="sum")
    assert_close(log_prob(x_next, step, total, (1, 2, 3)), naive.sum((1, 2, 3)))


def test_both_reductions_agree_between_sites():
    x, v, x_next = torch.randn(3, 4, 2, 3, 3)
    for reduction, over_sites in (("mean", torch.mean), ("sum", torch.sum)):
        noise = Noise("flow", 0.7, reduction=reduction)
        step = transition(x, v, torch.tensor(T), torch.tensor(U), noise, 0.9)
        by_site = log_prob(x_next, step, noise, (1,))
        assert by_site.shape == (4, 3, 3)
        assert_close(over_sites(by_site, (1, 2)), log_prob(x_next, step, noise, (1, 2, 3)))


def test_unscaled_form_has_no_constants_and_two_std_squared_of_the_gradient():
    x, x_next = torch.randn(2, 4, 6, dtype=torch.float64)
    gradients = []
    for noise in (Noise("cps", 0.8), UNSCALED):
        v = torch.ones(4, 6, dtype=torch.float64, requires_grad=True)
        step = transition(x, v, scalar(T), scalar(U), noise, 0.9)
        value = log_prob(x_next, step, noise, (1,))
        gradients.append(torch.autograd.grad(value.sum(), v)[0])
    assert_close(value, -((x_next - step.mean) ** 2).mean(1))
    assert_close(gradients[1], gradients[0] * 2 * step.std**2)


@pytest.mark.parametrize("noise", [*KINDS, UNSCALED, Noise("flow", 0.7, reduction="sum")])
def test_gradient_of_log_prob_is_right(noise):
    x, v, x_next = torch.randn(3, 2, 3, 2, 2, dtype=torch.float64)
    at, to = torch.tensor([1.0, 0.8]), torch.tensor([0.9, 0.7])

    def likely(v, x_next):
        return log_prob(x_next, transition(x, v, at, to, noise, 0.9), noise, (1, 2, 3))

    assert torch.autograd.gradcheck(likely, (v.requires_grad_(), x_next.requires_grad_()))


@settings(max_examples=40)
@given(
    noise=st.sampled_from([*KINDS, UNSCALED]),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    sigmas=st.lists(st.floats(0.02, 1.0), min_size=1, max_size=5),
    scale=st.floats(1e-2, 1e2),
)
def test_rows_are_stepped_alone_and_replay_gives_the_same_log_prob(noise, shape, sigmas, scale):
    rows = len(sigmas)
    draw = torch.Generator().manual_seed(0)
    x, v, z = torch.randn(3, rows, *shape, generator=draw)
    x, v = x * scale, v * scale
    at = torch.tensor(sigmas)
    to = at * 0.9
    dims = tuple(range(1, x.ndim))
    step = transition(x, v, at, to, noise, 0.9)
    x_next = step.mean + step.std * z
    recorded = log_prob(x_next, step, noise, dims)
    assert step.mean.shape == x.shape
    assert recorded.shape == (rows,)
    assert step.std.shape == (rows, *[1] * len(shape))
    assert (step.std > 0).all()
    assert (step.step > 0).all()
    assert torch.isfinite(recorded).all()
    order = torch.randperm(rows, generator=draw)
    again = transition(x[order], v[order], at[order], to[order], noise, 0.9)
    assert_close(log_prob(x_next[order], again, noise, dims), recorded[order], rtol=1e-6, atol=1e-6)
    for i in range(rows):
        alone = transition(x[i : i + 1], v[i : i + 1], at[i], to[i], noise, 0.9)
        assert_close(alone.mean[0], step.mean[i], rtol=1e-6, atol=1e-6 * scale)


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", [*KINDS, UNSCALED], ids=lambda noise: f"{named(noise)}-{noise.density}")
def test_half_precision_inputs_are_computed_in_fp32(noise, dtype):
    x, v = (torch.randn(2, 4, 6) * 3).to(dtype)
    at, to = torch.tensor(T), torch.tensor(U)
    half, full = transition(x, v, at, to, noise, 0.9), transition(x.float(), v.float(), at, to, noise, 0.9)
    for name in Transition.__dataclass_fields__:
        assert getattr(half, name).dtype == torch.float32
        assert torch.equal(getattr(half, name), getattr(full, name))
    assert log_prob(x, half, noise, (1,)).dtype == torch.float32
    assert euler(x, v, at, to).dtype == torch.float32


# ---- settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"kind": "euler"},
            "noise.kind must be one of flow, dance, linear, cps, precise, .*, got 'euler'",
        ),
        ({"level": -0.1}, "noise.level must be 0 or more"),
        ({"level": math.nan}, "noise.level must be 0 or more"),
        ({"kind": "cps", "level": 1.2}, r"noise.level of cps must lie in \[0, 1\]"),
        ({"density": "unscaled"}, "form of cps only"),
        ({"reduction": "median"}, "noise.reduction must be one of mean, sum"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Noise(**wrong)
