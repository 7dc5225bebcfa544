"""CRD against its formulas (arXiv:2603.14128)."""

import pytest
import torch
from free import Free, run
from torch.testing import assert_close
from training import GROUPS, MEMBERS, rise, trainer

from mmalign.algorithms.crd import CRD, goodness, held_more, shares
from mmalign.copies import Ramp
from mmalign.coupling import Population
from mmalign.objectives import OLD, REFERENCE
from mmalign.records import Renoise

N = GROUPS * MEMBERS
ADVANTAGE = torch.tensor([1.5, -0.5, -1.0, 2.0, -2.5, 0.5])  # of two groups of three


def objective(**settings):
    return CRD(**({"kl": 0.0, "beta": 2.0} | settings)).build({"r": 1.0}).objective


def world(by: float = 0.2) -> Free:
    policy = Free(6, times=2, groups=2)
    policy.live.data += by * torch.randn(policy.live.shape, generator=torch.Generator().manual_seed(4))
    return policy


def even(policy: Free, advantage: torch.Tensor = ADVANTAGE):
    return policy.batch(advantage, torch.full((6,), 1 / 6))


def adaptive(policy: Free, velocity: torch.Tensor) -> torch.Tensor:
    size = (velocity.detach() - policy.target).abs().flatten(2).mean(2)
    return policy.errors(velocity) / size


def naive(policy: Free, kind: str = "mse") -> torch.Tensor:
    implicit = adaptive(policy, policy.start) - adaptive(policy, policy.live)
    good = (0.5 + ADVANTAGE / 10)[:, None].expand(6, 2)
    total = torch.zeros(())
    for rows in (slice(0, 3), slice(3, 6)):
        mine = 2.0 * (implicit[rows] - implicit[rows].detach().mean(0))
        goal = good[rows] - good[rows].mean(0)
        if kind == "mse":
            total = total + ((mine - goal) ** 2).sum()
        else:
            p = goal.sigmoid()
            total = total - (p * mine.sigmoid().log() + (1 - p) * (1 - mine.sigmoid()).log()).sum()
    return 5.0 / 2.0 * total / 12


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_loss_and_gradient_are_those_of_the_paper_however_the_group_is_cut(kind):
    policy, wanted = world(), world()
    loss = naive(wanted, kind)
    loss.backward()
    batch = even(policy)
    for batches in ([batch], policy.parts(batch, 1, 4, 7)):
        found, gradient, _ = run(objective(loss=kind), policy, batches)
        assert_close(found, float(loss.detach()), rtol=1e-4, atol=1e-5)
        assert_close(gradient, wanted.live.grad, rtol=1e-3, atol=1e-6)


def test_at_the_old_policy_the_implicit_reward_is_0():
    policy = world(0.0)
    measures = run(objective(), policy, [even(policy)])[2]
    assert not measures["implicit"].any()


def test_a_constant_of_the_prompt_on_the_rewards_changes_nothing():
    policy = world()
    found = [
        run(objective(), policy, [even(policy, ADVANTAGE + shift * (policy.group == 1))])[:2]
        for shift in (0.0, 1.0)
    ]
    assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)


def test_a_policy_whose_implicit_rewards_are_the_external_ones_has_arrived():
    """r = a / beta + a constant of the group."""
    good = goodness(ADVANTAGE.double(), 5.0)[:, None].expand(6, 2)
    error = (-good / 2.0 - torch.tensor([3.0, 3, 3, -4, -4, -4])[:, None]).requires_grad_()
    everyone = population(error, {OLD: torch.zeros(6, 2).double()})
    losses, _ = objective().loss(everyone)
    assert losses.abs().max() < 1e-12


def population(now, frozen) -> Population:
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    advantage = ADVANTAGE.double()[None, :, None].expand(1, 6, 2)
    return Population(now, frozen, advantage, torch.full((6, 2), 1 / 12).double(), group)


def weights(temperature, advantage=ADVANTAGE):
    everyone = population(torch.zeros(6, 2).double(), {})
    spread = advantage.double()[None, :, None].expand(1, 6, 2)
    return shares(goodness(spread, 5.0), spread, temperature, everyone), everyone


@pytest.mark.parametrize("temperature", [None, 0.0, 0.1, 1.0])
def test_means_are_over_each_group(temperature):
    found, everyone = weights(temperature)
    assert len(found) == (1 if temperature is None else 2)
    for share in found:
        assert_close(everyone.total(share), torch.ones_like(share))
        x = torch.randn(1, 6, 2).double()
        centered = x - everyone.total(share * x)
        assert_close(everyone.total(share * centered), torch.zeros_like(x), atol=1e-12, rtol=0)


def test_weights_of_the_means():
    good = goodness(ADVANTAGE.double(), 5.0)
    up, down = weights(0.3)[0]
    assert_close(up[0, :3, 0], torch.softmax(good[:3] / 0.3, 0))
    assert_close(down[0, 3:, 1], torch.softmax(-good[3:] / 0.3, 0))
    uniform = weights(None)[0][0]
    for share in weights(1e6)[0]:
        assert_close(share, uniform, atol=1e-6, rtol=0)
    up, down = weights(0.0)[0]
    assert_close(up[0, :, 0], torch.tensor([1, 0, 0, 0.5, 0, 0.5]).double())
    assert_close(down[0, :, 0], torch.tensor([0, 0.5, 0.5, 0, 1, 0]).double())
    flat = weights(0.0, torch.tensor([0.0, 0, 0, 1, -1, 0]))[0][0]
    assert_close(flat[0, :3, 0], torch.full((3,), 1 / 3).double())  # nobody is better: all of the group


def test_a_temperature_averages_both_directions():
    policy = world()
    found = run(objective(temperature=0.3), policy, [even(policy)])[0]
    implicit = (adaptive(policy, policy.start) - adaptive(policy, policy.live.detach())).double()
    good = goodness(ADVANTAGE.double(), 5.0)[:, None].expand(6, 2)
    total = 0.0
    for sign in (1, -1):
        for rows in (slice(0, 3), slice(3, 6)):
            p = torch.softmax(sign * good[rows] / 0.3, 0)
            gap = 2.0 * (implicit[rows] - (p * implicit[rows]).sum(0)) - good[rows] + (p * good[rows]).sum(0)
            total += 0.5 * float((gap**2).sum()) / 12
    assert_close(found, 2.5 * total, rtol=1e-4, atol=1e-5)


def test_good_samples_are_held_more():
    scale = held_more(0.1, 5.0, torch.tensor([5.0, -5.0, 0.0]))
    assert_close(0.1 * scale, torch.tensor([0.1, 1e-4, (0.1 + 1e-4) / 2]))
    policy = world()
    free = run(objective(), policy, [even(policy)])[0]
    held = run(objective(kl=0.1, kl_guidance=4.5), policy, [even(policy)])[0]
    away = (policy.live - policy.start).detach().square().flatten(2).mean(2)
    expected = float((0.1 * held_more(0.1, 5.0, ADVANTAGE)[:, None] * away).mean())
    assert_close(held - free, expected, rtol=1e-3, atol=1e-6)
    assert (REFERENCE, 4.5) in policy.questions


def test_the_copies_follow_by_the_schedules_of_the_public_recipe():
    built = CRD().build({"r": 1.0})
    assert built.copies == {
        OLD: Ramp(0.25, 0.005, 0.999),
        "sampler": Ramp(0.0, 0.0075, 0.999, 75),
        REFERENCE: 1.0,
    }
    assert built.sampler == "sampler"
    assert [built.copies[OLD](i) for i in (0, 10, 1000)] == pytest.approx([0.25, 0.3, 0.999])


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_forwards_are_those_of_the_formula(kl):
    found = trainer(CRD(steps=6, renoise=Renoise(3), kl=kl, kl_guidance=None), batch=7)
    found.run()
    counts = found.policy.forwards
    assert (counts.sample, counts.train) == (N * 6, N * 3)
    assert counts.reference == N * 3 * (2 + (kl > 0))


def test_the_reward_rises():
    assert rise(CRD(steps=5, renoise=Renoise(4), kl=0.001, kl_guidance=None)) > 0.2


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"strength": 0.0}, {"kl": -1.0}, {"temperature": -1.0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CRD(**wrong)
