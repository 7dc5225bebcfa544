"""The lab's verifier as a reward."""

import random
from time import process_time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.lab import CATEGORIES, compose, parse, render, sample_task, write_prompt
from mmalign.records import Unit
from mmalign.rewardmodels import load
from mmalign.testing import check_reward


def picture(prompt, seed=0):
    """A picture [3, 64, 64] that shows what the prompt asks for."""
    return torch.from_numpy(render(compose(parse(prompt), random.Random(seed)))).permute(2, 0, 1) / 255


def prompts(seed):
    rng = random.Random(seed)
    return [write_prompt(sample_task(rng, category)) for category in CATEGORIES]


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32))
def test_a_picture_of_what_is_asked_gets_1_and_a_blank_one_0(outcome_of, seed):
    asked = prompts(seed)
    shown = torch.stack([picture(prompt, seed) for prompt in asked])
    for measure in ("soft", "strict", "mix"):
        reward = load("lab", measure=measure)
        assert reward(outcome_of(shown, asked)).values.unique().tolist() == [1.0]
        assert reward(outcome_of(torch.ones_like(shown), asked)).values.unique().tolist() == [0.0]


def test_half_of_what_is_asked_is_worth_something_to_soft_alone(outcome_of):
    judged = outcome_of(picture("a red circle")[None], ["a blue circle"])
    soft, strict, mix = (load("lab", measure=m)(judged).values.item() for m in ("soft", "strict", "mix"))
    assert (soft, strict, mix) == (0.5, 0.0, 0.25)


def test_the_details_say_what_holds(outcome_of):
    (detail,) = load("lab")(outcome_of(picture("a red circle")[None], ["a blue circle"])).details
    assert detail == {
        "strict": False,
        "soft": 0.5,
        "category": "colors",
        "extras": 0,
        "checks": [("1 circle", 1.0), ("circle blue", 0.0)],
    }


@pytest.mark.parametrize("grain", ["sample", "criterion"])
def test_a_prompt_the_lab_cannot_read_has_no_verdict_and_a_reason(grain, outcome_of):
    media = picture("a red circle").expand(3, -1, -1, -1)
    signal = load("lab", grain=grain)(outcome_of(media, ["a red circle", "a red dragon", "a red circle"]))
    assert signal.valid.any(1).tolist() == [True, False, True]
    assert signal.values[0].eq(1).all()
    assert "'dragon' is not a word of the lab" in signal.details[1]["missing"]
    alone = load("lab", grain=grain)(outcome_of(media[:1], ["a red dragon"]))
    assert alone.valid.tolist() == [[False]]


def test_criteria_are_one_unit_a_claim_and_short_prompts_are_padded_as_missing(outcome_of):
    asked = ["a square", "a blue circle left of a red star"]
    media = torch.stack([picture("a square"), picture("a red circle left of a red star")])
    signal = load("lab", grain="criterion")(outcome_of(media, asked))
    assert signal.unit is Unit.CRITERION
    assert signal.valid.tolist() == [[True, True, False, False, False, False], [True] * 6]
    # nothing else; a circle, blue, a star, red; left of, as far as the things are right
    assert signal.values[1].tolist() == [1.0, 1.0, 0.0, 1.0, 1.0, 0.5]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_the_criteria_of_a_prompt_are_the_same_for_any_picture_and_make_up_the_soft_score(outcome_of, seed):
    asked, other = prompts(seed)[seed % len(CATEGORIES)], prompts(seed + 1)[seed % 3]
    media = torch.stack([picture(asked), picture(other), torch.ones(3, 64, 64)])
    judged = outcome_of(media, [asked] * 3)
    units = load("lab", grain="criterion")(judged)
    assert units.valid.all()
    whole = load("lab")(judged).values[:, 0]
    assert torch.allclose(units.values[:, 0] * units.values[:, 1:].mean(1), whole)
    claims = [[claim for claim, _ in detail["checks"]] for detail in units.details]
    assert claims[0] == claims[1] == claims[2]


def test_a_larger_picture_is_read_alike(outcome_of):
    small = picture("two red circles")[None]
    large = small.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert load("lab")(outcome_of(large, ["two red circles"])).values.item() == 1


@pytest.mark.parametrize("size", [(64, 128), (32, 32), (100, 100)])
def test_a_size_that_cannot_be_read_is_refused(size, outcome_of):
    with pytest.raises(ValueError, match=rf"lab: .* of 64, got {size[0]} x {size[1]}; draw them at 64 x 64"):
        load("lab")(outcome_of(torch.rand(1, 3, *size), ["a circle"]))


@pytest.mark.parametrize("grain", ["sample", "criterion"])
@pytest.mark.parametrize("measure", ["soft", "strict", "mix"])
def test_it_keeps_the_contract(measure, grain, outcome_of):
    asked = [
        "a red circle",
        "three blue stars",
        "a red square above a ring",
        "no such thing",
        'the word "cat"',
    ]
    media = torch.stack([picture("a red circle")] * 4 + [picture('the word "cat"')])
    check_reward(load("lab", measure=measure, grain=grain), outcome_of(media, asked))


def test_a_batch_is_judged_in_milliseconds_a_picture(outcome_of):
    asked = prompts(0) * 4
    judged = outcome_of(torch.stack([picture(prompt) for prompt in asked]), asked)
    reward = load("lab")
    reward(judged)
    began = process_time()
    reward(judged)
    assert (process_time() - began) / len(asked) < 0.02


def styled(prompt, style, seed=0):
    scene = compose(parse(prompt), random.Random(seed))
    return torch.from_numpy(render(scene, style=style)).permute(2, 0, 1) / 255


def test_pictures_are_read_in_the_style_that_is_named_or_seen(outcome_of):
    prompt = "a red circle left of a blue star"
    judged = outcome_of(torch.stack([styled(prompt, s) for s in ("plain", "pastel", "night")]), [prompt] * 3)
    assert load("lab", style="pastel")(judged).values[1].item() == 1
    assert load("lab", style="any", measure="strict")(judged).values.flatten().tolist() == [1, 1, 1]
    assert load("lab", style="plain", measure="strict")(judged).values[2].item() == 0


def test_a_style_is_1_for_its_own_pictures_alone(outcome_of):
    styles = ["plain", "pastel", "outlined", "night", "striped"]
    judged = outcome_of(torch.stack([styled("two green squares", style) for style in styles]), ["x"] * 5)
    for place, style in enumerate(styles):
        signal = load("lab_style", style=style)(judged)
        assert signal.values.flatten().tolist() == [float(i == place) for i in range(5)]
        assert [row["style"] for row in signal.details] == styles
    check_reward(load("lab_style"), judged)


def test_an_unknown_style_of_a_reward_is_named():
    with pytest.raises(ValueError, match=r"lab_style: style must be one of plain, .*, got 'cubist'"):
        load("lab_style", style="cubist")
    with pytest.raises(ValueError, match=r"lab: style must be one of plain, .*, any, got 'outlined'"):
        load("lab", style="outlined")
