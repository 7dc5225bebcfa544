"""One mechanism for windows, trees and singular actions: what is shared, what it costs, where it leads."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from toys import ToyFlow, names

from mmalign.plans import forwards, in_turn
from mmalign.records import Pick, Plan
from mmalign.rollout import siblings
from mmalign.sde import Noise
from mmalign.testing import check_policy, prompts_of

KEY = (0, "test", 3)
WINDOW = Plan(6, (1, 2), share_noise=True)
SINGULAR = Plan(7, (0, 2, 3), share_noise=True, strides=(1, 2, 3), singular=True)
SEEDED = Plan(6, (1, 3), share_noise=True, starts=2, singular=True)
TREE = Plan(7, (0, 1, 2, 3, 4, 5), share_noise=True, splits=(0, 3), correlation=1 / 17)
ORCHARD = replace(TREE, starts=2, splits=(2,), learned=(1, 2, 4))
VALUES = Plan(5, (0, 1, 2, 3), values=True)
LEVELS = Plan(5, (0, 1, 3), levels=(0.4, 0.7, 1.1), values=True, share_noise=True)
FORMS = {
    "window": WINDOW,
    "singular": SINGULAR,
    "seeded": SEEDED,
    "own starts, singular": replace(SINGULAR, share_noise=False),
    "tree": TREE,
    "trees from two starts, part learned": ORCHARD,
    "values": VALUES,
    "values of a shared start, levels": LEVELS,
    "values, strides": replace(VALUES, strides=(1, 2)),
}
forms = pytest.mark.parametrize("plan", FORMS.values(), ids=FORMS)


def picked(policy, trajectory, size=1000):
    return list(policy.picks(trajectory, torch.arange(len(trajectory)), size))


# Every form of plan


@forms
def test_the_toy_keeps_the_contract(plan):
    check_policy(ToyFlow(), prompts_of(["0", "1"], 4), plan)


@forms
def test_the_gradient_of_shared_forwards_is_that_of_each_member_alone(plan):
    policy = ToyFlow()
    trajectory = policy.sample(names(2, 4), plan, KEY)
    weight = torch.randn(trajectory.mask.shape, generator=torch.Generator().manual_seed(0))
    trained = [p for p in policy.module.parameters() if p.requires_grad]

    def gradient(picks):
        losses = [
            (policy.evaluate(trajectory, pick).log_prob * weight[pick.rows, pick.columns]).sum()
            for pick in picks
        ]
        return torch.autograd.grad(sum(losses), trained)

    row, column = trajectory.mask.nonzero(as_tuple=True)
    before = policy.forwards.train
    together = gradient(picked(policy, trajectory))
    shared = policy.forwards.train - before
    alone = gradient(Pick(r[None], c[None]) for r, c in zip(row, column, strict=True))
    assert shared == forwards(plan, *_members(2, 4))[1]
    assert shared < len(row) or not plan.share_noise
    for one, two in zip(together, alone, strict=True):
        assert_close(one, two, atol=2e-5, rtol=1e-4)


@forms
def test_a_shared_forward_gives_every_member_the_log_prob_of_its_own(plan):
    policy = ToyFlow()
    trajectory = policy.sample(names(2, 4), plan, KEY)
    for pick in picked(policy, trajectory, 3):
        together = policy.evaluate(trajectory, pick)
        for i in range(len(pick)):
            alone = policy.evaluate(trajectory, Pick(pick.rows[i : i + 1], pick.columns[i : i + 1]))
            assert_close(together.log_prob[i : i + 1], alone.log_prob, atol=1e-6, rtol=0)
            assert_close(together.mean[i : i + 1], alone.mean, atol=1e-6, rtol=0)


@forms
def test_a_sample_is_the_same_in_any_batch(plan):
    policy, prompts = ToyFlow(), names(2, 4)
    whole, views = policy.sample(prompts, plan, KEY), plan.views
    for rows in ([5], [7, 0, 2], [3, 3]):
        part = policy.sample(prompts.take(torch.tensor(rows)), plan, KEY)
        assert_close(part.log_prob, whole.log_prob[rows], atol=1e-6, rtol=0)
        media = whole.outcome.media.unflatten(0, (8, views))[rows].flatten(0, 1)
        assert_close(part.outcome.media, media, atol=1e-6, rtol=0)


@forms
def test_steps_that_are_not_actions_have_no_gradient(plan):
    """Perturbing the velocity elsewhere leaves the log-probabilities as they are."""

    class Elsewhere(ToyFlow):
        asked: list[float] = []  # noqa: RUF012

        def evaluate(self, trajectory, pick):
            self.asked += trajectory.replay["sigma"][pick.rows, pick.columns].tolist()
            return super().evaluate(trajectory, pick)

    policy = Elsewhere()
    trajectory = policy.sample(names(1, 4), plan, KEY)
    policy.asked.clear()
    for pick in picked(policy, trajectory):
        policy.evaluate(trajectory, pick)
    learned = plan.sde_steps if plan.learned is None else plan.learned
    sigmas = torch.linspace(1, 0, plan.steps + 1)
    assert sorted(set(policy.asked)) == sorted(set(sigmas[list(learned)].tolist()))


def _members(groups, members):
    prompts = names(groups, members)
    return prompts.group, prompts.member


def _sampled(plan, groups=2, members=4):
    policy = ToyFlow()
    policy.sample(names(groups, members), plan, KEY)
    return policy.forwards.sample


# The grid of completions


@settings(deadline=None)
@given(steps=st.integers(1, 30), stride=st.integers(1, 5), data=st.data())
def test_a_thinned_grid_is_the_papers(steps, stride, data):
    """In the paper k counts the steps that remain: from k - 1 to k - 2, then every stride-th, and to 0."""
    k = data.draw(st.integers(1, steps))
    remaining = [steps - place for place in Plan(steps).way(steps - k + 1, stride)]
    assert remaining[0] == k - 1
    assert remaining[-1] == 0
    assert k < 2 or k - 2 in remaining
    assert all(a > b for a, b in pairwise(remaining))
    assert all(a - b == stride for a, b in pairwise(remaining[1:-1]))


def test_completions_of_every_stride_are_those_of_the_stride_alone():
    policy, prompts = ToyFlow(), names(2, 4)
    together = policy.sample(prompts, SINGULAR, KEY).outcome.media.unflatten(0, (8, 3, 3))
    for i, stride in enumerate(SINGULAR.strides):
        alone = policy.sample(prompts, replace(SINGULAR, strides=(stride,)), KEY).outcome.media
        assert torch.equal(together[:, :, i], alone.unflatten(0, (8, 3)))


# Singular actions


def test_each_singular_action_is_that_of_a_plan_with_it_alone():
    policy, prompts = ToyFlow(), names(2, 4)
    singular = policy.sample(prompts, replace(SINGULAR, strides=(1,)), KEY)
    for column, step in enumerate(SINGULAR.sde_steps):
        alone = policy.sample(prompts, Plan(7, (step,), share_noise=True), KEY)
        assert torch.equal(singular.log_prob[:, column], alone.log_prob[:, 0])
        assert torch.equal(singular.outcome.media[column::3], alone.outcome.media)


def test_before_a_singular_step_members_are_one_and_after_it_none_are():
    replay = ToyFlow().sample(names(2, 4), SINGULAR, KEY).replay
    for group in (slice(0, 4), slice(4, 8)):
        assert all(len(replay["x"][group, c].flatten(1).unique(dim=0)) == 1 for c in range(3))
        assert all(len(replay["x_next"][group, c].flatten(1).unique(dim=0)) == 4 for c in range(3))
    assert not torch.equal(replay["x"][0], replay["x"][4])


def test_without_noise_the_completions_of_a_group_are_one(monkeypatch):
    monkeypatch.setattr(
        "mmalign.rollout.normals", lambda streams, shape, device: torch.zeros(len(streams), *shape)
    )
    media = ToyFlow().sample(names(2, 4), SINGULAR, KEY).outcome.media.unflatten(0, (2, 4, 9))
    assert torch.equal(media, media[:, :1].expand_as(media))


def test_starts_part_a_group_and_are_met_by_members_in_turn():
    x = ToyFlow().sample(names(2, 4), SEEDED, KEY).replay["x"]
    assert torch.equal(x[0], x[2])
    assert torch.equal(x[1], x[3])
    assert not torch.equal(x[0], x[1])


def test_noise_of_level_zero_is_refused():
    with pytest.raises(ValueError, match=r"noise\.level is 0, zero SDE noise"):
        ToyFlow(Noise("flow", 0.0)).sample(names(1, 4), SINGULAR, KEY)


@pytest.mark.parametrize("trained", [(0, 1, 2), (2, 5), (6,)])
@pytest.mark.parametrize("strides", [(1,), (1, 2), (2, 3), (1, 2, 3)])
def test_a_singular_plan_costs_what_its_mathematics_needs(trained, strides):
    steps, groups, members = 9, 2, 4
    plan = Plan(steps, trained, share_noise=True, strides=strides, singular=True)
    per_member = sum(
        min(2, steps - 1 - k) + sum(max(0, math.ceil((steps - 2 - k) / s) - 1) for s in strides)
        for k in trained
    )
    expected = groups * (trained[-1] + 1) + groups * members * per_member
    assert _sampled(plan) == expected
    assert forwards(plan, *_members(groups, members)) == (expected, groups * len(trained))


def test_the_papers_g2rpo_needs_128_forwards_a_candidate_where_the_public_script_makes_148():
    plan = Plan(16, tuple(range(8)), share_noise=True, strides=(1, 2), singular=True)
    sample, train = forwards(plan, *_members(1, 12))
    assert sample == 12 * 128 + 8
    assert train == 8


# Trees


def test_a_tree_has_a_node_for_every_way_taken_so_far():
    replay = ToyFlow().sample(names(2, 4), TREE, KEY).replay
    for column, nodes in enumerate([1, 2, 2, 2, 4, 4]):
        assert len(replay["state"][:, column].unique()) == 2 * nodes
        assert len(replay["x"][:4, column].flatten(1).unique(dim=0)) == nodes
    assert len(replay["x_next"][:4, -1].flatten(1).unique(dim=0)) == 4
    assert torch.equal(replay["x_next"][:, :-1], replay["x"][:, 1:])  # steps follow one another


def test_a_tree_costs_one_forward_for_every_node():
    assert _sampled(TREE) == 2 * (1 + 2 * 3 + 4 * 3)
    assert forwards(TREE, *_members(2, 4)) == (2 * 19, 2 * (1 + 2 * 3 + 4 * 2))
    assert forwards(ORCHARD, *_members(2, 4)) == (2 * (2 * 3 + 4 * 4), 2 * (2 + 2 + 4))
    paper = Plan(20, tuple(range(19)), share_noise=True, splits=(0, 3, 6, 9))
    assert forwards(paper, *_members(1, 16))[0] == 1 + 3 * 2 + 3 * 4 + 3 * 8 + 10 * 16  # 203, not 320


def test_one_way_is_no_branch():
    trunk = Plan(7, TREE.sde_steps, share_noise=True, splits=(0, 3), ways=1, correlation=1 / 17)
    policy, prompts = ToyFlow(), names(2, 1)
    one, plain = (policy.sample(prompts, plan, KEY) for plan in (trunk, Plan(7, TREE.sde_steps)))
    assert torch.equal(one.outcome.media, plain.outcome.media)
    assert torch.equal(one.log_prob, plain.log_prob)


def test_siblings_draw_standard_normal_noises_of_the_named_correlation():
    draw = torch.Generator().manual_seed(0)
    common, one, two = torch.randn(3, 400_000, generator=draw)
    for spread in (0.5, 1.0, 4.0):
        c = 1 / (1 + spread**2)
        a, b = siblings(common, one, c), siblings(common, two, c)
        assert abs(float(a.var()) - 1) < 0.01
        assert abs(float((a * b).mean()) - c) < 0.01
        assert_close(a, (common + spread * one) / math.sqrt(1 + spread**2))
    assert torch.equal(siblings(common, one, 0.0), one)


def test_the_noises_of_a_split_are_correlated_and_of_other_steps_are_not():
    prompts = names(3000, 2)
    plan = Plan(4, (0, 1), share_noise=True, splits=(0,), correlation=0.5)
    policy = ToyFlow()
    trajectory = policy.sample(prompts, plan, KEY)
    (pick,) = picked(policy, trajectory, 10**6)
    with torch.no_grad():
        now = policy.evaluate(trajectory, pick)
    z = ((trajectory.replay["x_next"][pick.rows, pick.columns] - now.mean) / now.std).reshape(3000, 2, 2, -1)
    for step, correlation in enumerate((0.5, 0.0)):
        first, second = z[:, 0, step], z[:, 1, step]
        assert abs(float((first * second).mean()) - correlation) < 0.02
        assert abs(float(first.var()) - 1) < 0.02


# Values


def test_values_are_the_ode_ends_of_every_state():
    policy, prompts = ToyFlow(), names(2, 2)
    trajectory = policy.sample(prompts, VALUES, KEY)
    media = trajectory.outcome.media.unflatten(0, (4, 5))
    assert torch.equal(media[:, 0], policy.sample(prompts, Plan(5), KEY).outcome.media)
    assert torch.equal(media[:, 4], policy.sample(prompts, replace(VALUES, values=False), KEY).outcome.media)
    for column in range(1, 4):  # an action that is never taken ends where the one before it did
        shorter = policy.sample(prompts, Plan(5, VALUES.sde_steps[:column]), KEY).outcome.media
        assert_close(media[:, column], shorter)


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_the_value_of_every_state_costs_half_the_square_of_the_steps(steps):
    plan = Plan(steps, tuple(range(steps - 1)), values=True)
    assert _sampled(plan) == 8 * steps * (steps + 1) // 2
    assert forwards(plan, *_members(2, 4)) == (8 * steps * (steps + 1) // 2, 8 * (steps - 1))
    assert plan.views == steps


def test_with_hardly_any_noise_there_is_hardly_a_gain():
    media = ToyFlow(Noise("flow", 1e-6)).sample(names(2, 2), VALUES, KEY).outcome.media.unflatten(0, (4, 5))
    assert (media - media[:, :1]).abs().max() < 1e-4
    assert (media - media[:, :1]).abs().max() > 0


def test_every_action_draws_at_its_own_level():
    policy = ToyFlow(Noise("dance", 0.3))
    trajectory = policy.sample(names(1, 4), LEVELS, KEY)
    (pick,) = picked(policy, trajectory)
    std = policy.evaluate(trajectory, pick).std.flatten()
    assert_close(std, torch.tensor(LEVELS.levels)[pick.columns] * math.sqrt(0.2))


# Costs of the engine


@pytest.mark.parametrize("start", range(4))
def test_a_shared_window_of_2_in_10_steps_at_group_24_costs_what_was_promised(start):
    """Forwards per trained sample, a backward counted as two: 10.7 over the windows of the first half."""

    def cost(plan):
        sample, train = forwards(plan, *_members(1, 24))
        return (sample + 3 * train) / 24

    windows = [Plan(10, (first, first + 1), share_noise=True) for first in range(4)]
    mean = sum(map(cost, windows)) / 4
    assert round(mean, 1) <= 10.7
    assert round(2 * mean) <= 21  # guidance doubles all of it
    assert cost(windows[start]) == pytest.approx(10 - 23 / 24 * (start + 1) + 3 * (2 - 23 / 24))
    assert (
        cost(windows[start]) < cost(replace(windows[start], share_noise=False)) - 23 / 24 * (start + 4) + 1e-9
    )
    assert cost(Plan(10, (2, 3), share_noise=True)) <= 10.7
    assert 2 * cost(Plan(10, (2, 3), share_noise=True)) <= 21


# Plans


def test_steps_take_turns():
    at = in_turn((1, 3, 4), 2, lambda steps: Plan(6, steps, singular=True))
    assert [at(i, 0)[0].sde_steps for i in range(4)] == [(1, 3), (1, 4), (3, 4), (1, 3)]
    with pytest.raises(ValueError, match=r"of 3 steps 1\.\.3 can take a turn"):
        in_turn((1, 3, 4), 4, lambda steps: Plan(6, steps))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"splits": (1,)}, "set share_noise=True"),
        ({"starts": 2}, "set share_noise=True"),
        ({"splits": (3,), "share_noise": True}, r"splits must rise and be among sde_steps=\(0, 1\)"),
        ({"learned": (2,)}, "learned must rise and be among"),
        ({"learned": ()}, "learned must name at least one action"),
        ({"levels": (0.7,)}, r"levels must be positive, one for each of \(0, 1\)"),
        ({"levels": (0.7, 0.0)}, "levels must be positive"),
        ({"correlation": 1.0}, r"correlation must lie in \[0, 1\)"),
        ({"ways": 0}, "starts and ways must be at least 1"),
        ({"singular": True, "values": True}, "singular goes with neither"),
        ({"sde_steps": (), "values": True}, "sde_steps is empty"),
    ],
)
def test_plans_that_cannot_be_followed_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"steps": 5, "sde_steps": (0, 1), **given})


def test_a_group_must_fill_its_tree():
    with pytest.raises(ValueError, match=r"prompts\.group must be 4: 2 ways at 2 splits, got 6"):
        TREE.check_group(6)
    with pytest.raises(ValueError, match=r"must be 4: 2 ways at 1 splits from 2 starts, got 8"):
        ORCHARD.check_group(8)
    with pytest.raises(ValueError, match=r"multiple of its 2 starts, got 3"):
        SEEDED.check_group(3)
    TREE.check_group(4)
    WINDOW.check_group(5)


# What it holds


def test_memory_grows_with_the_steps_by_what_is_stored_and_no_more():
    from mmalign.planning import Live

    policy, prompts = ToyFlow(), names(8, 16)

    def held(steps: int) -> tuple[int, int]:
        with Live([]) as live:
            trajectory = policy.sample(prompts, Plan(steps, tuple(range(steps - 1))), KEY)
        kept = {t.untyped_storage().data_ptr(): t.nbytes for t in trajectory.replay.values()}
        return live.peak, sum(kept.values())

    (peak, stored), (more, stored_more) = held(5), held(40)
    assert stored_more > 5 * stored
    assert more - peak < 1.1 * (stored_more - stored)
