"""Objectives: the clipped ratio against its formula, and the divergence in all its forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from toys import Redness, ToyFlow, names

from mmalign.credit import Credit
from mmalign.objectives import ClippedRatio, clipped_gain, conversion, divergence
from mmalign.records import Evaluation, Minibatch, Pick, Plan
from mmalign.sde import Noise, transition

PLAN = Plan(5, (0, 1, 2, 3))


def batch_of(policy: ToyFlow, rows: int = 8) -> Minibatch:
    trajectory = policy.sample(names(2, rows // 2), PLAN, (0, "test"))
    advantage = Credit({"redness": 1.0})([Redness()(trajectory.outcome)], trajectory, policy.locate)
    pick = next(policy.picks(trajectory, torch.arange(rows), 1000))
    grid = trajectory.log_prob.shape
    at = (pick.rows, pick.columns)
    return Minibatch(
        trajectory, pick, advantage.values.expand(-1, *grid)[:, *at], advantage.weight.expand(grid)[at]
    )


def shift(policy: ToyFlow, size: float = 0.05) -> None:
    with torch.no_grad():
        for i, p in enumerate(p for p in policy.module.parameters() if p.requires_grad):
            p += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))


@settings(max_examples=100, deadline=None)
@given(st.floats(-3, 3), st.floats(-5, 5), st.floats(0.001, 0.9), st.floats(0.001, 3))
def test_the_clipped_gain_is_its_formula(log_ratio, advantage, low, high):
    log, a = torch.tensor(log_ratio, dtype=torch.float64), torch.tensor(advantage, dtype=torch.float64)
    ratio = log.exp()
    assert_close(
        clipped_gain(log, a, low, high), torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    )


@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, -81.0, 81.0, 100.0, 1e4])
@pytest.mark.parametrize("advantage", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("high", [1e-5, 0.2, math.inf])
def test_no_log_ratio_is_too_far_for_a_finite_gain_and_gradient(log_ratio, advantage, high):
    log = torch.tensor(log_ratio, requires_grad=True)
    gain = clipped_gain(log, torch.tensor(advantage), 0.2, high)
    gain.backward()
    assert gain.isfinite()
    assert log.grad is not None
    assert log.grad.isfinite()


def test_a_clip_of_a_millionth_still_clips():
    log = torch.tensor([0.9e-6, 1.1e-6, -1.1e-6], requires_grad=True)
    clipped_gain(log, torch.ones(3), 1e-6, 1e-6).sum().backward()
    assert log.grad is not None
    assert log.grad.ne(0).tolist() == [True, False, True]


def test_before_the_first_update_the_ratio_is_one():
    policy = ToyFlow()
    _, measures = ClippedRatio()(policy, batch_of(policy))
    assert (measures["ratio"] - 1).abs().max() < 1e-6
    assert not measures["clip_share"].any()


def test_the_loss_is_the_formula_written_out():
    policy = ToyFlow()
    batch = batch_of(policy)
    policy.copies.save("reference")
    shift(policy)
    losses, measures = ClippedRatio(0.1, 0.3, kl=0.7)(policy, batch)
    with torch.no_grad():
        new = policy.evaluate(batch.trajectory, batch.pick)
    with torch.no_grad(), policy.copies.use("reference"):
        old = policy.evaluate(batch.trajectory, batch.pick)
    total = 0.0
    for i in range(len(batch.pick)):
        ratio, a = math.exp(new.log_prob[i] - batch.log_prob[i]), float(batch.advantage[0, i])
        kl = float(((new.mean[i] - old.mean[i]) ** 2).mean() / (2 * new.std[i].flatten()[0] ** 2))
        loss = -min(ratio * a, min(max(ratio, 0.9), 1.3) * a) + 0.7 * kl
        total += float(batch.weight[i]) * loss
    assert_close(losses.tolist(), [total], atol=1e-5, rtol=1e-4)
    assert measures["kl"].mean() > 0
    assert all(not m.requires_grad for m in measures.values())


def test_kl_has_a_gradient_and_vanishes_at_the_reference():
    policy = ToyFlow()
    batch = batch_of(policy)
    mute = Minibatch(batch.trajectory, batch.pick, torch.zeros_like(batch.advantage), batch.weight)
    policy.copies.save("reference")
    losses, _ = ClippedRatio(kl=1.0)(policy, mute)
    assert losses.abs().max() == 0
    shift(policy)
    losses, _ = ClippedRatio(kl=1.0)(policy, mute)
    losses.sum().backward()
    grads = [p.grad for p in policy.module.parameters() if p.requires_grad]
    assert all(g is not None and g.norm() > 0 for g in grads)
    # and a step against it brings the policy closer
    with torch.no_grad():
        for p in policy.module.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad
    assert ClippedRatio(kl=1.0)(policy, mute)[0].sum() < losses.sum()


def test_without_kl_the_reference_is_never_run():
    policy = ToyFlow()
    ClippedRatio()(policy, batch_of(policy))  # there is no copy to use
    assert policy.forwards.reference == 0
    policy.copies.save("reference")
    ClippedRatio(kl=0.1)(policy, batch_of(policy))
    assert policy.forwards.reference == 8 * 4


def test_rewards_kept_apart_share_one_pull_to_the_reference():
    policy = ToyFlow()
    policy.copies.save("reference")
    batch = batch_of(policy)
    shift(policy)
    three = Minibatch(batch.trajectory, batch.pick, batch.advantage.expand(3, -1) / 3, batch.weight)
    one, _ = ClippedRatio(kl=0.5)(policy, batch)
    assert_close(ClippedRatio(kl=0.5)(policy, three)[0].sum(), one.sum())


@pytest.mark.parametrize("kind", ["flow", "dance"])
@pytest.mark.parametrize(("sigma", "after"), [(0.8, 0.7), (0.5, 0.3), (0.1, 0.05)])
def test_the_forms_of_kl_differ_by_the_documented_factors(kind, sigma, after):
    noise = Noise(kind, 0.7)
    x, v = torch.randn(2, 1, 3, 4, 4).double().unbind(0)
    other = v + torch.randn_like(v)
    at = [torch.tensor([s], dtype=torch.float64) for s in (sigma, after)]
    one, two = (transition(x, velocity, *at, noise, 0.9) for velocity in (v, other))
    new = Evaluation(torch.zeros(1), one.mean, one.std, v, one.step)
    ref = Evaluation(torch.zeros(1), two.mean, two.std, other, two.step)
    exact = divergence(new, ref)
    for form in ("gaussian", "per_step", "velocity"):
        factor = conversion(form, float(one.g.flatten()[0]), sigma, sigma - after)
        assert_close(divergence(new, ref, form), factor * exact)


def test_the_kl_of_the_reference_step_of_the_literature():
    # sigma .8 to .7, a = .7 (rate 1.4): .0395414 for |dv|^2 = 1
    assert_close(1 / conversion("velocity", 1.4, 0.8, 0.1), 0.0395414, atol=1e-7, rtol=0)


def test_the_divergence_of_words_is_positive_and_right_on_average():
    torch.manual_seed(0)
    p, q = torch.randn(2, 5).log_softmax(1)
    words = torch.multinomial(p.exp(), 200_000, replacement=True)
    found = divergence(Evaluation(p[words]), Evaluation(q[words]))
    assert (found >= 0).all()
    assert_close(found.mean(), (p.exp() * (p - q)).sum(), atol=0.01, rtol=0)
    assert divergence(Evaluation(torch.zeros(1)), Evaluation(torch.tensor([200.0]))).isfinite().all()
    with pytest.raises(TypeError, match="Gaussian"):
        divergence(Evaluation(p), Evaluation(q), "velocity")


def test_places_have_ratios_of_their_own():
    policy = ToyFlow(by_place=True)
    trajectory = policy.sample(names(1, 2), PLAN, (0, "test"))
    policy.copies.save("reference")
    shift(policy)
    advantage, weight = torch.zeros(1, 1, 2, 2), torch.full((1, 2, 2), 0.25)
    advantage[0, 0, 0, 1] = 1
    batch = Minibatch(trajectory, Pick(torch.tensor([0]), torch.tensor([2])), advantage, weight)
    losses, measures = ClippedRatio(10.0, 10.0)(policy, batch)
    assert measures["ratio"].shape == (1, 2, 2)
    assert_close(losses[0], -0.25 * measures["ratio"][0, 0, 1])
    kl, measures = ClippedRatio(kl=1.0)(policy, Minibatch(trajectory, batch.pick, 0 * advantage, weight))
    assert_close(kl[0], measures["kl"][0, 0, 0])


@pytest.mark.parametrize("wrong", [{"low": 0.0}, {"high": -1.0}, {"kl": -0.1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        ClippedRatio(**wrong)
