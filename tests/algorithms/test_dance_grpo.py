"""DanceGRPO: the subset of steps, the shared start, summed advantages, best-of-n (arXiv:2505.07818)."""

from __future__ import annotations

import pytest
import torch
from methods import G, N, assert_counts, assert_learns, assert_resumes, run
from torch.testing import assert_close
from toys import Brightness, Redness, ToyFlow, names

from mmalign.algorithms.dance_grpo import DanceGRPO
from mmalign.credit import zscore
from mmalign.records import Outcome, RewardSignal
from mmalign.sde import Noise

SMALL = DanceGRPO(steps=6, clip=1e-2, noise=Noise("dance", 0.8))


def test_the_defaults_are_the_papers():
    built = DanceGRPO().build({"r": 1.0})
    assert DanceGRPO(steps=25).trained == 14  # "14 of 25 steps"
    assert {len(built.plans(i, 0)[0].sde_steps) for i in range(20)} == {9}
    assert built.plans(0, 0)[0].share_noise
    assert built.noise == Noise("dance", 0.3)
    assert (built.objective.low, built.objective.high, built.objective.kl) == (1e-4, 1e-4, 0.0)
    assert (built.credit.combine, built.credit.normalize, built.credit.clip) == ("normalized", zscore, 5.0)
    assert built.copies == {}


def test_every_step_but_the_last_draws_noise_and_a_new_part_of_them_is_learned_from():
    plans = [SMALL.build({"r": 1.0}).plans(i, 0)[0] for i in range(150)]
    assert {plan.stochastic for plan in plans} == {(0, 1, 2, 3, 4)}
    assert len({plan.sde_steps for plan in plans}) == 10  # all threes out of five
    assert {step for plan in plans for step in plan.sde_steps} == {0, 1, 2, 3, 4}


def test_what_is_drawn_does_not_depend_on_what_is_learned_from():
    policy, plans = ToyFlow(SMALL.noise), SMALL.build({"r": 1.0}).plans
    some, others = plans(0, 0)[0], next(p for i in range(9) if (p := plans(i, 0)[0]) != plans(0, 0)[0])
    media = [policy.sample(names(2, 4), plan, (0, "test")).outcome.media for plan in (some, others)]
    assert torch.equal(*media)


def test_members_start_from_one_noise_and_groups_from_different_ones():
    plan = next(p for i in range(99) if 0 in (p := SMALL.build({"r": 1.0}).plans(i, 0)[0]).sde_steps)
    x = ToyFlow(SMALL.noise).sample(names(2, 4), plan, (0, "test")).replay["x"][:, 0]
    assert torch.equal(x[:4], x[:1].expand(4, -1, -1, -1))
    assert torch.equal(x[4:], x[4:5].expand(4, -1, -1, -1))
    assert not torch.equal(x[0], x[4])


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e3, 0.1)])
def test_each_reward_adds_unit_variance_whatever_its_scale_and_a_constant_adds_nothing(scales):
    trajectory = ToyFlow(SMALL.noise).sample(names(3, 8), SMALL.build({"r": 1.0}).plans(0, 0)[0], (0, "t"))
    draw = torch.Generator().manual_seed(0)
    signals = [
        RewardSignal(name, scale * torch.randn(24, 1, generator=draw))
        for name, scale in zip("ab", scales, strict=True)
    ]
    signals.append(RewardSignal("constant", torch.full((24, 1), 7.0)))
    credit = SMALL.build({"a": 1.0, "b": 1.0, "constant": 1.0}).credit
    found = credit(signals, trajectory, None).values[0, :, 0].reshape(3, 8)
    apart = sum(
        (v - v.mean(1, keepdim=True)) / v.std(1, keepdim=True, correction=0)
        for v in (s.values.reshape(3, 8) for s in signals[:2])
    )
    assert_close(found, apart, atol=2e-2, rtol=2e-2)  # the denominator has 1e-4 added to it
    alone = SMALL.build({"a": 1.0}).credit(signals[:1], trajectory, None).values[0, :, 0].reshape(3, 8)
    assert_close(alone.std(1, correction=0), torch.ones(3), atol=2e-2, rtol=0)


def test_a_binary_reward_on_which_a_group_agrees_has_no_gradient():
    class Passes(Redness):
        def __call__(self, outcome: Outcome) -> RewardSignal:
            return RewardSignal(self.name, torch.ones(len(outcome.prompts), 1))

    _, notes = run(SMALL, rewards=[Passes()])
    assert notes.metrics[0]["grad_norm"] == 0


def test_the_ratio_is_one_before_the_first_update():
    _, notes = run(SMALL, updates=1)
    assert notes.metrics[0]["ratio_max"] - 1 < 1e-6


@pytest.mark.parametrize("keep", [1, 3])
def test_best_of_n_learns_from_the_top_and_the_bottom_and_compares_with_all(keep):
    method = DanceGRPO(steps=6, keep=keep)
    _, notes = run(method)
    for group in {row["group"] for row in notes.rows[0]}:
        rows = sorted(
            (row for row in notes.rows[0] if row["group"] == group), key=lambda row: row["rewards"]["redness"]
        )
        assert [row["counted"] for row in rows] == [True] * keep + [False] * (G - 2 * keep) + [True] * keep
        reward = torch.tensor([row["rewards"]["redness"] for row in rows]).double()
        expected = (reward - reward.mean()) / (reward.std(correction=0) + 1e-4)  # of the full group
        assert_close(torch.tensor([row["advantage"] for row in rows]).double(), expected, atol=1e-4, rtol=0)


def test_forwards():
    steps = [SMALL.build({"r": 1.0}).plans(i, 0)[0].sde_steps for i in range(20)]
    without, with_first = (next(i for i in range(20) if (0 in steps[i]) is first) for first in (False, True))
    saved = N - N // G
    assert assert_counts(SMALL, without) == (N * 6 - saved, N * 3)
    assert assert_counts(SMALL, with_first) == (N * 6 - saved, N * 3 - saved)
    learned = 2 * 2 * N // G
    best = DanceGRPO(steps=6, keep=2)
    assert assert_counts(best, without, learned) == (N * 6 - saved, learned * 3)
    assert assert_counts(best, with_first, learned)[1] == learned * 3 - (learned - N // G)


def test_it_learns():
    assert_learns(SMALL)
    assert_learns(DanceGRPO(steps=6, clip=1e-2, noise=Noise("dance", 0.8), keep=2))


def test_two_rewards_are_raised_together():
    _, notes = run(SMALL, 30, rewards=[Redness(), Brightness()])
    for name in ("redness", "brightness"):
        scores = [metrics[f"reward/{name}"] for metrics in notes.metrics.values()]
        assert sum(scores[-3:]) > sum(scores[:3]) + 0.1


def test_it_resumes(tmp_path):
    assert_resumes(SMALL, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fraction": 0.0}, r"fraction must lie in \(0, 1\]"),
        ({"fraction": 1.1}, r"fraction must lie in \(0, 1\]"),
        ({"steps": 4, "fraction": 0.1}, "at least one of 3 steps, got 0.1"),
        ({"keep": -1}, "keep must not be negative"),
        ({"noise": Noise("dance", 0.0)}, r"noise.level must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DanceGRPO(**wrong)
