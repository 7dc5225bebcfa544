"""Pref-GRPO (arXiv:2508.20751): advantages from win rates, which are counted in tests/test_pairwise.py."""

import pytest
import torch
from torch.testing import assert_close
from toys import names
from training import GROUPS, MEMBERS, rise, trainer

from mmalign.algorithms.pref_grpo import PrefGRPO
from mmalign.records import Outcome, RewardSignal, Trajectory
from mmalign.sde import Noise

N = GROUPS * MEMBERS


class Redder:
    """Prefers the redder picture."""

    name, both_orders = "redder", True

    def prefer(self, prompts, first, second):
        red, other = ((media[:, 0] - media[:, 1]).mean((1, 2)) for media in (first, second))
        return ((red - other).sign() + 1) / 2


def advantages(rewards: str, values: list[float]) -> torch.Tensor:
    count = len(values)
    trajectory = Trajectory(
        Outcome(names(1, count), []), torch.zeros(count, 2), torch.ones(count, 2, dtype=torch.bool), {}
    )
    credit = PrefGRPO(rewards=rewards).build({"r": 1.0}).credit
    signal = RewardSignal("r", torch.tensor(values)[:, None])
    return credit([signal], trajectory, lambda where, t: torch.ones(1, 1, 2)).values[0, :, 0]


def test_the_advantage_is_the_win_rate_in_standard_deviations_of_the_group():
    rates = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0])
    wanted = (rates - 0.5) / (rates.std(correction=0) + 1e-4)
    assert_close(advantages("judge", rates.tolist()), wanted, rtol=1e-5, atol=1e-6)
    assert_close(advantages("scores", [0.101, 0.102, 0.103, 9.0]), wanted, rtol=1e-3, atol=1e-3)


def test_only_the_order_of_scores_matters():
    scores = torch.rand(6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(advantages("scores", scores.tolist()), advantages("scores", scores.exp().tolist()))


def test_a_group_of_ties_has_no_advantage():
    for rewards in ("judge", "scores"):
        assert not advantages(rewards, [0.5] * 4).any()


@pytest.mark.parametrize("shared", [True, False])
def test_forwards_are_those_of_the_formula(shared):
    found = trainer(PrefGRPO(steps=6, share_noise=shared), batch=7, reward=Redder())
    found.run()
    saved = (N - GROUPS) * shared
    counts = found.policy.forwards
    assert (counts.sample, counts.train, counts.reference) == (N * 6 - saved, N * 5 - saved, 0)


def test_the_policy_learns_from_comparisons_alone():
    class Watched(Redder):
        seen: list[float] = []  # noqa: RUF012

        def prefer(self, prompts, first, second):
            self.seen.append(float((first[:, 0] - first[:, 1]).mean()))
            return super().prefer(prompts, first, second)

    trainer(PrefGRPO(steps=5, share_noise=False, clip=1e-2), 25, reward=Watched()).run()
    part = len(Watched.seen) // 5
    assert sum(Watched.seen[-part:]) / part > sum(Watched.seen[:part]) / part + 0.15
    assert rise(PrefGRPO(steps=5, share_noise=False, clip=1e-2, rewards="scores")) > 0.2


def test_noise_is_needed():
    with pytest.raises(ValueError, match=r"noise\.level must be above 0"):
        PrefGRPO(noise=Noise("flow", 0.0))
