"""Flow-DPPO: the mask and its truth table, and its limits (arXiv:2606.11025)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from methods import N, assert_counts, assert_learns, assert_resumes, run, trainer
from torch.testing import assert_close
from toys import ToyFlow, names

from mmalign.algorithms.flow_dppo import FlowDPPO, MaskedRatio, leads_farther
from mmalign.records import Minibatch, Plan
from mmalign.sde import Noise

SMALL = FlowDPPO(steps=6, actions=2, noise=Noise("flow", 0.8))
PLAN = Plan(5, (0, 1, 2, 3))


def moved(size: float = 0.2) -> tuple[ToyFlow, Minibatch]:
    """A toy that has moved since it sampled, and its actions with advantages of both signs."""
    policy = ToyFlow(Noise("flow", 0.8))
    trajectory = policy.sample(names(2, 4), PLAN, (0, "t"))
    pick = next(policy.picks(trajectory, torch.arange(8), 100))
    advantage = torch.tensor([1.0, -1.0]).repeat(16)[None]
    with torch.no_grad():
        policy.module.last += size * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    return policy, Minibatch(trajectory, pick, advantage, torch.full((32,), 1 / 32))


def gradient(policy: ToyFlow, batch: Minibatch, objective: MaskedRatio) -> torch.Tensor:
    policy.module.zero_grad()
    objective(policy, batch)[0].sum().backward()
    return policy.module.last.grad.clone()


def test_the_truth_table():
    for sign, side, far in product((1.0, -1.0), (0.1, -0.1), (True, False)):
        masked = far and bool(leads_farther(torch.tensor([side]), torch.tensor([[sign]])))
        assert masked == (far and sign * side > 0)
    assert not leads_farther(torch.tensor([0.1, 0.0]), torch.tensor([[0.0, 1.0]])).any()


def test_the_loss_is_the_formula_written_out_and_every_case_occurs():
    policy, batch = moved()
    with torch.no_grad():
        new = policy.evaluate(batch.trajectory, batch.pick)
    far = [
        float(((new.mean[i] - new.drawn.mean[i]) ** 2).mean() / (2 * new.std[i].flatten()[0] ** 2))
        for i in range(32)
    ]
    delta, total, cases = sum(sorted(far)[15:17]) / 2, 0.0, set()
    for i in range(32):
        ratio, a = math.exp(new.log_prob[i] - batch.log_prob[i]), float(batch.advantage[0, i])
        masked = far[i] > delta and ((a > 0 and ratio > 1) or (a < 0 and ratio < 1))
        cases.add((a > 0, ratio > 1, far[i] > delta))
        total -= 0.0 if masked else ratio * a / 32
    losses, measures = MaskedRatio(delta)(policy, batch)
    assert_close(losses, torch.tensor([total]), atol=1e-5, rtol=1e-4)
    assert len(cases) == 8
    assert_close(measures["divergence"], torch.tensor(far), atol=1e-7, rtol=1e-4)
    assert 0 < measures["masked_share"].float().mean() < 1


def test_an_update_that_leads_back_keeps_its_gradient():
    policy, batch = moved()
    with torch.no_grad():
        back = -(policy.evaluate(batch.trajectory, batch.pick).log_prob - batch.log_prob).sign()
    corrective = replace(batch, advantage=back[None])
    free = gradient(policy, corrective, MaskedRatio(1e9))
    assert free.norm() > 0
    assert torch.equal(gradient(policy, corrective, MaskedRatio(1e-12)), free)
    assert gradient(policy, replace(batch, advantage=-back[None]), MaskedRatio(1e-12)).norm() == 0


def test_without_a_bound_it_is_the_importance_weighted_policy_gradient():
    policy, batch = moved()
    found = gradient(policy, batch, MaskedRatio(math.inf))
    policy.module.zero_grad()
    ratio = (policy.evaluate(batch.trajectory, batch.pick).log_prob - batch.log_prob).exp()
    (-(ratio * batch.advantage[0]).mean()).backward()
    assert_close(found, policy.module.last.grad)


def test_the_divergence_by_means_is_that_by_velocities_and_its_sum_is_n_times_as_large():
    policy, batch = moved()
    with torch.no_grad():
        new = policy.evaluate(batch.trajectory, batch.pick)
        sampled = ToyFlow(Noise("flow", 0.8)).evaluate(batch.trajectory, batch.pick)
    _, measures = MaskedRatio(1.0)(policy, batch)
    sigma = batch.trajectory.replay["sigma"][batch.pick.rows, batch.pick.columns]
    g = 0.8 * (sigma / (1 - torch.where(sigma == 1, 0.8, sigma))).sqrt()
    factor = 0.2 / 2 * (g * (1 - sigma) / (2 * sigma) + 1 / g) ** 2
    by_velocity = factor * ((new.velocity - sampled.velocity) ** 2).mean((1, 2, 3))
    assert_close(measures["divergence"], by_velocity, atol=1e-6, rtol=1e-3)
    total = ((new.mean - new.drawn.mean) ** 2 / (2 * new.std**2)).sum((1, 2, 3))
    assert_close(total, 16 * measures["divergence"])


def test_in_the_first_update_nothing_is_far_and_nothing_is_masked():
    metrics = run(SMALL, updates=1)[1].metrics[0]
    assert metrics["divergence_max"] < 1e-9
    assert metrics["masked_share"] == 0
    assert metrics["ratio_max"] - 1 < 1e-6


def test_later_updates_are_masked_where_they_are_too_far():
    assert run(replace(SMALL, delta=1e-9), updates=4)[1].metrics[0]["masked_share"] > 0.1


def test_actions_are_in_the_first_half_and_the_rest_follows_the_ode():
    plans = [FlowDPPO().build({"r": 1.0}).plans(i, 0)[0] for i in range(40)]
    assert {len(plan.sde_steps) for plan in plans} == {3}
    assert {step for plan in plans for step in plan.sde_steps} == {0, 1, 2, 3, 4}
    assert {plan.noisy for plan in plans} == {()}


def test_forwards():
    assert assert_counts(SMALL) == (N * 6, N * 2)
    shared = replace(SMALL, share_noise=True)
    first = trainer(shared)[0].algorithm.plans(0, 0)[0].sde_steps[0]
    saved = N - N // 8
    assert assert_counts(shared) == (N * 6 - saved * (first + 1), N * 2 - saved)
    pulled = run(replace(SMALL, kl=0.1))[0].policy.forwards
    assert pulled.reference == pulled.train


@pytest.mark.parametrize("more", [{}, {"noise": Noise("cps", 0.8)}, {"kl": 0.001, "share_noise": True}])
def test_it_learns(more):
    assert_learns(replace(SMALL, delta=1e-2, **more), 0.2)


def test_it_resumes(tmp_path):
    assert_resumes(replace(SMALL, kl=0.1), tmp_path)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"noise\.level must be above 0"):
        FlowDPPO(noise=Noise("flow", 0.0))
    with pytest.raises(ValueError, match=r"actions must lie in 1..5"):
        FlowDPPO(actions=6)
    for wrong in ({"delta": 0.0}, {"delta": 1.0, "kl": -1.0}):
        with pytest.raises(ValueError, match="got"):
            MaskedRatio(**wrong)
