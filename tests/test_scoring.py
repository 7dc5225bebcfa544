"""Scoring: failures are missing verdicts with reasons, wrong shapes are errors, too many stop the run."""

from __future__ import annotations

import math
import threading
import time
import warnings

import pytest
import torch
from torch import Tensor
from toys import Brightness, Redness, names

from mmalign.credit import Peers
from mmalign.records import Masks, Outcome, RewardSignal, Unit
from mmalign.scoring import RewardError, Scorer, judge, summarize


def outcome(groups: int = 2, members: int = 3, views: int = 1) -> Outcome:
    prompts = names(groups, members)
    pictures = torch.rand(len(prompts) * views, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return Outcome(prompts, pictures, views)


class Odd:
    """Does to each batch what it is told."""

    name = "odd"

    def __init__(self, act) -> None:
        self.act, self.calls = act, 0

    def __call__(self, outcome: Outcome) -> RewardSignal:
        self.calls += 1
        return self.act(outcome)


def means(outcome: Outcome) -> Tensor:
    return outcome.media.mean((1, 2, 3))[:, None]


def first_missing(outcome: Outcome, count: int) -> RewardSignal:
    rows = torch.arange(len(outcome.prompts))[:, None]
    return RewardSignal("odd", torch.where(rows < count, torch.nan, means(outcome)))


def test_nan_is_missing_and_the_run_goes_on():
    def act(outcome):
        return RewardSignal("odd", torch.where(torch.arange(6)[:, None] == 2, float("nan"), means(outcome)))

    with pytest.warns(RuntimeWarning, match="no verdict for 1 of 6 samples"):
        scores = Scorer([Odd(act)])(outcome())
    assert scores.signals[0].valid.flatten().tolist() == [True, True, False, True, True, True]
    assert sum(scores.reasons["odd"].values()) == 1


def test_one_bad_sample_costs_one_verdict():
    def act(outcome):
        if any(g == 1 and m == 2 for g, m in zip(outcome.prompts.group, outcome.prompts.member, strict=True)):
            raise OSError("no route to judge")
        return RewardSignal("odd", means(outcome), details=[{"x": 1}] * len(outcome.prompts))

    with pytest.warns(RuntimeWarning, match="OSError: no route to judge"):
        scores = Scorer([Odd(act)])(outcome())
    (signal,) = scores.signals
    assert signal.valid.flatten().tolist() == [True] * 5 + [False]
    assert torch.equal(signal.values[:5], means(outcome())[:5])
    assert signal.details == [{"x": 1}] * 5 + [{}]
    assert scores.reasons["odd"] == {"OSError: no route to judge": 1}


def test_the_same_failure_is_warned_of_once():
    scorer = Scorer([Odd(lambda o: first_missing(o, 1))])
    with pytest.warns(RuntimeWarning):
        scorer(outcome())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer(outcome())


def test_units_with_places_survive_a_sample_that_fails():
    place = Brightness(by_place=True)

    def act(outcome):
        if len(outcome.prompts) > 1 or int(outcome.prompts.member[0]) == 0:
            raise ValueError("no")
        signal = place(outcome)
        return RewardSignal("odd", signal.values, signal.unit, where=signal.where)

    signal, reasons = judge(Odd(act), outcome())
    assert signal.values.shape == (6, 4)
    assert signal.unit is Unit.REGION
    assert isinstance(signal.where, Masks)
    assert signal.where.mask.shape == (6, 4, 1, 2, 2)
    assert signal.valid.all(1).tolist() == [False, True, True] * 2
    assert reasons == {"ValueError: no": 2}


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda o: RewardSignal("odd", torch.zeros(5, 1)), r"\[6, units\], .*, got \[5, 1\]"),
        (lambda o: torch.zeros(6, 1), "must return a RewardSignal, got Tensor"),
        (lambda o: None, "must return a RewardSignal, got NoneType"),
        (lambda o: RewardSignal("even", torch.zeros(6, 1)), "signs its verdict as 'even'"),
        (lambda o: RewardSignal("odd", torch.zeros(6, 1), details=[{}]), "must give 6 details"),
    ],
)
def test_a_wrong_answer_is_an_error_that_names_the_reward(act, said):
    reward = Odd(act)
    with pytest.raises(RewardError, match=said) as error:
        Scorer([reward], missing_limit=1.0)(outcome())
    assert "'odd'" in str(error.value)
    assert reward.calls == 1


def test_a_signal_of_wrong_shape_inside_the_reward_is_explained():
    with pytest.raises(RewardError, match=r"100% .* values must be \[samples, units\], got \(6,\)"):
        Scorer([Odd(lambda o: RewardSignal("odd", means(o)[:, 0]))])(outcome())


def test_too_many_missing_stop_the_run_with_the_reasons():
    def act(outcome):
        if len(outcome.prompts) > 1 or int(outcome.prompts.member[0]) == 0:
            raise TimeoutError
        return RewardSignal("odd", means(outcome))

    with pytest.raises(RewardError, match=r"33% .* more than the limit of 20%.*2 x TimeoutError"):
        Scorer([Odd(act)], missing_limit=0.2)(outcome())
    with pytest.warns(RuntimeWarning):
        Scorer([Odd(act)], missing_limit=0.4)(outcome())


def test_the_limit_is_over_all_ranks():
    mine = Odd(lambda o: first_missing(o, 2))
    with pytest.warns(RuntimeWarning):
        Scorer([mine], 0.2)(outcome(), lambda rows: torch.cat([rows, torch.zeros_like(rows)]))
    well = Odd(lambda o: RewardSignal("odd", means(o)))
    with pytest.raises(RewardError, match="on another process"):
        Scorer([well], 0.2)(outcome(), lambda rows: torch.cat([rows, torch.ones_like(rows)]))


def test_slow_rewards_work_at_the_same_time_and_without_gradients():
    meet = threading.Barrier(2, timeout=10)

    def act(outcome):
        meet.wait()  # would never return if one had to wait for the other
        assert not torch.is_grad_enabled()
        time.sleep(0.01)
        return RewardSignal("odd", means(outcome))

    one, two = Odd(act), Odd(lambda o: RewardSignal("two", act(o).values))
    two.name = "two"
    scores = Scorer([one, two], threads=2)(outcome())
    assert [s.name for s in scores.signals] == ["odd", "two"]


def test_summaries_by_hand():
    values = torch.tensor([1.0, 3, 5, 2, 2, 2])
    scores = Scorer([Odd(lambda o: RewardSignal("odd", values[:, None]))])(outcome())
    found = summarize(scores, Peers(outcome().prompts), 1)
    assert found["reward/odd"] == 2.5
    assert found["reward/odd/missing"] == 0
    assert found["reward/odd/group_std"] == pytest.approx((8 / 3) ** 0.5 / 2)
    assert found["reward/odd/std"] == pytest.approx(values.std(correction=0).item())


def test_summaries_of_details_and_completions():
    scores = Scorer([Redness()])(outcome())
    found = summarize(scores, Peers(outcome().prompts), 1)
    assert found["reward/redness/red"] == pytest.approx(outcome().media[:, 0].mean().item())
    assert 0 <= found["reward/redness/is_red"] <= 1
    assert "reward/redness/word" not in found
    views = outcome(views=2)
    twice = summarize(Scorer([Brightness()])(views), Peers(views.prompts), 2)
    assert twice["reward/brightness"] == pytest.approx(views.media.mean().item())


def test_rewards_need_names_of_their_own():
    with pytest.raises(ValueError, match="name of its own"):
        Scorer([Redness(), Redness()])
    with pytest.raises(ValueError, match="at least one"):
        Scorer([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        Scorer([Redness()], missing_limit=20)


def test_the_mean_of_a_verdict_is_over_its_valid_units_and_nothing_where_there_are_none():
    values = torch.tensor([[1.0, 3.0], [5.0, math.nan], [math.nan, math.nan]])
    found = RewardSignal("r", values, Unit.CRITERION).mean
    assert found[:2].tolist() == [2.0, 5.0]
    assert found[2].isnan()
