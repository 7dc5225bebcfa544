"""Credit: numbers one can check by hand, and the laws that must hold for any rewards."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from toys import ToyFlow, names, source

from mmalign.credit import (
    Credit,
    Peers,
    center,
    fold,
    leave_one_out,
    outermost,
    per_action,
    per_sample,
    rank,
    zscore,
    zscore_batch,
)
from mmalign.records import (
    Masks,
    Outcome,
    Prompts,
    RewardSignal,
    Spans,
    Steps,
    Trajectory,
    Unit,
)

EVERY = (center, zscore, zscore_batch, leave_one_out, rank)
TRUE = torch.tensor(True)


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def trajectory(prompts: Prompts, steps: int = 3, sites: tuple[int, ...] = ()) -> Trajectory:
    """One without a policy: credit asks for no more."""
    size = len(prompts)
    mask = torch.ones(size, steps, dtype=torch.bool)
    return Trajectory(
        Outcome(prompts, torch.zeros(size, 3, 2, 2)), torch.zeros(size, steps, *sites), mask, {}
    )


def locate(where: object, trajectory: Trajectory) -> Tensor:
    return ToyFlow(by_place=True).locate(where, trajectory)  # type: ignore[arg-type]


def credited(values: Tensor, credit: Credit | None = None, groups: int = 2, **signal: object) -> Tensor:
    prompts = names(groups, len(values) // groups)
    found = (credit or Credit({"r": 1.0}))([RewardSignal("r", values, **signal)], trajectory(prompts), locate)  # type: ignore[arg-type]
    return found.values


# Normalizing


def test_the_normalizations_of_two_groups_by_hand():
    values, group = column(1, 3, 10, 10), torch.tensor([0, 0, 7, 7])
    valid = torch.ones_like(values, dtype=torch.bool)
    none = {"epsilon": 0.0}
    assert center(values, valid, group, True).flatten().tolist() == [-1, 1, 0, 0]
    assert leave_one_out(values, valid, group, True).flatten().tolist() == [-2, 2, 0, 0]
    assert rank(values, valid, group, True).flatten().tolist() == [-1, 1, 0, 0]
    # biased std of (1, 3) is 1, unbiased sqrt 2; of the batch (1, 3, 10, 10) they are sqrt 16.5 and sqrt 22
    assert_close(zscore(values, valid, torch.tensor([0, 0, 0, 0]), True, **none)[0, 0].item(), -5 / 16.5**0.5)
    assert zscore(values, valid, group, True).flatten()[1].item() == 1 / 1.0001
    assert_close(zscore(values, valid, group, True, unbiased=True, **none)[1, 0].item(), 2**-0.5)
    assert_close(zscore_batch(values, valid, group, True, **none)[1, 0].item(), 16.5**-0.5)
    assert_close(zscore_batch(values, valid, group, True, unbiased=True, **none)[1, 0].item(), 22**-0.5)


def test_ranks_share_ties():
    values = column(5, 1, 5, 9)
    found = rank(values, torch.ones_like(values, dtype=torch.bool), torch.zeros(4, dtype=torch.int64), True)
    assert_close(found.flatten(), torch.tensor([0.0, -1.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("normalize", EVERY)
@pytest.mark.parametrize("value", [0.1, 1e8 + 0.3, -7.7])
def test_equal_members_get_exactly_nothing(normalize, value):
    values = column(*[value] * 7, 1.0, 2.0)
    group = torch.tensor([0] * 7 + [1, 1])
    found = normalize(values, torch.ones_like(values, dtype=torch.bool), group, True)
    assert (found[:7] == 0).all()
    assert (found[7:] != 0).all()


def test_aligned_units_are_compared_one_to_one_and_others_with_all():
    values = torch.tensor([[0.0, 10.0], [2.0, 30.0]])
    valid, group = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    assert center(values, valid, group, True).tolist() == [[-1, -10], [1, 10]]
    assert center(values, valid, group, False).tolist() == [[-10.5, -0.5], [-8.5, 19.5]]
    assert_close(rank(values, valid, group, False).flatten().tolist(), [-1.0, 1 / 3, -1 / 3, 1.0])


units = st.integers(1, 4)


@st.composite
def batches(draw: st.DrawFn, width: st.SearchStrategy[int] = units) -> tuple[Tensor, Tensor, Tensor]:
    """Values with gaps, in groups whose members lie anywhere."""
    size, columns = draw(st.integers(2, 12)), draw(width)
    numbers = st.floats(-50, 50, allow_nan=False, width=32)
    values = torch.tensor([[draw(numbers) for _ in range(columns)] for _ in range(size)])
    valid = torch.tensor([[draw(st.booleans()) for _ in range(columns)] for _ in range(size)])
    group = torch.tensor([draw(st.sampled_from([0, 5, 2**40, 2**62])) for _ in range(size)])
    return values, valid, group


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(EVERY), st.booleans(), st.floats(-1e6, 1e6))
def test_what_has_no_verdict_changes_nothing_and_gets_nothing(batch, normalize, aligned, junk):
    values, valid, group = batch
    one = normalize(torch.where(valid, values, 0.0), valid, group, aligned)
    two = normalize(torch.where(valid, values, junk), valid, group, aligned)
    assert torch.equal(one, two)
    assert (one[~valid] == 0).all()
    assert one.dtype == torch.float64
    assert one.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(EVERY), st.booleans(), st.randoms())
def test_reordering_samples_reorders_credit(batch, normalize, aligned, random):
    values, valid, group = batch
    order = torch.tensor(random.sample(range(len(values)), len(values)))
    moved = normalize(values[order], valid[order], group[order], aligned)
    assert_close(moved, normalize(values, valid, group, aligned)[order], atol=1e-9, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from((center, zscore, zscore_batch, leave_one_out, rank)))
def test_a_group_as_a_whole_gets_nothing(batch, normalize):
    values, valid, group = batch
    found = normalize(values, valid, group, True)
    for one in group.unique():
        assert_close(found[group == one].sum(0), torch.zeros(values.shape[1]).double(), atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(batches(st.just(1)), st.floats(-100, 100), st.floats(0.1, 10))
def test_zscores_ignore_shift_and_scale(batch, shift, scale):
    values, valid, group = batch
    values = values.double().round(decimals=2)
    for normalize in (partial(zscore, epsilon=0.0), partial(zscore_batch, epsilon=0.0)):
        found = torch.nan_to_num(normalize(values, valid, group, True))
        moved = torch.nan_to_num(normalize((values + shift) * scale, valid, group, True))
        assert_close(moved, found, atol=1e-6, rtol=1e-6)


# The algebra


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_units_that_speak_about_everything_equal_their_sum(seed, columns):
    values = torch.randn(8, columns, generator=torch.Generator().manual_seed(seed))
    credit = Credit({"r": 1.0}, center, clip=1e9)
    apart = credited(values, credit, unit=Unit.CRITERION)
    assert_close(apart, credited(values.sum(1, keepdim=True), credit))


def test_permuting_samples_permutes_credit_and_weight():
    prompts = names(2, 4)
    values = torch.arange(8.0)[:, None] ** 2
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    credit = Credit({"r": 1.0})
    one = credit([RewardSignal("r", values)], trajectory(prompts), locate)
    two = credit([RewardSignal("r", values[order])], trajectory(prompts.take(order)), locate)
    assert torch.equal(two.values, one.values[:, order])
    assert torch.equal(two.weight, one.weight[order])


@pytest.mark.parametrize("weigh", [per_sample, per_action])
@pytest.mark.parametrize("sites", [(), (2, 2)])
def test_weights_sum_to_one_over_each_update(weigh, sites):
    prompts = names(4, 3)
    ragged = trajectory(prompts, 3, sites)
    ragged.mask[0, 1:] = False
    valid = torch.ones(12, 1, dtype=torch.bool)
    valid[4] = False
    part = prompts.group // 2
    credit = Credit({"r": 1.0}, weigh=weigh)
    found = credit([RewardSignal("r", torch.randn(12, 1), valid=valid)], ragged, locate, None, part)
    weight = found.weight.expand(12, 3, *sites)
    for number in (0, 1):
        assert_close(weight[part == number].sum(), torch.tensor(1.0))
    assert (weight[4] == 0).all()
    assert (weight[0, 1:] == 0).all()
    per = weight[0].sum() / weight[1].sum()
    assert_close(per, torch.tensor(1.0 if weigh is per_sample else 1 / 3))


# Combining


def two(credit: Credit, first: Tensor, second: Tensor, **valid: Tensor | None) -> Tensor:
    signals = [
        RewardSignal("a", first, valid=valid.get("first")),
        RewardSignal("b", second, valid=valid.get("second")),
    ]
    return credit(signals, trajectory(names(1, len(first))), locate).values[:, :, 0]


def test_a_total_is_normalized_once_and_rewards_apart_each():
    big, small = column(0, 100, 200), column(1, 0, 1)
    weights = {"a": 1.0, "b": 2.0}
    total = two(Credit(weights, center, "total_first", clip=1e9), big, small)
    assert_close(total, torch.tensor([[0.0, 98.0, 200.0]]) + 2 - (298 + 6) / 3)
    each = two(Credit(weights, zscore, clip=1e9), big, small)
    kept = two(Credit(weights, zscore, "apart", clip=1e9), big, small)
    assert kept.shape == (2, 3)
    assert_close(kept.sum(0, keepdim=True), each)
    assert_close(kept[1].abs().max().item(), 2 * 2**0.5, atol=1e-3, rtol=0)


def test_a_sample_that_lacks_a_needed_reward_is_missing_as_a_whole():
    valid = torch.tensor([[True], [True], [False]])
    prompts = names(1, 3)
    signals = [RewardSignal("a", column(1, 2, 3)), RewardSignal("b", column(0, 0, 9), valid=valid)]
    found = Credit({"a": 1.0, "b": 1.0}, center, "total_first")(signals, trajectory(prompts), locate)
    assert found.values[0, :, 0].tolist() == [-0.5, 0.5, 0]
    assert found.weight[:, 0].gt(0).tolist() == [True, True, False]
    watched = Credit({"a": 1.0, "b": 0.0}, center, "total_first")(signals, trajectory(prompts), locate)
    assert watched.values[0, :, 0].tolist() == [-1, 0, 1]


def test_a_criterion_that_applies_to_nobody_in_the_group_is_not_missing():
    valid = torch.tensor([[True, False], [True, False], [True, True], [True, False]])
    values = torch.tensor([[1.0, 0], [2, 0], [3, 1], [4, 0]])
    signal = RewardSignal("r", values, Unit.CRITERION, valid)
    found = Credit({"r": 1.0}, center, "total_first")([signal], trajectory(names(2, 2)), locate)
    assert found.weight[:, 0].gt(0).tolist() == [True, True, True, False]


def test_nan_is_no_verdict():
    found = credited(column(1, 2, float("nan"), 4), Credit({"r": 1.0}, center), groups=1)
    assert_close(found[0, :, 0], torch.tensor([-4 / 3, -1 / 3, 0, 5 / 3]))


def test_credit_is_clipped_at_both_ends():
    found = credited(column(*[0] * 99, 1), Credit({"r": 1.0}, clip=5.0), groups=1)
    assert found.max().item() == 5.0
    assert credited(column(*[0] * 99, -1), Credit({"r": 1.0}, clip=5.0), groups=1).min().item() == -5.0


# Reaching


def test_reach_of_a_step():
    index = torch.tensor([[1], [1]])
    values = column(-1, 1)

    def reached(reach: str) -> list[float]:
        credit = Credit({"r": 1.0}, center, reach=reach)  # type: ignore[arg-type]
        return credited(values, credit, groups=1, unit=Unit.STEP, where=Steps(index))[0, 1].tolist()

    assert reached("local") == [0, 1, 0]
    assert reached("upstream") == [1, 1, 0]
    assert credited(
        values, Credit({"r": 1.0}, center, reach="whole"), groups=1, where=Steps(index)
    ).shape == (1, 2, 1)


def test_places_reach_their_own_place():
    mask = torch.eye(4).reshape(1, 4, 1, 2, 2).expand(2, -1, -1, -1, -1)
    signal = RewardSignal("r", torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0]]), Unit.REGION, where=Masks(mask))
    grid = trajectory(names(1, 2), 3, (2, 2))
    found = Credit({"r": 1.0}, center)([signal], grid, locate).values.expand(1, 2, 3, 2, 2)
    assert_close(found[0, 0, 2], torch.tensor([[1.0, 2.0], [3.0, 4.0]]) - 1.25)


def test_where_a_policy_cannot_place_a_unit_only_the_whole_reach_works():
    spans = Spans(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="Spans"):
        credited(column(0, 1), Credit({"r": 1.0}, reach="local"), groups=1, where=spans)
    credited(column(0, 1), Credit({"r": 1.0}, reach="whole"), groups=1, where=spans)


# Peers on other ranks


def split(
    prompts: Prompts, values: Tensor, rows: list[list[int]], credit: Credit
) -> list[tuple[Tensor, Tensor]]:
    """Credit of each rank, with all of them in this process: gathering hands out what they would send."""
    ranks = [torch.tensor(r) for r in rows]
    order = torch.cat(ranks)

    class Told(Peers):
        def __init__(self, mine: Prompts) -> None:
            super().__init__(mine, lambda _: torch.stack([prompts.group, prompts.member], 1)[order])
            self.told: list[Tensor] = []

    found = []
    for own in ranks:
        peers = Told(prompts.take(own))
        whole = trajectory(prompts)
        answers = iter(
            [
                values.double()[order],
                torch.ones(len(order), values.shape[1], dtype=torch.int64),
                torch.zeros(len(order), 3, dtype=torch.int64),
                credit.weigh(whole)[order],
            ]
        )
        peers._gather = lambda _, answers=answers: next(answers)  # type: ignore[misc]
        one = credit([RewardSignal("r", values[own])], trajectory(prompts.take(own)), locate, peers)
        found.append((one.values, one.weight))
    return found


@pytest.mark.parametrize("normalize", EVERY)
@pytest.mark.parametrize("rows", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[6, 0, 3], [1, 7, 4], [5, 2]]])
def test_credit_is_the_same_to_the_bit_wherever_members_live(normalize, rows):
    prompts, values = names(2, 4), torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    credit = Credit({"r": 1.0}, normalize)
    one = credit([RewardSignal("r", values)], trajectory(prompts), locate)
    for own, (found, weight) in zip(rows, split(prompts, values, rows, credit), strict=True):
        assert torch.equal(found, one.values[:, own])
        assert torch.equal(weight, one.weight[own])


def test_large_group_numbers_stay_apart():
    prompts = source().at(0)
    far = Prompts(prompts.text, prompts.group + 2**62, prompts.member, prompts.extra)
    peers = Peers(far)
    assert peers.group.dtype == torch.int64
    assert len(peers.group.unique()) == 4
    neighbours = Prompts(
        ["0"] * 4, torch.tensor([2**53, 2**53, 2**53 + 1, 2**53 + 1]), torch.tensor([0, 1, 0, 1]), [{}] * 4
    )
    found = Credit({"r": 1.0}, center)(
        [RewardSignal("r", column(0, 2, 10, 14))], trajectory(neighbours), locate
    )
    assert found.values[0, :, 0].tolist() == [-1, 1, -2, 2]


def test_a_name_given_twice_is_an_error():
    prompts = replace(names(1, 2), member=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="both member 1 of group 0"):
        Peers(prompts)


# Completions and errors


def test_completions_become_units_of_one_sample():
    signal = RewardSignal("r", column(1, 2, 3, 4, 5, 6))
    folded = fold(signal, 3)
    assert folded.values.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert folded.unit is Unit.COMPLETION
    with pytest.raises(ValueError, match="not by one per token"):
        fold(replace(signal, unit=Unit.TOKEN), 3)


def test_rewards_and_weights_must_have_the_same_names():
    with pytest.raises(ValueError, match=r"\['x'\]"):
        credited(column(1, 2), Credit({"r": 1.0, "x": 1.0}), groups=1)
    with pytest.raises(ValueError, match="weight other than 0"):
        credited(column(1, 2), Credit({"r": 0.0}), groups=1)


def test_the_best_and_the_worst_of_each_group_are_chosen_exactly():
    score = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 0.0, 9.0, 7.0, 8.0])
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1])
    counted = torch.tensor([True, True, True, True, True, False, True, True, True])
    chosen = outermost(score, counted, group, 1)
    assert chosen.tolist() == [False, True, False, True, False, False, True, True, False]
    two = outermost(score, counted, group, 2)
    assert two.tolist() == [False, True, True, True, True, False, True, True, True]
    assert torch.equal(outermost(score, counted, group, 9), counted)


def test_equal_scores_still_leave_as_many_as_were_asked_for():
    chosen = outermost(torch.zeros(6), torch.ones(6, dtype=torch.bool), torch.zeros(6).long(), 2)
    assert chosen.tolist() == [True, True, False, False, True, True]
