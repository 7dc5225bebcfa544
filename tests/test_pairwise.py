"""Win rates from a judge of pairs: how they are counted, what is asked, and what a failure costs."""

import math

import pytest
import torch
from torch.testing import assert_close
from toys import names

from mmalign.contracts import PairwiseReward, RewardError
from mmalign.pairwise import win_rates
from mmalign.records import Outcome
from mmalign.scoring import Scorer


class Judge:
    """Prefers the brighter picture; `lean` is added to the first one."""

    name = "judge"

    def __init__(self, lean=0.0, both_orders=True, broken=None) -> None:
        self.lean, self.both_orders, self.broken, self.asked = lean, both_orders, broken, []

    def prefer(self, prompts, first, second):
        levels = [media[:, 0, 0, 0] for media in (first, second)]
        if self.broken is not None and any(self.broken in level for level in levels):
            raise OSError("no answer")
        self.asked += list(zip(prompts.group.tolist(), *(level.tolist() for level in levels), strict=True))
        return ((levels[0] + self.lean - levels[1]).sign() + 1) / 2


def outcome(levels: list[float], groups: int = 1) -> Outcome:
    media = torch.tensor(levels)[:, None, None, None].expand(-1, 3, 2, 2)
    return Outcome(names(groups, len(levels) // groups), media)


def rates(judge, levels, groups=1):
    return win_rates(judge, outcome(levels, groups))[0].values[:, 0]


def test_a_sample_wins_against_the_share_of_its_group_that_it_beats():
    assert_close(rates(Judge(), [0.1, 0.9, 0.5, 0.3]), torch.tensor([0, 3, 2, 1]) / 3)
    found = rates(Judge(), [0.1, 0.9, 0.5, 0.4, 0.4, 0.2], groups=2)
    assert_close(found, torch.tensor([0, 1, 0.5, 0.75, 0.75, 0]))  # a tie counts half


@pytest.mark.parametrize("both_orders", [True, False])
def test_wins_of_a_group_add_up_to_its_pairs(both_orders):
    levels = torch.rand(6, generator=torch.Generator().manual_seed(0)).round(decimals=1).tolist()
    found = rates(Judge(both_orders=both_orders), levels)
    assert float(found.sum()) * 5 == pytest.approx(15)
    assert found.mean() == pytest.approx(0.5)
    assert found.min() >= 0
    assert found.max() <= 1


def test_only_the_order_of_the_scores_matters():
    levels = torch.rand(6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rates(Judge(), levels.tolist()), rates(Judge(), levels.exp().tolist()))


def test_every_pair_of_a_group_is_asked_in_both_orders_or_in_one():
    levels = [0.1, 0.9, 0.5, 0.4, 0.3, 0.2]
    both, one = Judge(), Judge(both_orders=False)
    rates(both, levels, groups=2)
    rates(one, levels, groups=2)
    wanted = {
        (g, a, b) for g, part in enumerate((levels[:3], levels[3:])) for a in part for b in part if a != b
    }
    asked = {(g, round(a, 1), round(b, 1)) for g, a, b in both.asked}
    assert len(both.asked) == 2 * 3 * 2
    assert asked == wanted
    assert len(one.asked) == 2 * 3
    pairs = {(g, *sorted((a, b))) for g, a, b in one.asked}
    assert len(pairs) == 6


def test_a_liking_for_the_first_place_cancels_out_in_both_orders_and_is_reported():
    levels = [0.1, 0.9, 0.5, 0.3]
    fair, leaning = win_rates(Judge(), outcome(levels))[0], win_rates(Judge(lean=0.25), outcome(levels))[0]
    assert_close(rates(Judge(lean=5.0), levels), torch.full((4,), 0.5))  # it looks at the place alone
    assert [row["consistent"] for row in fair.details] == [1.0] * 4
    agree = torch.tensor([row["consistent"] for row in leaning.details])
    assert_close(agree, torch.tensor([2 / 3, 1.0, 2 / 3, 1 / 3]))  # 0.2 apart is less than the lean
    single = win_rates(Judge(both_orders=False), outcome(levels))[0]
    assert "consistent" not in single.details[0]


def test_a_group_of_ties_has_no_advantage():
    assert torch.equal(rates(Judge(), [0.4] * 4), torch.full((4,), 0.5))


def test_a_question_without_an_answer_drops_the_pair_and_not_the_group():
    signal, reasons = win_rates(Judge(broken=0.5), outcome([0.25, 0.75, 0.5, 0.125]))
    assert reasons == {"OSError: no answer": 6}
    assert signal.valid.flatten().tolist() == [True, True, False, True]
    assert_close(signal.values[[0, 1, 3], 0], torch.tensor([0.5, 1.0, 0.0]))
    assert [row["questions"] for row in signal.details] == [2, 2, 0, 2]


def test_answers_that_are_no_preferences_are_refused():
    class Wrong(Judge):
        def prefer(self, prompts, first, second):
            return first[:, 0, 0, 0] * 3

    with pytest.raises(RewardError, match=r"'judge' must answer 2 questions by numbers in \[0, 1\]"):
        rates(Wrong(), [0.1, 0.9])


def test_texts_are_compared_too():
    class Longer(Judge):
        def prefer(self, prompts, first, second):
            return torch.tensor([float(len(a) > len(b)) for a, b in zip(first, second, strict=True)])

    found, _ = win_rates(Longer(), Outcome(names(1, 3), ["a", "abc", "ab"]))
    assert_close(found.values[:, 0], torch.tensor([0.0, 1.0, 0.5]))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_scorer_takes_both_kinds_of_judges_in_their_order(threads):
    class Bright:
        name = "bright"

        def __call__(self, outcome):
            from mmalign.records import RewardSignal

            return RewardSignal(self.name, outcome.media[:, 0, 0, :1])

    rewards = [Bright(), Judge(), type("Other", (Bright,), {"name": "other"})()]
    assert [isinstance(reward, PairwiseReward) for reward in rewards] == [False, True, False]
    scores = Scorer(rewards, threads=threads)(outcome([0.1, 0.9, 0.5]))
    assert [signal.name for signal in scores.signals] == ["bright", "judge", "other"]
    assert_close(scores.signals[1].values[:, 0], torch.tensor([0.0, 1.0, 0.5]))


def test_the_spread_of_win_rates_in_strict_order_is_known():
    found = rates(Judge(), torch.linspace(0, 1, 8).tolist())
    assert_close(float(found.double().std(correction=0)), math.sqrt(9 / (12 * 7)), rtol=1e-6, atol=0)
