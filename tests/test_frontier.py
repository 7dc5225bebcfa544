"""Best-of-N and the tilted law against brute force, closed forms and each other (arXiv:2404.01730)."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known import TWO, Judge, policy_of
from torch.testing import assert_close
from toys import Redness, ToyFlow, Velocity

from mmalign.contracts import Forwards
from mmalign.copies import Copies
from mmalign.data import Prompt
from mmalign.frontier import (
    best_of_n,
    chances,
    divergence,
    expected_best,
    frontier,
    kl_bound,
    kl_of_best,
    law_of_best,
    path_kl,
    tilt,
)
from mmalign.lab.gaussians import reweighted
from mmalign.records import Outcome, RewardSignal
from mmalign.sde import transition

LEVELS = st.lists(st.integers(0, 3), min_size=2, max_size=8)


def rows(values) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(LEVELS, st.integers(1, 8))
def test_the_expected_best_is_the_mean_over_all_subsets(values, n):
    n = min(n, len(values))
    brute = [max(chosen) for chosen in combinations(values, n)]
    assert float(expected_best(rows(values), n)) == pytest.approx(sum(brute) / len(brute))


@settings(max_examples=50, deadline=None)
@given(LEVELS, st.integers(1, 8))
def test_what_a_watched_reward_gains_is_the_mean_over_the_best_of_all_subsets(values, n):
    """Those that tie for the best are chosen equally often."""
    n, watched = min(n, len(values)), [i * i for i in range(len(values))]
    brute = []
    for subset in combinations(range(len(values)), n):
        best = [i for i in subset if values[i] == max(values[j] for j in subset)]
        brute.append(sum(watched[i] for i in best) / len(best))
    share = chances(rows(values), n)
    assert float(share.sum()) == pytest.approx(1)
    assert float((share * rows(watched)).sum()) == pytest.approx(sum(brute) / len(brute))


@settings(max_examples=50, deadline=None)
@given(LEVELS, st.integers(1, 64))
def test_the_divergence_never_exceeds_its_bounds(values, n):
    kl = float(kl_of_best(rows(values), n))
    top = values.count(max(values)) / len(values)
    assert -1e-9 <= kl <= min(kl_bound(n), math.log(1 / top)) + 1e-9


def test_the_best_of_one_is_one_draw():
    values = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    assert_close(expected_best(values, 1), values.double().mean(1))
    assert_close(kl_of_best(values, 1), torch.zeros(5, dtype=torch.float64))
    assert kl_bound(1) == 0


def test_without_ties_the_bound_is_almost_reached():
    values = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    for n in (2, 8, 16):
        assert float(kl_of_best(values, n)) == pytest.approx(kl_bound(n), rel=0.02)


def test_a_binary_reward_costs_far_less_than_the_bound():
    half = torch.tensor([0.5, 0.5])
    assert divergence(law_of_best(half, 16), half.double()) == pytest.approx(0.693, abs=1e-3)
    assert kl_bound(16) == pytest.approx(1.835, abs=1e-3)
    assert float(kl_of_best(rows([0, 1] * 50), 16)) == pytest.approx(0.693, abs=1e-3)


def test_the_law_of_the_best_is_that_of_drawing():
    mass = torch.tensor([0.2, 0.5, 0.3])
    draws = torch.multinomial(mass, 3 * 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    seen = torch.bincount(draws.reshape(-1, 3).amax(1), minlength=3) / 100_000
    assert_close(law_of_best(mass, 3).float(), seen, atol=0.01, rtol=0)


def test_the_curve_rises_with_n():
    values = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    curve = frontier(values).best_of_n
    assert [point.name for point in curve] == ["n=1", "n=2", "n=4", "n=8", "n=16", "n=32", "n=64"]
    for before, after in pairwise(curve):
        assert after.reward >= before.reward
        assert after.kl >= before.kl
    assert all(point.kl <= point.kl_bound + 1e-9 for point in curve)


def test_a_curve_takes_the_sizes_it_is_asked_for_and_says_what_others_think():
    values = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    curve = frontier(values, [0.1], [1, 3, 16], {"opposite": -values})
    assert [point.name for point in curve.best_of_n] == ["n=1", "n=3", "n=16"]
    for point in (*curve.best_of_n, *curve.tilted):
        assert point.watched["opposite"] == pytest.approx(-point.reward)
        assert point.low <= point.reward <= point.high
    assert curve.best_of_n[-1].reward == pytest.approx(float(values.amax(1).double().mean()))


def test_at_equal_divergence_no_law_gains_more_than_the_tilted_one():
    mass, values = torch.tensor([0.4, 0.3, 0.2, 0.1]).double(), torch.tensor([0.0, 0.3, 0.9, 1.0]).double()
    for n in (2, 4, 16):
        best = law_of_best(mass, n)
        budget = divergence(best, mass)
        low, high = 1e-3, 1e3  # beta of the tilted law with this divergence
        for _ in range(100):
            beta = math.sqrt(low * high)
            low, high = (
                (low, beta) if divergence(reweighted(mass, values, beta), mass) < budget else (beta, high)
            )
        tilted = reweighted(mass, values, beta)
        assert divergence(tilted, mass) == pytest.approx(budget, abs=1e-6)
        assert float(tilted @ values) >= float(best @ values) - 1e-9


def test_the_tilted_curve_of_draws_is_the_reweighted_law_of_their_levels():
    values, beta = rows([0] * 40 + [1] * 30 + [2] * 30), 0.8
    exact = reweighted(torch.tensor([0.4, 0.3, 0.3]).double(), torch.tensor([0.0, 1, 2]).double(), beta)
    weight, kl, effective = tilt(values, beta)
    assert float((weight * values).sum()) == pytest.approx(float(exact @ torch.tensor([0.0, 1, 2]).double()))
    assert float(kl) == pytest.approx(divergence(exact, torch.tensor([0.4, 0.3, 0.3]).double()))
    assert 1 <= float(effective) <= 100


def test_a_monotone_transform_moves_the_tilted_curve_alone():
    values = torch.rand(3, 32, generator=torch.Generator().manual_seed(0))
    assert_close(kl_of_best(values, 4), kl_of_best(values.exp(), 4))
    assert (tilt(values, 0.3)[1] - tilt((3 * values).exp(), 0.3)[1]).abs().min() > 0.01


def test_a_law_differs_from_itself_by_nothing():
    mass = torch.tensor([0.2, 0.8, 0.0]).double()
    assert divergence(mass, mass.clamp(min=1e-9)) == pytest.approx(0, abs=1e-6)
    assert tilt(torch.zeros(2, 5), 0.1)[1].tolist() == [0, 0]


def test_what_makes_no_curve_is_refused():
    with pytest.raises(ValueError, match=r"1 <= n <= 4 draws of each prompt, got n=5"):
        expected_best(torch.zeros(1, 4), 5)
    with pytest.raises(ValueError, match="beta must be positive"):
        tilt(torch.zeros(1, 4), 0.0)
    with pytest.raises(ValueError, match="1 that are not finite"):
        frontier(torch.tensor([[0.0, math.nan]]))


# ---- drawing


def test_the_best_of_a_known_law_has_the_masses_of_the_formula():
    """A reward that looks at the component alone: the best of four misses the rare one with 0.7^4."""
    policy = policy_of(TWO)
    drawn = best_of_n(
        policy, Judge(lambda x: TWO.label(x).float()), [Prompt(str(i)) for i in range(200)], 4, 20
    )
    assert drawn.rewards.shape == (200, 4)
    assert policy.forwards.sample == 200 * 4 * 20
    best = drawn.rewards.amax(1).mean().item()
    assert best == pytest.approx(1 - 0.7**4, abs=5 * math.sqrt(0.24 * 0.76 / 200) + 0.02)
    assert drawn.rewards.mean().item() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 800) + 0.02)


def test_the_best_picture_is_kept_whatever_the_batch():
    judge, prompts = Judge(lambda x: x[:, 0]), [Prompt("a"), Prompt("b"), Prompt("c")]
    kept = [best_of_n(policy_of(TWO), judge, prompts, 5, 4, batch=batch) for batch in (4, 64)]
    assert_close(kept[0].best, kept[1].best)
    for drawn in kept:
        shown = judge(outcome_of(drawn.best)).values[:, 0]
        assert_close(shown, drawn.rewards.amax(1))


def outcome_of(media: torch.Tensor) -> Outcome:
    from mmalign.testing import prompts_of

    return Outcome(prompts_of(["x"] * len(media), 1), media)


def test_a_draw_without_a_verdict_is_never_the_best():
    class Patchy(Redness):
        def __call__(self, outcome: Outcome) -> RewardSignal:
            value = outcome.prompts.member.float()[:, None]
            return RewardSignal(self.name, torch.where(value == 3, math.nan, value))

    drawn = best_of_n(policy_of(TWO), Patchy(), [Prompt("a")], 4, 2, watched=[Patchy("watched")])
    assert drawn.rewards.tolist() == [[0.0, 1.0, 2.0, -math.inf]]
    assert drawn.watched["watched"][0, :3].tolist() == [0.0, 1.0, 2.0]
    assert drawn.watched["watched"][0, 3].isnan()


# ---- a trained policy beside the curve


def test_a_policy_that_is_its_reference_has_no_divergence():
    policy = ToyFlow()
    policy.copies.save("base")
    assert path_kl(policy, "base", [Prompt("0"), Prompt("1")], 6).tolist() == [0, 0]


def test_the_divergence_of_paths_is_that_of_their_steps_added_up():
    """A velocity off by c moves the mean of a step by slope * c in each of the latent's 16 numbers."""

    class Shifted(Velocity):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, sigma, text):
            return super().forward(x, sigma, text) + self.shift

    policy, steps, shift = ToyFlow(), 5, 0.1
    policy.module = Shifted()
    policy.copies = Copies(policy.module)
    policy.copies.save("base")
    with torch.no_grad():
        policy.module.shift.fill_(shift)
    sigmas, nowhere = torch.linspace(1, 0, steps + 1), torch.zeros(steps - 1, 1)
    moved = transition(nowhere, nowhere, sigmas[:-2], sigmas[1:-1], policy.noise, sigmas[1])
    expected = (16 * (moved.slope * shift) ** 2 / (2 * moved.std**2)).sum().item()
    found = path_kl(policy, "base", [Prompt("0"), Prompt("1"), Prompt("2")], steps, batch=2)
    assert_close(found, torch.full((3,), expected, dtype=torch.float64), rtol=1e-4, atol=0)
    assert policy.forwards == Forwards()
