"""Rewards of captions on the lab: what one false claim, and one fact left out, do to each number."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmalign.contracts import RewardError
from mmalign.lab.caption_check import check
from mmalign.lab.captions import Mention, as_json, describe, draw_scene, write
from mmalign.lab.scenes import Scene, Thing
from mmalign.records import Outcome, Prompts, Spans, Unit
from mmalign.rewardmodels import load
from mmalign.rewardmodels.claimdiff import CaptionLength, ClaimDiff, Holistic
from mmalign.rewardmodels.lab_captions import CaptionFacts
from mmalign.scoring import Scorer, judge
from mmalign.testing import check_reward

SCENE = Scene(
    (Thing("circle", "red", "large", 16.0, 16.0, 11.0), Thing("square", "blue", "small", 48.0, 48.0, 7.0))
)
FULL = write(describe(SCENE))


def outcome(*captions: str, reference: str = FULL, scene: object = None) -> Outcome:
    extra: Mapping[str, object] = {"reference": reference, "scene": scene or as_json(SCENE)}
    count = len(captions)
    prompts = Prompts(
        ["Describe the picture."] * count,
        torch.zeros(count, dtype=torch.int64),
        torch.arange(count),
        [extra] * count,
    )
    return Outcome(prompts, list(captions))


def numbers(caption: str, reference: str = FULL, **settings) -> tuple[float, float, float]:
    signal = ClaimDiff(**settings)(outcome(caption, reference=reference))
    detail = signal.details[0]
    return float(signal.values[0, 0]), detail["hallucinations"], detail["omissions"]


def test_the_full_caption_of_a_scene():
    assert FULL == (
        "There are two things: a large red circle at the top left and a small blue square at the bottom "
        "right. The red circle is left of the blue square."
    )
    assert numbers(FULL) == (1.0, 0.0, 0.0)
    assert float(ClaimDiff(mode="relative")(outcome(FULL)).values) == 0.5


def test_a_false_claim_moves_the_hallucinations_alone():
    planted = FULL.replace("red", "green")
    assert numbers(planted)[1:] == (1.0, 0.0)
    invented = FULL.replace(" and a small", ", a yellow star and a small")
    assert numbers(invented)[1:] == (1.0, 0.0)


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("a large red circle", "a red circle"),
        (" at the top left", ""),
        (" The red circle is left of the blue square.", ""),
    ],
)
def test_a_fact_that_is_dropped_moves_the_omissions_alone(said, left):
    assert said in FULL
    assert numbers(FULL.replace(said, left))[1:] == (0.0, 1.0)


def test_a_true_detail_that_only_the_caption_has_is_no_error():
    short = FULL.replace(" at the top left", "")
    assert numbers(FULL, reference=short) == (1.0, 0.0, 0.0)


def test_an_error_of_the_reference_is_not_one_of_the_caption():
    wrong = FULL.replace("a small blue", "a small green")
    assert numbers(FULL, reference=wrong)[1:] == (0.0, 0.0)
    there, back = (
        float(ClaimDiff(mode="relative")(outcome(a, reference=b)).values)
        for a, b in ((FULL, wrong), (wrong, FULL))
    )
    assert there - 0.5 == pytest.approx(0.5 - back)
    assert there > 0.5


@given(st.integers(0, 10**6))
def test_every_full_caption_is_right_and_complete(seed):
    scene = draw_scene(random.Random(seed))
    reading = check(write(describe(scene)), scene)
    assert not reading.wrong
    assert not reading.omitted


@given(st.integers(0, 10**6))
def test_planting_an_object_adds_one_false_claim_and_no_omission(seed):
    rng = random.Random(seed)
    scene = draw_scene(rng)
    truth = describe(scene)
    absent = sorted(
        {"circle", "square", "triangle", "star", "cross", "ring"} - {t.shape for t in scene.things}
    )
    if not absent:
        return
    planted = replace(truth, things=(*truth.things, Mention(rng.choice(absent))))
    before, after = (check(write(text), scene) for text in (truth, planted))
    assert len(after.wrong) == len(before.wrong) + 1
    assert after.omitted == before.omitted


@given(st.text(max_size=80))
def test_word_soup_is_no_error(text):
    signal = ClaimDiff()(outcome(text))
    assert signal.valid.all()
    assert 0 <= float(signal.values) <= 1


def test_claims_stand_at_their_words():
    planted = FULL.replace("a large red circle", "a large green circle").replace(" at the bottom right", "")
    signal = ClaimDiff(grain="claim", hallucination=2.0, omission=0.5)(outcome(planted, FULL))
    assert signal.unit is Unit.CLAIM
    assert isinstance(signal.where, Spans)
    units = {
        planted[a:b]: float(v)
        for v, ok, a, b in zip(
            signal.values[0], signal.valid[0], signal.where.start[0], signal.where.end[0], strict=True
        )
        if ok
    }
    assert units["green"] == -2.0
    assert units[planted] == -0.5  # what is left out speaks about the whole
    assert signal.valid[1].tolist() == [True] + [False] * (signal.values.shape[1] - 1)


def test_severity_weighs_grave_errors_more():
    color, thing = (FULL.replace("red", "green"), FULL.replace(" and a small", ", a yellow star and a small"))
    even = [numbers(text)[1] for text in (color, thing)]
    weighed = [numbers(text, severity=True)[1] for text in (color, thing)]
    assert even == [1.0, 1.0]
    assert weighed == [1.25, 1.6]


def test_hedging_lowers_the_reward_where_it_is_asked_for():
    open_ = FULL + " It could be day or possibly night."
    assert numbers(open_, hedge=True)[0] < numbers(open_)[0]


def test_the_rates_of_a_caption():
    caption = "There is a green circle and a yellow star."
    detail = CaptionFacts()(outcome(caption)).details[0]
    # Claims: circle (right), green (wrong), a star (invented); its color is not judged on its own.
    assert detail["claims_made"] == 3
    assert detail["hallucination"] == pytest.approx(2 / 3)
    assert detail["objects_invented"] == 0.5
    # Facts: 4 of each thing and their relation; stated are the circle and its color.
    assert detail["omission"] == pytest.approx(7 / 9)
    assert detail["omission_object"] == 0.5
    right, covered = 1 / 3, 1 / 9
    assert float(CaptionFacts()(outcome(caption)).values) == pytest.approx(
        2 * right * covered / (right + covered)
    )
    assert float(CaptionFacts()(outcome(FULL)).values) == 1.0
    assert float(CaptionFacts()(outcome("")).values) == 0.0


def test_the_holistic_rating_falls_with_either_kind_of_error():
    captions = (FULL, FULL.replace("red", "green"), "There is a red circle.", "")
    values = Holistic()(outcome(*captions)).values[:, 0].tolist()
    assert values[0] == 1.0
    assert values[0] > values[1]
    assert values[0] > values[2]
    assert values[-1] == 0.0
    assert all(round(10 * value) == pytest.approx(10 * value) for value in values)


def test_length_is_told_by_words():
    values = CaptionLength(4)(outcome("", "a b", "a b c d", "a b c d e f g h i")).values[:, 0].tolist()
    assert values == [0.0, 0.5, 1.0, 0.0]


@pytest.mark.parametrize(
    "reward", [ClaimDiff(), ClaimDiff(grain="claim"), Holistic(), CaptionFacts(), CaptionLength()]
)
def test_it_is_a_reward_like_any_other(reward):
    check_reward(reward, outcome(FULL, "There is a red circle.", "a green star", ""))


def test_a_prompt_line_without_a_scene_is_said_to_lack_it():
    bad = replace(outcome(FULL), prompts=replace(outcome(FULL).prompts, extra=[{"reference": FULL}]))
    with pytest.raises(ValueError, match="has no 'scene'; put it into its line"):
        ClaimDiff()(bad)


def test_a_scene_that_is_none_has_no_verdict():
    signal, reasons = judge(ClaimDiff(), outcome(FULL, scene={"things": [{"shape": "circle"}]}))
    assert not signal.valid.any()
    assert reasons
    assert "scene" in signal.details[0]["missing"]


def test_pictures_are_refused():
    with pytest.raises(TypeError, match="claimdiff judges captions"):
        ClaimDiff()(replace(outcome(FULL), media=torch.zeros(1, 3, 8, 8)))


class Flaky:
    """A judge that fails on one case in five: dead, slow, or with an answer nobody can read."""

    def __init__(self, inner: ClaimDiff) -> None:
        self.name, self.inner, self.calls = inner.name, inner, 0

    def __call__(self, given: Outcome):
        signal = self.inner(given)
        values = signal.values.clone()
        for row in range(len(values)):
            self.calls += 1
            if self.calls % 5 == 0:
                values[row] = torch.nan
        return replace(signal, values=values)


@pytest.mark.filterwarnings("ignore:reward 'claimdiff'")
def test_failed_verdicts_are_missing_and_counted_up_to_the_limit():
    given = outcome(*[FULL] * 10)
    scores = Scorer([Flaky(ClaimDiff())], 0.25)(given)
    assert scores.signals[0].valid.sum() == 8
    assert sum(scores.reasons["claimdiff"].values()) == 2
    with pytest.raises(RewardError, match="no verdict for 20%"):
        Scorer([Flaky(ClaimDiff())], 0.1)(given)


def test_answers_that_were_recorded_are_replayed(tmp_path):
    file, given = str(tmp_path / "judge.jsonl"), outcome(FULL, FULL.replace("red", "green"))
    fresh = ClaimDiff(record=file)(given)
    again = ClaimDiff(record=file, replay=True)
    assert torch.equal(again(given).values, fresh.values)
    assert not again(outcome("There is a ring.")).valid.any()
    assert float(Holistic(record=file)(given).values[0]) == 1.0
    assert float(Holistic(record=file, replay=True)(given).values[0]) == 1.0
    with pytest.raises(ValueError, match="there is no recording"):
        ClaimDiff(record=str(tmp_path / "none"), replay=True)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1"):
        ClaimDiff(record=str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mode": "best"}, "mode must be one of"),
        ({"grain": "word"}, "grain must be one of"),
        ({"judge": "me"}, "judge must be one of"),
        ({"hallucination": -1.0}, "must not be negative"),
        ({"replay": True}, "name it as `record`"),
        ({"settings": {"faithfulness": 2.0}}, "faithfulness is a share"),
        ({"settings": {"strict": True}}, "judge 'lab'"),
    ],
)
def test_settings_that_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        load("claimdiff", **wrong)
