"""What judges say: read in both forms, never invented, and made into the rewards of ClaimDiff-RL by hand."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.claim_rewards import (
    EVEN,
    MODES,
    WEIGHTS,
    Tally,
    by_verdicts,
    decomposed,
    hedging,
    linear,
    relative,
    relative_raw,
    shaped,
    tally,
)
from mmalign.claims import (
    ClaimError,
    Comparison,
    Difference,
    Fault,
    find,
    inferred_severity,
    parse,
    recall,
    record,
    to_json,
    to_lines,
)

COLOR = Difference("color", "a red car", "a blue car", "B", Fault("color_hallucination", "it is blue", 3))
MISSED = Difference("object", "", "a dog", "B", Fault("object_omission", "a dog", 2))
THEIRS = Difference("count", "two men", "three men", "A", None, Fault("count_mismatch", "two", 3))
FINE = Difference("style", "bright", "sunny", "both_supported")
FOUND = Comparison((COLOR, MISSED, THEIRS, FINE), "B")


@pytest.mark.parametrize("form", [to_json, to_lines])
@pytest.mark.parametrize("around", ["{}", "Let me think {{about}} it.\n```\n{}\n```\nDone."])
def test_an_answer_is_read_back_as_it_was_written(form, around):
    assert parse(around.format(form(FOUND))) == FOUND


def test_a_recorded_comparison_keeps_its_spans():
    placed = FOUND.placed("A shiny red car and two men, all bright.")
    assert [d.span for d in placed.differences] == [(8, 15), None, (20, 27), (33, 39)]
    assert recall(json.loads(json.dumps(record(placed)))) == placed


def test_an_entry_that_is_not_as_agreed_is_counted_and_left_out():
    found = json.loads(to_json(FOUND))
    found["differences"][0]["judgment"] = "perhaps"
    del found["differences"][1]["error_b"]
    found["differences"][2]["error_b"]["severity"] = 7
    read = parse(json.dumps(found))
    assert read == Comparison((FINE,), "B", malformed=3)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "They are alike.",
        "{}",
        '{"differences": 3, "overall_winner": "A"}',
        '{"differences": []}',
        '{"differences": [{"aspect": "x"}], "overall_winner": "A"}',
        "[DIFFERENCE 1]\nASPECT: x",
    ],
)
def test_an_answer_that_cannot_be_read_is_no_verdict(answer):
    with pytest.raises(ClaimError):
        parse(answer)


@given(st.text(max_size=200))
def test_no_text_is_read_as_anything_but_a_comparison_or_an_error(text):
    with suppress(ClaimError):
        assert isinstance(parse(text), Comparison)


def test_no_difference_is_an_answer():
    assert parse('{"differences": [], "overall_winner": "Tie"}') == Comparison((), "Tie")


@pytest.mark.parametrize(
    ("kind", "severity"),
    [
        ("color_hallucination", 3),
        ("count_mismatch", 3),
        ("detail_omission", 2),
        ("text_truncation_error", 2),
        ("style_misinterpretation", 1),
        ("lighting", 2),
    ],
)
def test_the_name_of_an_error_tells_its_severity(kind, severity):
    assert inferred_severity(kind) == severity
    entry = json.loads(to_json(Comparison((COLOR,), "B")))
    entry["differences"][0]["error_a"] = {"type": kind, "detail": ""}
    assert parse(json.dumps(entry)).differences[0].error_a.severity == severity


def test_claims_are_found_where_their_words_are():
    caption = "On the left stands a very large red car. A dog sleeps."
    assert find("large red car", caption) == (26, 39)
    assert find("The car, red, is large", caption) == (26, 39)
    assert find("a purple bicycle", caption) is None
    assert find("", caption) is None


# Rewards, on the example above: A has one false claim of severity 3 and one omission of severity 2, B one
# false claim of severity 3, of four differences.


def test_the_tally_of_the_example():
    assert tally(FOUND) == Tally(4, 1.0, 1.0, 1.0, 0.0, 1, 2, -1, 1.0)
    assert tally(FOUND, WEIGHTS) == Tally(4, 1.6, 1.25, 1.6, 0.0, 1, 2, -1, 1.6)


@pytest.mark.parametrize(
    ("reward", "even", "weighed"),
    [
        (relative, 0.5 - 0.5 * (2 - 1) / 4, 0.5 - 0.5 * (2.85 - 1.6) / 6.4),
        (relative_raw, 0.5 - 0.05 * (2 - 1), 0.5 - 0.05 * (2.85 - 1.6)),
        (by_verdicts, 0.5 + 0.5 * (-1 / 4 - 0.1), 0.5 + 0.5 * (-1 / 4 - 0.1)),
        (linear, 1 - 2 / 10, 1 - 2.85 / 16),
        (
            shaped,
            (0.05 + 0.95 * 0.5**2) * math.exp(-2 / 4) * (0.7 + 0.3 * math.log(5) / math.log(11)),
            (0.05 + 0.95 * (1 - 2.85 / 6.4) ** 2)
            * math.exp(-2.85 / 1.6 / 4)
            * (0.7 + 0.3 * math.log(5) / math.log(11)),
        ),
        (decomposed, 1 - 2 / 4, 1 - 2.85 / 6.4),
    ],
)
def test_every_reward_by_hand(reward, even, weighed):
    assert reward(tally(FOUND, EVEN)) == pytest.approx(even)
    assert reward(tally(FOUND, WEIGHTS)) == pytest.approx(weighed)


@pytest.mark.parametrize("weights", [EVEN, WEIGHTS])
@pytest.mark.parametrize("mode", ["relative", "relative_raw", "by_verdicts"])
def test_swapping_the_captions_turns_a_relative_reward_around(mode, weights):
    there, back = (MODES[mode](tally(c, weights)) for c in (FOUND, FOUND.swapped))
    assert there - 0.5 == pytest.approx(-(back - 0.5))
    assert there != 0.5


def test_a_caption_without_a_difference():
    even = tally(Comparison((), "Tie"))
    assert {mode: MODES[mode](even) for mode in MODES} == {
        "relative": 0.5,
        "relative_raw": 0.5,
        "by_verdicts": 0.5,
        "linear": 1.0,
        "shaped": 1.0,
    }
    assert decomposed(even) == 1.0


def test_only_the_shaped_reward_jumps_where_the_first_harmless_difference_appears():
    none, one = (tally(Comparison(found, "Tie")) for found in ((), (FINE,)))
    jumps = {mode for mode in MODES if MODES[mode](none) != MODES[mode](one)}
    assert jumps == {"shaped"}
    assert decomposed(none) == decomposed(one)


def test_weights_choose_between_what_is_false_and_what_is_missing():
    numbers = tally(FOUND)
    assert decomposed(numbers, 2, 1) == pytest.approx(1 - 3 / 4)
    assert decomposed(numbers, 0, 1) == pytest.approx(1 - 1 / 4)
    assert decomposed(numbers, 1, 0) == pytest.approx(1 - 1 / 4)


@given(
    st.integers(0, 20),
    *(st.floats(0, 30) for _ in range(4)),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(-1, 1),
)
def test_every_reward_lies_in_0_to_1(d, fa, oa, fb, ob, wa, wb, winner):
    found = Tally(d, fa, oa, fb, ob, min(wa, d), min(wb, max(0, d - wa)), winner)
    for reward in (*MODES.values(), decomposed):
        assert 0 <= reward(found) <= 1


def test_hedging_costs_from_the_second_time_in_ninety_words():
    assert hedging("a red car") == 1
    assert hedging("a red or blue car") == pytest.approx(math.exp(-0.1 * (1 - 5 / 90)))
    assert hedging("possibly a car, which could be red/blue") == pytest.approx(math.exp(-0.1 * (3 - 7 / 90)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Fault("x", severity=4),
        lambda: Fault("NONE"),
        lambda: Difference("a", "b", "c", "maybe"),
        lambda: Comparison((), "C"),
        lambda: recall({"differences": []}),
    ],
)
def test_what_cannot_be(wrong):
    with pytest.raises(ClaimError):
        wrong()
