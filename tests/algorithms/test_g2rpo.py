"""G2RPO: singular actions, several granularities, one update for each trained step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from toys import Brightness, Notes, Redness, ToyFlow, names, source

from mmalign.algorithms.flow_grpo_fast import FlowGRPOFast
from mmalign.algorithms.g2rpo import G2RPO
from mmalign.credit import Credit, zscore
from mmalign.plans import random_window
from mmalign.records import Outcome, RewardSignal, Trajectory
from mmalign.scoring import Scorer
from mmalign.sde import Noise
from mmalign.trainer import Trainer, TrainingSettings

P, G, T = 4, 6, 6
FLOW = Noise("flow", 0.7)
METHOD = G2RPO(steps=T, trained=(0, 2), strides=(1, 2), clip=1e-2)


def run(
    method: G2RPO, iterations: int = 1, algorithm=None, run_dir=None, **settings
) -> tuple[Trainer, Notes]:
    notes, given = Notes(), {"iterations": iterations, "learning_rate": 1e-2, "updates": 1, "batch": 1000}
    found = Trainer(
        ToyFlow(method.noise),
        algorithm or method.build({"redness": 1.0}),
        Scorer([Redness()]),
        source(P, G),
        TrainingSettings(**{**given, **settings}),
        tracker=notes,
        run_dir=run_dir,
    )
    found.run()
    return found, notes


def weights(found: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in found.learner.parameters])


@pytest.mark.parametrize("batch", [3, 1000])
def test_forwards(batch):
    found, notes = run(METHOD, batch=batch)
    # anchors; below k = 0: 2 shared, 3 and 1 more; below k = 2: 2 shared, 1 and 0 more
    assert found.policy.forwards.sample == P * 3 + P * G * (2 + 3 + 1 + 2 + 1 + 0)
    assert found.policy.forwards.train == P * 2
    assert notes.metrics[0]["updates"] == 2


def test_each_trained_step_has_an_update_of_its_own_and_the_first_has_ratio_one():
    _, notes = run(METHOD, learning_rate=3e-2)
    metrics = notes.metrics[0]
    assert metrics["noise_floor/max"] < 1e-6
    assert metrics["by_step/ratio/0"] == pytest.approx(1, abs=1e-6)
    assert metrics["ratio_max"] > 1.0001  # the second step is learned after the first has moved the weights
    _, together = run(replace(METHOD, apart=False), learning_rate=3e-2)
    assert together.metrics[0]["updates"] == 1
    assert together.metrics[0]["ratio_max"] == pytest.approx(1, abs=1e-6)


def test_updates_of_groups_and_of_steps_multiply():
    assert run(METHOD, updates=2)[1].metrics[0]["updates"] == 4


def test_one_step_and_one_granularity_are_flow_grpo_fast_at_that_step():
    """Of the two only the update is compared: bounds and statistics are set alike."""
    singular = replace(METHOD, trained=(2,), strides=(1,), noise=FLOW)
    fast = FlowGRPOFast(steps=T, width=1, clip=1e-2, noise=FLOW, std="group").build({"redness": 1.0})
    fast = replace(
        fast,
        plans=random_window(T, 1, range(2, 3), share_noise=True),
        credit=replace(fast.credit, normalize=singular.build({"redness": 1.0}).credit.normalize),
    )
    one, two = run(singular, iterations=3)[0], run(singular, iterations=3, algorithm=fast)[0]
    assert torch.equal(weights(one), weights(two))
    assert one.policy.forwards == two.policy.forwards


def credited(values: torch.Tensor, strides: tuple[int, ...] = (1, 2)) -> torch.Tensor:
    """The advantage [B, S] of rewards [B, S * strides], before it is bounded."""
    plan, prompts = replace(METHOD, strides=strides).plan, names(2, len(values) // 2)
    size, actions = len(values), len(plan.sde_steps)
    outcome = Outcome(prompts, torch.zeros(size * plan.views, 3, 2, 2), plan.views)
    mask = torch.ones(size, actions, dtype=torch.bool)
    trajectory = Trajectory(outcome, torch.zeros(size, actions), mask, {}, plan)
    credit = replace(METHOD.build({"r": 1.0}).credit, clip=1e9)
    return credit([RewardSignal("r", values.reshape(-1, 1))], trajectory, ToyFlow().locate).values[0]


def test_the_advantage_is_the_sum_over_granularities_of_each_ones_own_zscore():
    values = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    each = torch.stack([(v - v.mean(0)) / v.std(0, correction=0) for v in values.reshape(2, 4, 4)])
    wanted = each.reshape(8, 2, 2).sum(2)  # views are (step, stride)
    assert_close(credited(values), wanted, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), strides=st.sampled_from([(1,), (1, 2), (1, 2, 3)]))
def test_the_sum_has_mean_zero_and_at_most_the_variance_of_grids_that_agree(seed, strides):
    values = torch.randn(2 * 6, 2 * len(strides), generator=torch.Generator().manual_seed(seed))
    found = credited(values, strides).reshape(2, 6, 2)
    assert_close(found.mean(1), torch.zeros(2, 2), atol=1e-5, rtol=0)
    assert (found.var(1, correction=0) <= len(strides) ** 2 + 1e-4).all()


def test_grids_that_agree_add_up_and_grids_that_contradict_cancel():
    one = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    agree, against = torch.cat([one, one, one, one], 1), torch.cat([one, -one, one, -one], 1)
    assert_close(credited(agree), 2 * one.expand(-1, 2), atol=1e-5, rtol=0)
    assert credited(against).abs().max() == 0


def test_several_rewards_are_compared_each_and_then_added_and_bounded():
    credit = METHOD.build({"a": 1.0, "b": 0.5}).credit
    assert (credit.combine, credit.reach, credit.clip) == ("normalized", "local", 5.0)
    assert credit.normalize.func is zscore
    assert isinstance(credit, Credit)


def test_equal_rewards_leave_the_weights_alone():
    class Flat(Redness):
        def __call__(self, outcome):
            return RewardSignal(self.name, torch.full((len(outcome.media), 1), 0.7))

    found = Trainer(
        ToyFlow(FLOW), METHOD.build({"redness": 1.0}), Scorer([Flat()]), source(P, G),
        TrainingSettings(updates=1, weight_decay=0.0),
    )  # fmt: skip
    before = weights(found)
    assert found.step(0)["grad_norm"] == 0
    assert torch.equal(weights(found), before)


@pytest.mark.parametrize("method", [METHOD, G2RPO(steps=T, clip=1e-2), replace(METHOD, apart=False)])
def test_the_reward_rises(method):
    _, notes = run(method, iterations=15)
    scores = [m["reward/redness"] for m in notes.metrics.values()]
    assert sum(scores[-3:]) > sum(scores[:3]) + 0.3


def test_a_resumed_run_goes_on_as_it_would_have(tmp_path):
    through, _ = run(METHOD, 4, save_every=2)
    run(METHOD, 2, run_dir=tmp_path)
    again, _ = run(METHOD, 4, run_dir=tmp_path)
    assert torch.equal(weights(again), weights(through))
    assert again.policy.forwards == through.policy.forwards


def test_the_defaults_are_the_papers():
    algorithm = G2RPO().build({"r": 1.0})
    (plan,) = algorithm.plans(0, 0)
    assert (plan.steps, plan.sde_steps, plan.strides) == (16, tuple(range(8)), (1, 2, 3))
    assert (plan.singular, plan.share_noise, algorithm.apart) == (True, True, True)
    assert (algorithm.objective.low, algorithm.objective.kl, algorithm.noise) == (1e-4, 0.0, FLOW)
    assert algorithm.credit.normalize.keywords == {"epsilon": 1e-8}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": Noise("flow", 0.0)}, r"noise\.level must be above 0"),
        ({"strides": (1, 1)}, "strides must differ"),
        ({"trained": (15,)}, r"sde_steps must lie in 0\.\.14"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        G2RPO(**given)


def test_every_completion_is_judged():
    notes = Notes()
    Trainer(
        ToyFlow(FLOW), METHOD.build({"redness": 1.0, "brightness": 0.5}), Scorer([Redness(), Brightness()]),
        source(P, G), TrainingSettings(iterations=1, updates=1), tracker=notes,
    ).run()  # fmt: skip
    assert all(len(row["rewards"]["redness"]) == 4 for row in notes.rows[0])
    assert all(len(row["advantage"]) == 2 for row in notes.rows[0])
