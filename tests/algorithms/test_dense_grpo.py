"""DenseGRPO: gains that add up, groups of steps, and noise levels that settle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from known import TWO, policy_of
from torch.testing import assert_close
from toys import Notes, Redness, ToyFlow, names, source

from mmalign.algorithms.dense_grpo import Calibration, DenseGRPO, gains
from mmalign.assembly import cost_of, derive
from mmalign.config import validate
from mmalign.credit import Credit, Peers, fold
from mmalign.records import Outcome, RewardSignal, Unit
from mmalign.scoring import Scorer
from mmalign.sde import Noise
from mmalign.trainer import Trainer, TrainingSettings

P, G, T = 3, 4, 5
METHOD = DenseGRPO(steps=T, clip=1e-2, kl=0.0)


def made(method: DenseGRPO = METHOD, reward: Redness | None = None, **settings: object) -> Trainer:
    given = {"iterations": 1, "learning_rate": 1e-2, "updates": 1, "batch": 1000} | settings
    return Trainer(
        ToyFlow(method.noise), method.build({"redness": 1.0}), Scorer([reward or Redness()]), source(P, G),
        TrainingSettings(**given), tracker=Notes(),
    )  # fmt: skip


def sampled(method: DenseGRPO = METHOD):
    policy, algorithm = ToyFlow(method.noise), method.build({"redness": 1.0})
    (plan,) = algorithm.plans(0, 0)
    trajectory = policy.sample(names(P, G), plan, (0, "test"))
    return policy, algorithm, trajectory, Redness()(trajectory.outcome)


def test_gains_add_up_to_the_gain_of_the_whole():
    policy, _, trajectory, signal = sampled()
    folded = fold(signal, trajectory.outcome.views, trajectory.plan)
    found = gains(folded, trajectory, Peers(trajectory.outcome.prompts))
    assert found.unit is Unit.STEP
    assert found.values.shape == (P * G, T - 1)
    chain = replace(trajectory.plan, values=False)
    final = Redness()(policy.sample(names(P, G), chain, (0, "test")).outcome).values[:, 0]
    ode = policy.sample(names(P, G), replace(chain, sde_steps=(), levels=None), (0, "test"))
    begun = Redness()(ode.outcome).values[:, 0]
    assert_close(found.values.sum(1), final - begun, atol=1e-6, rtol=0)
    assert_close(folded.values[:, -1], final)  # the value of the final state is its reward


def test_with_hardly_any_noise_no_step_gains():
    _, _, trajectory, signal = sampled(replace(METHOD, noise=Noise("flow", 1e-6)))
    folded = fold(signal, trajectory.outcome.views, trajectory.plan)
    assert gains(folded, trajectory, Peers(trajectory.outcome.prompts)).values.abs().max() < 1e-4


def test_each_step_is_compared_with_itself_in_the_group():
    policy, algorithm, trajectory, signal = sampled()
    advantage = algorithm.credit([signal], trajectory, policy.locate).values[0]
    gain = signal.values.double().reshape(P * G, T).diff(dim=1).reshape(P, G, T - 1)
    wanted = (gain - gain.mean(1, keepdim=True)) / (gain.std(1, correction=0, keepdim=True) + 1e-4)
    assert_close(advantage, wanted.reshape(P * G, T - 1).float(), atol=1e-5, rtol=1e-4)
    assert_close(advantage.reshape(P, G, -1).mean(1), torch.zeros(P, T - 1), atol=1e-5, rtol=0)


class Late(Redness):
    """Only the last two values differ between samples: earlier steps gain nothing."""

    def __call__(self, outcome: Outcome) -> RewardSignal:
        values = super().__call__(outcome).values.reshape(-1, outcome.views).clone()
        values[:, :-1] = 0.5
        return RewardSignal(self.name, values.reshape(-1, 1))


def test_steps_without_variance_are_skipped():
    whole, skipped = made(reward=Late()), made(reward=Late(), skip_idle=True)
    for run in (whole, skipped):
        run.step(0)
    assert whole.policy.forwards.train == P * G * (T - 1)
    assert skipped.policy.forwards.train == P * G
    for one, two in zip(whole.learner.parameters, skipped.learner.parameters, strict=True):
        assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_a_missing_value_costs_the_two_steps_beside_it():
    policy, algorithm, trajectory, signal = sampled()
    values = signal.values.clone().reshape(P * G, T)
    values[0, 2] = torch.nan
    found = algorithm.credit([RewardSignal("redness", values.reshape(-1, 1))], trajectory, policy.locate)
    assert (found.values[0, 0] == 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_forwards_and_verdicts(kl):
    seen = []

    class Counted(Redness):
        def __call__(self, outcome: Outcome) -> RewardSignal:
            seen.append(len(outcome.media))
            return super().__call__(outcome)

    run = made(replace(METHOD, kl=kl), Counted())
    run.step(0)
    counts = run.policy.forwards
    assert counts.sample == P * G * T * (T + 1) // 2
    assert counts.train == P * G * (T - 1)
    assert counts.reference == (counts.train if kl else 0)
    assert seen == [P * G * T]


def test_the_number_of_verdicts_is_told_before_the_run():
    raw = {"policy": {"model": "m"}, "prompts": {"file": "p.txt", "per_iteration": P, "group": G}}
    raw |= {"rewards": {"lab": 1.0}, "algorithm": {"name": "dense_grpo", "steps": T}}
    config, policy = validate(raw, "run.yaml"), policy_of(TWO)
    algorithm = config.algorithm.build({"lab": 1.0})
    told = derive(config, algorithm, policy, cost_of(config, algorithm, policy), 1, P)
    assert told["pictures judged an iteration"] == f"{T} x {P * G} = {T * P * G}"


@pytest.mark.parametrize(("start", "tolerance"), [(0.1, 0.1), (0.9, 0.1), (0.4, 0.0)])
def test_calibration_settles_where_gains_still_balance(start, tolerance):
    """On a toy where the share of gains falls with psi: 1/2 at psi = 0.3, and 0.4 at psi = 0.4."""
    calibration = Calibration(Credit({"r": 1.0}), 1, Noise("flow", start), 0.02, tolerance)
    psi = start
    for _ in range(200):
        psi = calibration.moved(psi, 0.8 - psi)
    assert psi == pytest.approx(0.3 + tolerance, rel=0.03)


def test_levels_move_with_what_was_sampled_and_are_used_next():
    run = made(iterations=2)
    first = run.algorithm.plans(0, 0)[0].levels
    run.step(0)
    (plan,) = run.algorithm.plans(1, 0)
    assert first == (0.7,) * (T - 1)
    assert all(level in (0.7 * 1.02, 0.7 * 0.98) for level in plan.levels)
    metrics = run.step(1)
    assert metrics["psi/0"] == run.algorithm.memory.levels[0]
    assert 0 <= metrics["gains/positive/0"] <= 1
    fixed = made(replace(METHOD, calibrate=0.0))
    fixed.step(0)
    assert fixed.algorithm.plans(1, 0)[0].levels == first
    assert Calibration(Credit({"r": 1.0}), 1, Noise("cps", 0.99), 0.02, 0.1).moved(0.99, 0.5) == 1.0


def test_a_resumed_run_goes_on_at_the_levels_it_had(tmp_path):
    through = made(iterations=4)
    through.run()
    for iterations in (2, 4):
        again = made(iterations=iterations)
        again.run_dir = tmp_path
        again.run()
    assert again.algorithm.memory.levels == through.algorithm.memory.levels
    assert len(set(through.algorithm.memory.levels)) > 1
    for one, two in zip(again.learner.parameters, through.learner.parameters, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, kl=0.01, calibrate=0.0)])
def test_the_reward_rises(method):
    run = made(method, iterations=20)
    run.run()
    scores = [m["reward/redness"] for m in run.tracker.metrics.values()]
    assert sum(scores[-3:]) > sum(scores[:3]) + 0.3


def test_the_defaults_are_the_papers():
    algorithm = DenseGRPO().build({"r": 1.0})
    (plan,) = algorithm.plans(0, 0)
    assert (plan.steps, plan.sde_steps, plan.values, plan.share_noise) == (10, tuple(range(9)), True, False)
    assert (algorithm.objective.low, algorithm.objective.kl) == (1e-4, 0.04)
    assert algorithm.noise == Noise("flow", 0.7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": Noise("flow", 0.0)}, r"noise\.level must be above 0"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"calibrate": 1.0}, r"calibrate must lie in \[0, 1\)"),
        ({"tolerance": 0.5}, "tolerance in"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        DenseGRPO(**given)
