"""The lab's judge of pairs, and the verdict that comes with given pairs."""

import random

import pytest
import torch

from mmalign.contracts import PairwiseReward
from mmalign.lab import compose, parse, render
from mmalign.pairwise import win_rates
from mmalign.records import Outcome, Prompts
from mmalign.rewardmodels import load

ASKED = "a red circle"


def picture(prompt, seed=0):
    return torch.from_numpy(render(compose(parse(prompt), random.Random(seed)))).permute(2, 0, 1) / 255


def group(pictures, text=ASKED) -> Outcome:
    count = len(pictures)
    zeros, members = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    return Outcome(Prompts([text] * count, zeros, members, [{}] * count), torch.stack(pictures))


def test_the_picture_that_shows_more_of_the_prompt_wins():
    shown = [picture(ASKED), picture("a blue circle"), torch.ones(3, 64, 64), picture(ASKED, 1)]
    judge = load("lab_pairwise")
    assert isinstance(judge, PairwiseReward)
    signal, reasons = win_rates(judge, group(shown))
    assert not reasons
    assert signal.values.flatten().tolist() == pytest.approx([5 / 6, 1 / 3, 0, 5 / 6])
    assert all(row["consistent"] == 1 for row in signal.details)


def test_a_small_difference_may_be_a_tie():
    shown = [picture(ASKED), picture("a blue circle")]
    assert win_rates(load("lab_pairwise"), group(shown))[0].values.flatten().tolist() == [1, 0]
    judge = load("lab_pairwise", margin=0.6)
    assert win_rates(judge, group(shown))[0].values.flatten().tolist() == [0.5, 0.5]


def test_a_prompt_that_the_lab_cannot_read_has_no_verdict():
    signal, _ = win_rates(load("lab_pairwise"), group([picture(ASKED)] * 2, "a red dragon"))
    assert not signal.valid.any()


@pytest.mark.parametrize(("setting", "value"), [("measure", "sharp"), ("margin", 1.0)])
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(ValueError, match=f"lab_pairwise: {setting} must"):
        load("lab_pairwise", **{setting: value})


def test_a_given_pair_is_judged_by_its_file():
    extra = [{"preferred": 1.0}, {"preferred": 0.0}, {}]
    prompts = Prompts(["a"] * 3, torch.zeros(3).long(), torch.arange(3), extra)
    signal = load("preference")(Outcome(prompts, torch.zeros(3, 3, 8, 8)))
    assert signal.values.flatten().tolist() == [1, 0, 0]
    assert signal.valid.flatten().tolist() == [True, True, False]
