"""TempFlow-GRPO: branches of seeds, steps in turn, weights by noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from toys import Notes, Redness, ToyFlow, names, source

from mmalign.algorithms.tempflow_grpo import TempFlowGRPO, noise_weights
from mmalign.records import Outcome, RewardSignal, Trajectory
from mmalign.scoring import Scorer
from mmalign.sde import Noise, transition
from mmalign.trainer import Trainer, TrainingSettings

P, G, T = 2, 6, 6
FLOW = Noise("flow", 0.7)
METHOD = TempFlowGRPO(steps=T, starts=2, clip=1e-2, kl=0.0)
PAPER = {
    3: [1.660, 1.751, 1.261, 1.047, 0.919, 0.830, 0.758, 0.689, 0.607, 0.479],
    1: [2.224, 2.110, 1.407, 1.074, 0.861, 0.703, 0.574, 0.460, 0.352, 0.234],
}


def schedule(steps: int, shift: float) -> torch.Tensor:
    sigma = torch.linspace(1, 0, steps + 1)
    return shift * sigma / (1 + (shift - 1) * sigma)


def run(method: TempFlowGRPO, iterations: int = 1, run_dir=None, **settings) -> tuple[Trainer, Notes]:
    notes, given = Notes(), {"iterations": iterations, "learning_rate": 1e-2, "updates": 1, "batch": 1000}
    found = Trainer(
        ToyFlow(method.noise),
        method.build({"redness": 1.0}),
        Scorer([Redness()]),
        source(P, G),
        TrainingSettings(**{**given, **settings}),
        tracker=notes,
        run_dir=run_dir,
    )
    found.run()
    return found, notes


@pytest.mark.parametrize("shift", PAPER)
def test_the_weights_are_the_papers(shift):
    weights = noise_weights(schedule(10, shift), FLOW, range(10))
    assert_close(weights, torch.tensor(PAPER[shift]), atol=6e-4, rtol=0)
    assert weights.mean().item() == pytest.approx(1)
    assert noise_weights(schedule(10, shift), FLOW, (2, 5))[[2, 5]].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_weighed_the_scale_of_the_gradient_is_the_length_of_the_step(shift):
    """But for the first step, whose noise is bounded. The scale is |d mean / d v| / std."""
    sigmas = schedule(10, shift).double()
    zero, one = torch.zeros(10, 1).double(), torch.ones(10, 1).double()
    at = (sigmas[:-1], sigmas[1:], FLOW, sigmas[1])
    slope = (transition(zero, one, *at).mean - transition(zero, zero, *at).mean).flatten()
    scale = noise_weights(sigmas, FLOW, range(10)) * slope.abs() / transition(zero, one, *at).std.flatten()
    share = (scale / -sigmas.diff())[1:]
    assert_close(share, share[:1].expand(9), atol=0, rtol=1e-5)


def credited(method: TempFlowGRPO, values: torch.Tensor, members: int) -> torch.Tensor:
    plan, prompts, size = method.plan((1,)), names(len(values) // members, members), len(values)
    trajectory = Trajectory(
        Outcome(prompts, torch.zeros(size, 3, 2, 2)), torch.zeros(size, 1),
        torch.ones(size, 1, dtype=torch.bool), {}, plan, schedule(T, 1),
    )  # fmt: skip
    credit = replace(method.build({"r": 1.0}).credit, scale=None)
    return credit([RewardSignal("r", values[:, None])], trajectory, ToyFlow().locate).values[0, :, 0]


def test_members_of_one_start_are_compared_with_each_other_alone():
    values = torch.randn(12, generator=torch.Generator().manual_seed(0))
    found = credited(METHOD, values, 6)
    for group in (0, 6):
        for start in (0, 1):
            own = values[group:][:6][start::2]
            wanted = (own - own.mean()) / (own.std(correction=0) + 1e-4)
            assert_close(found[group:][:6][start::2], wanted)
            assert found[group:][:6][start::2].mean().abs() < 1e-6
    moved = values.clone()
    moved[1] += 10  # another start of the same prompt
    assert torch.equal(credited(METHOD, moved, 6)[0::2], found[0::2])
    together = credited(replace(METHOD, seed_grouping=False), values, 6)
    assert_close(together[:6], (values[:6] - values[:6].mean()) / (values[:6].std(correction=0) + 1e-4))


def test_a_start_with_one_branch_says_nothing():
    assert credited(replace(METHOD, starts=3), torch.randn(6), 3).abs().max() == 0


def test_steps_take_turns_over_the_iterations():
    plans = TempFlowGRPO(width=2).build({"r": 1.0}).plans
    assert [plans(i, 7)[0].sde_steps for i in range(5)] == [(0, 1), (2, 3), (4, 5), (6, 7), (0, 8)]
    one = TempFlowGRPO().build({"r": 1.0}).plans
    assert [one(i, 0)[0].sde_steps for i in range(10)] == [*((i,) for i in range(9)), (0,)]


def test_the_weight_scales_the_advantage_relative_to_the_steps_that_take_turns():
    found = Trainer(
        ToyFlow(FLOW),
        METHOD.build({"redness": 1.0}),
        Scorer([Redness()]),
        source(P, G),
        TrainingSettings(updates=1),
    )
    weights = noise_weights(torch.linspace(1, 0, T + 1), FLOW, range(T - 1))
    for iteration in range(T - 1):
        (plan,) = found.algorithm.plans(iteration, 0)
        trajectory = found.policy.sample(found.prompts.at(0), plan, (0, iteration))
        signal = [Redness()(trajectory.outcome)]
        plain = replace(found.algorithm.credit, scale=None)(signal, trajectory, found.policy.locate)
        weighed = found.algorithm.credit(signal, trajectory, found.policy.locate)
        assert_close(weighed.values, plain.values * weights[iteration])
        assert torch.equal(weighed.weight, plain.weight)


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_forwards(kl):
    found, _ = run(replace(METHOD, kl=kl), iterations=3)
    sample = sum(P * 2 * (k + 1) + P * G * (T - 1 - k) for k in range(3))
    assert found.policy.forwards.sample == sample
    assert found.policy.forwards.train == 3 * P * 2
    assert found.policy.forwards.reference == (3 * P * 2 if kl else 0)


@pytest.mark.parametrize("method", [METHOD, TempFlowGRPO(steps=T, starts=2, clip=1e-2, kl=0.01, width=2)])
def test_the_reward_rises(method):
    _, notes = run(method, iterations=25)
    scores = [m["reward/redness"] for m in notes.metrics.values()]
    assert sum(scores[-4:]) > sum(scores[:4]) + 0.4


def test_a_resumed_run_goes_on_as_it_would_have(tmp_path):
    through, _ = run(METHOD, 4)
    run(METHOD, 2, run_dir=tmp_path)
    again, _ = run(METHOD, 4, run_dir=tmp_path)
    for one, two in zip(again.learner.parameters, through.learner.parameters, strict=True):
        assert torch.equal(one, two)


def test_the_defaults_are_the_papers():
    method = TempFlowGRPO()
    algorithm = method.build({"r": 1.0})
    assert (method.steps, method.starts, method.noise, method.among) == (10, 4, FLOW, tuple(range(9)))
    assert (algorithm.credit.compare, algorithm.credit.combine) == ("start", "total_first")
    assert (algorithm.objective.low, algorithm.objective.kl) == (1e-4, 0.04)
    assert algorithm.plans(0, 0)[0].singular


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"noise\.level must be above 0"):
        TempFlowGRPO(noise=Noise("flow", 0.0))
    with pytest.raises(ValueError, match=r"width must lie in 1\.\.2"):
        TempFlowGRPO(trained=(1, 2), width=3)
    with pytest.raises(ValueError, match=r"multiple of its 4 starts, got 6"):
        run(TempFlowGRPO(steps=T))
