"""Trust-GRPO (arXiv:2505.17018): thinking rewards that are trusted as far as they agree with the outcome."""

import math

import pytest
import torch
from torch.testing import assert_close
from toys import names
from words import Claims, trainer

from mmalign.algorithms.trust_grpo import Trust, TrustGRPO, thought, trust
from mmalign.credit import Credit, zscore
from mmalign.records import Outcome, RewardSignal, Trajectory

OPEN = TrustGRPO("t", horizon=1500.0, gate=0.0, even=(0.0, 1.0))


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def advantages(method: TrustGRPO, outcome, thinking, iteration: int = 0, alpha: float = 0.3):
    """Of one group of texts with two words each."""
    count = len(outcome)
    trajectory = Trajectory(
        Outcome(names(1, count), [""] * count), torch.zeros(count, 2), torch.ones(count, 2).bool(), {}
    )
    algorithm = method.build({"o": 1.0, "t": alpha})
    algorithm.memory.load_state_dict({"iteration": iteration})
    signals = [RewardSignal("o", column(*outcome)[:, None]), RewardSignal("t", column(*thinking)[:, None])]
    found = algorithm.credit(signals, trajectory, lambda where, t: torch.ones(1, 1, 2))
    return found.values[0, :, 0]


def test_trust_falls_where_wrong_texts_think_better():
    group = torch.zeros(4).long()
    assert_close(trust(column(1, 1, 0, 0), column(0.3, 0.5, 0.6, 0.8), group), column(*[math.exp(-0.3)] * 4))
    assert torch.equal(trust(column(1, 1, 0, 0), column(0.7, 0.7, 0.6, 0.8), group), column(*[1.0] * 4))


def test_trust_is_above_zero_and_at_most_one():
    found = trust(torch.rand(400).double(), torch.rand(400).double(), torch.arange(400) // 8)
    assert 0 < found.min() < 1
    assert found.max() == 1


def test_each_group_is_trusted_by_itself_and_one_sided_ones_wholly():
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    outcome = column(1, 0, 1, 1, 0, 0, 1, 0)
    thinking = column(0.1, 0.9, 0.1, 0.9, 0.1, 0.9, math.nan, 0.9)
    assert_close(trust(outcome, thinking, group), column(*[math.exp(-0.8)] * 2, *[1.0] * 6))


def test_a_constant_more_for_all_thinking_changes_nothing():
    outcome, thinking = [1.0, 0.7, 0.2, 0.0], [0.1, 0.3, 0.6, 0.2]
    more = [value + 0.25 for value in thinking]
    assert_close(advantages(OPEN, outcome, thinking), advantages(OPEN, outcome, more), rtol=1e-5, atol=1e-6)


def test_the_reward_is_that_of_the_formula():
    outcome, thinking = column(1.0, 0.6, 0.2, 0.0), column(0.1, 0.3, 0.6, 0.2)
    gamma = math.exp(0.2 - 0.4)
    total = outcome + gamma * 0.3 * math.exp(-600 / 1500) * thinking
    wanted = (total - total.mean()) / (total.std(correction=0) + 1e-4)
    found = advantages(OPEN, outcome.tolist(), thinking.tolist(), iteration=600)
    assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


def test_annealing():
    memory = Trust(OPEN, {"t": 0.3})
    memory.note(599, {})
    assert 0.3 * memory.annealing == pytest.approx(0.20110, abs=1e-5)


def test_in_the_end_only_the_outcome_counts():
    outcome, thinking = [1.0, 0.6, 0.2, 0.0], [0.1, 0.9, 0.6, 0.2]
    signal = RewardSignal("o", column(*outcome)[:, None])
    trajectory = Trajectory(Outcome(names(1, 4), [""] * 4), torch.zeros(4, 2), torch.ones(4, 2).bool(), {})
    alone = Credit({"o": 1.0}, zscore, "total_first", "whole")([signal], trajectory, None).values[0, :, 0]
    assert torch.equal(advantages(OPEN, outcome, thinking, iteration=100_000), alone)


def test_guards_leave_out_thinking_that_tells_nothing():
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    outcome = column(1, 0.1, 1, 1, 1, 1)
    thinking = column(0.3, 0.8, 0.95, 0.9, 0.05, 0.1)
    assert torch.equal(thought(outcome, thinking, group, 0.2, (0.1, 0.9)), column(0.3, 0, 0, 0, 0, 0))
    assert torch.equal(thought(outcome, thinking, group, 0.0, (0.0, 1.0)), thinking)


def test_a_text_that_lacks_a_verdict_is_left_out():
    found = advantages(OPEN, [1.0, math.nan, 0.0, 0.5], [0.5, 0.5, math.nan, 0.2])
    assert (found != 0).tolist() == [True, False, False, True]


def test_the_run_tells_how_far_the_judge_is_trusted():
    class Liar(Claims):
        """Scores what is false above what is true."""

        def __call__(self, outcome):
            found = super().__call__(outcome)
            return RewardSignal("liar", (1 - found.values / 8) / 2)

    class Right(Claims):
        def __call__(self, outcome):
            return RewardSignal("right", (super().__call__(outcome).values > 0).float())

    rewards = [Right(name="right"), Liar(name="liar")]
    method = TrustGRPO("liar", horizon=4, kl=0.0, even=(0.0, 1.0))
    one = trainer(method, 3, rewards, {"right": 1.0, "liar": 0.3})
    one.run()
    seen = one.tracker.metrics
    assert all(0 < seen[i]["trust/gamma"] < 1 for i in range(3))
    assert [seen[i]["trust/annealing"] for i in range(3)] == [math.exp(-i / 4) for i in range(3)]


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="thinking must name one of at least two rewards"):
        TrustGRPO("t").build({"o": 1.0})
    with pytest.raises(ValueError, match="thinking must name one of at least two rewards"):
        TrustGRPO("t").build({"o": 0.0, "t": 1.0})
    with pytest.raises(ValueError, match="horizon must be positive"):
        TrustGRPO("t", horizon=0)
