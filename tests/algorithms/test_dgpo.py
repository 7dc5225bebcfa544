"""DGPO against its formulas (arXiv:2510.08425)."""

from dataclasses import replace

import pytest
import torch
from free import Free, run
from torch.testing import assert_close
from toys import names
from training import GROUPS, MEMBERS, rise, trainer

from mmalign.algorithms.dgpo import DGPO
from mmalign.algorithms.diffusion_dpo import DiffusionDPO
from mmalign.copies import Ramp
from mmalign.credit import varied
from mmalign.objectives import OLD, REFERENCE
from mmalign.records import Outcome, Renoise, RewardSignal, Trajectory

N = GROUPS * MEMBERS
ADVANTAGE = torch.tensor([1.5, -0.5, -1.0, 2.0, -2.5, 0.5])  # of two groups of three


def objective(**settings):
    return DGPO(**({"clip": 0.0, "kl": 0.0, "beta": 3.0} | settings)).build({"r": 1.0}).objective


def world(by: float = 0.2) -> Free:
    policy = Free(6, times=2, groups=2, shared=True)
    policy.live.data += by * torch.randn(policy.live.shape, generator=torch.Generator().manual_seed(4))
    return policy


def naive(policy: Free, advantage: torch.Tensor, beta: float) -> torch.Tensor:
    """The loss, group by group and level by level, in the mean."""
    change = policy.errors(policy.live) - policy.errors(policy.start)
    losses = [
        -torch.nn.functional.logsigmoid(
            -beta / 3 * sum(advantage[i] * change[i, s] for i in range(6) if policy.group[i] == g)
        )
        for g in (0, 1)
        for s in (0, 1)
    ]
    return torch.stack(losses).mean()


def test_loss_and_gradient_are_those_of_the_paper_however_the_group_is_cut():
    policy, wanted = world(), world()
    loss = naive(wanted, ADVANTAGE, 3.0)
    loss.backward()
    batch = policy.batch(ADVANTAGE, torch.full((6,), 1 / 6))
    for batches in ([batch], policy.parts(batch, 1, 4, 7)):
        found, gradient, _ = run(objective(), policy, batches)
        assert_close(found, float(loss.detach()), rtol=1e-5, atol=1e-6)
        assert_close(gradient, wanted.live.grad, rtol=1e-4, atol=1e-7)


def test_at_the_reference_the_gradient_is_half_the_advantage_times_that_of_the_error():
    policy = world(0.0)
    _, gradient, measures = run(objective(), policy, [policy.batch(ADVANTAGE, torch.full((6,), 1 / 6))])
    wanted = world(0.0)
    error = wanted.errors(wanted.live)
    (0.5 * 3.0 / 3 * ADVANTAGE[:, None] * error / 4).sum().backward()
    assert_close(gradient, wanted.live.grad, rtol=1e-4, atol=1e-7)
    assert torch.equal(measures["accuracy"], torch.full_like(measures["accuracy"], 0.5))


def test_a_constant_on_all_errors_of_a_group_cancels():
    """So does the intractable constant of the likelihood."""
    policy = world()
    batch = policy.batch(ADVANTAGE, torch.full((6,), 1 / 6))
    plain = run(objective(), policy, [batch])[0]
    coupled = objective()
    shifted = replace(
        coupled, number=lambda found: coupled.number(found) + 7.0 * (policy.questions[-1][0] is None)
    )
    assert_close(run(shifted, policy, [batch])[0], plain, rtol=1e-4, atol=1e-5)


def test_two_members_are_diffusion_dpo():
    policy = Free(2, times=3, shared=True)
    policy.live.data += 0.1 * torch.randn_like(policy.live)
    batch = policy.batch(torch.tensor([1.0, -1.0]), torch.full((2,), 0.5))
    dpo = DiffusionDPO(beta=3.0).build({"r": 1.0}).objective
    for a, b in zip(run(objective(), policy, [batch])[:2], run(dpo, policy, [batch])[:2], strict=True):
        assert_close(a, b)


def test_the_clip_stops_only_those_that_have_gone_far_enough_in_their_direction():
    policy = Free(4, shared=True)
    policy.saved[OLD] = policy.start
    toward = policy.target - policy.start
    policy.live.data = policy.start + torch.tensor([0.5, -0.5, 0.5, -0.5]).reshape(4, 1, 1, 1, 1) * toward
    batch = policy.batch(torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.full((4,), 0.25))
    _, gradient, measures = run(objective(clip=0.01), policy, [batch])
    reached = gradient.flatten(1).abs().amax(1) > 0
    assert reached.tolist() == [False, True, True, False]  # a good one nearer and a bad one farther are done
    assert measures["clip_share"].tolist() == [True, False, False, True]


def test_members_without_a_verdict_neither_count_nor_move():
    policy = Free(3, shared=True)
    policy.live.data += 0.1
    weight = torch.tensor([0.5, 0.5, 0.0])
    _, gradient, _ = run(objective(), policy, [policy.batch(torch.tensor([1.0, -1.0, 9.0]), weight)])
    assert not gradient[2].any()
    pair = Free(3, shared=True)
    pair.live.data += 0.1
    change = pair.errors(pair.live) - pair.errors(pair.start)
    (-torch.nn.functional.logsigmoid(-3.0 / 2 * (change[0] - change[1]))).sum().backward()
    assert_close(gradient, pair.live.grad, rtol=1e-4, atol=1e-7)


def test_flat_groups_are_left_out():
    credit = DGPO().build({"r": 1.0}).credit
    assert credit.select is varied
    trajectory = Trajectory(
        Outcome(names(2, 3), []), torch.zeros(6, 2), torch.ones(6, 2, dtype=torch.bool), {}
    )
    signal = RewardSignal("r", torch.tensor([[0.0], [1.0], [2.0], [7.0], [7.0], [7.0]]))
    found = credit([signal], trajectory, lambda where, t: torch.ones(1, 1, 2))
    assert_close(found.weight, torch.tensor([[1 / 6] * 2] * 3 + [[0.0] * 2] * 3))
    assert found.values[0, 1, 0] == 0  # a mean member of a group that varies takes part: it counts in n


def test_the_reference_may_be_guided_and_may_be_the_average():
    policy = world()
    run(objective(kl=0.1, kl_guidance=4.5), policy, [policy.batch(ADVANTAGE)])
    assert (REFERENCE, 4.5) in policy.questions
    built = DGPO(reference="average", kl=0.0, clip=0.1).build({"r": 1.0})
    assert built.objective.against == (OLD,)
    assert built.copies == {OLD: Ramp(0.0, 0.001, 0.3)}


def test_the_average_samples_after_a_while():
    built = DGPO(live_until=3).build({"r": 1.0})
    assert [built.sampled_by(i) for i in (0, 2, 3, 9)] == [None, None, OLD, OLD]


@pytest.mark.parametrize("batch", [7, 1000])
@pytest.mark.parametrize(("clip", "kl"), [(0.0, 0.0), (0.1, 0.1)])
def test_forwards_are_those_of_the_formula(clip, kl, batch):
    found = trainer(DGPO(steps=6, renoise=Renoise(3, shared=True), clip=clip, kl=kl), batch=batch)
    found.run()
    counts = found.policy.forwards
    assert (counts.sample, counts.train) == (N * 6, N * 3)
    assert counts.reference == N * 3 * (1 + (batch == 7) + (clip > 0))


def test_the_reward_rises():
    assert rise(DGPO(steps=5)) > 0.1  # the clip keeps it slow
    assert rise(DGPO(steps=5, live_until=5, kl=0.0, clip=0.0)) > 0.1


@pytest.mark.parametrize(
    "wrong", [{"beta": 0.0}, {"clip": -1.0}, {"kl": -1.0}, {"renoise": Renoise(4)}, {"live_until": -1}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DGPO(**wrong)
