"""Samples are judged while the next are drawn, and nothing else changes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import pytest
import torch
from ranks import Brighter, Patchy
from toys import Brightness, Notes, Redness, ToyFlow, names, source

from mmalign import benchmark
from mmalign.algorithms.diffusion_nft import DiffusionNFT
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.algorithms.flow_grpo_fast import FlowGRPOFast
from mmalign.algorithms.pref_grpo import PrefGRPO
from mmalign.health import Clock
from mmalign.overlap import joined, parts_of
from mmalign.records import Outcome, Plan, RewardSignal
from mmalign.scoring import RewardError, Scorer
from mmalign.trainer import Trainer, TrainingSettings

USUAL = TrainingSettings(iterations=2, learning_rate=1e-3, updates=2, batch=1000, max_missing=0.5)
METHODS = {
    "actions": (FlowGRPO(steps=4, clip=1e-2), [Redness(), Patchy()]),
    "shared noise": (FlowGRPOFast(steps=6, clip=1e-2), [Redness(), Patchy()]),
    "noised again": (DiffusionNFT(steps=3), [Redness(), Patchy()]),
    "units with a place": (FlowGRPO(steps=4, clip=1e-2), [Brightness(by_place=True)]),
    "judge of pairs": (PrefGRPO(steps=3, clip=1e-2), [Redness(), Brighter()]),
}


def run(method, rewards, overlap, groups=4, iterations=2, **given):
    algorithm, notes = method.build({reward.name: 1.0 for reward in rewards}), Notes()
    settings = replace(USUAL, iterations=iterations, overlap=overlap)
    policy = ToyFlow(algorithm.noise, by_place=bool(getattr(rewards[0], "by_place", False)))
    found = Trainer(
        policy, algorithm, Scorer(rewards, 0.5, **given), source(groups, 4), settings, tracker=notes
    )
    found.run()
    return found, notes


@pytest.mark.filterwarnings("ignore:reward 'brightness'")
@pytest.mark.parametrize("overlap", [2, 3, 9])
@pytest.mark.parametrize("scenario", METHODS)
def test_parts_change_no_bit(scenario, overlap):
    (one, seen), (other, too) = (run(*METHODS[scenario], parts) for parts in (1, overlap))
    for mine, theirs in zip(one.learner.parameters, other.learner.parameters, strict=True):
        assert torch.equal(mine, theirs)
    assert seen.rows == too.rows
    for step, metrics in seen.metrics.items():
        for name, value in metrics.items():
            if not name.startswith(("seconds/", "share/", "memory/")):
                assert too.metrics[step][name] == value, name


def test_a_group_is_never_parted_and_order_is_kept():
    rows = parts_of(names(5, 3), 3)
    assert torch.cat(rows).tolist() == list(range(15))
    assert [len(part) for part in rows] == [6, 6, 3]
    assert len(parts_of(names(2, 3), 8)) == 2


@dataclass
class Slow:
    """Takes a while for each sample, and notes when it worked."""

    seconds: float
    name: str = "redness"
    worked: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        began = time.perf_counter()
        time.sleep(self.seconds * len(outcome.prompts))
        self.worked.append((began, time.perf_counter()))
        return Redness()(outcome)


class SlowFlow(ToyFlow):
    """Takes a while for each sample to draw."""

    def sample(self, prompts, plan, key):
        time.sleep(0.01 * len(prompts))
        return super().sample(prompts, plan, key)


@pytest.mark.parametrize(("overlap", "most"), [(1, 1.2), (4, 0.75)])
def test_only_what_was_waited_for_counts_as_reward(overlap, most):
    """Sixteen samples take .16 s to draw and .16 s to judge; of the latter a fourth is left in the end."""
    reward, notes = Slow(0.01), Notes()
    algorithm = FlowGRPO(steps=3, clip=1e-2).build({"redness": 1.0})
    settings = replace(USUAL, iterations=1, overlap=overlap)
    Trainer(
        SlowFlow(algorithm.noise), algorithm, Scorer([reward]), source(4, 4), settings, tracker=notes
    ).run()
    waited, drawn = (notes.metrics[0][f"seconds/{phase}"] for phase in ("reward", "sample"))
    assert len(reward.worked) == overlap
    assert 0.03 < waited < most * drawn


def test_a_reward_that_cannot_be_trained_on_stops_the_run_from_its_thread():
    class Wrong(Redness):
        def __call__(self, outcome):
            return torch.zeros(3)

    with pytest.raises(RewardError, match="must return a RewardSignal"):
        run(FlowGRPO(steps=3, clip=1e-2), [Wrong()], overlap=3)


def test_samples_of_different_lengths_are_refused():
    policy, plan = ToyFlow(), Plan(4, (0, 1))
    one = policy.sample(names(1, 2), plan, (0, "a"))
    other = policy.sample(names(1, 2), Plan(4, (0,)), (0, "a"))
    with pytest.raises(TypeError, match=r"training\.overlap=1"):
        joined([one, other])


def test_the_benchmark_waits_as_long_as_was_sampled(monkeypatch):
    slept = []
    monkeypatch.setattr(benchmark, "sleep", slept.append)
    monkeypatch.setattr(benchmark, "perf_counter", lambda: 0.0)
    outcome = ToyFlow().sample(names(2, 2), Plan(4), (0, "a")).outcome
    reward = benchmark.Delayed(Redness(), clock := Clock(torch.device("cpu")))
    clock.seconds = {"sample": 8.0}
    reward(outcome)
    clock.seconds = {"sample": 11.0, "reward": 8.0}  # a second plan, after the first has been judged
    reward(outcome)
    reward.pace = 0.5
    reward(outcome)
    assert slept == [8.0, 3.0, 2.0]
    assert reward.judged == 12
