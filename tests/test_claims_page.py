"""The page of captions: claims lie where they are said, nothing of a caption is taken for HTML."""

import re

import pytest
import torch
from PIL import Image

from mmalign.claims_page import Marked, Told, load, marks, page, save, underlined
from mmalign.evaluation import verdicts
from mmalign.records import Prompts, RewardSignal

CAPTION = "a red circle above a blue square"


def test_checked_facts_and_differences_become_marks():
    checked = [
        {"aspect": "color", "said": "red", "span": (2, 5), "holds": True},
        {"aspect": "color", "said": "blue", "span": (21, 25), "holds": False},
    ]
    assert marks(checked, CAPTION) == (Marked("right", (2, 5), "color"), Marked("wrong", (21, 25), "color"))
    found = [
        {"aspect": "color", "said": "a blue square", "reference": "a green square", "judgment": "B"}
        | {"error": "color_hallucination", "severity": 2, "span": None},
        {"aspect": "object", "said": "", "reference": "a star", "judgment": "B"}
        | {"error": "object_omission", "severity": 3, "span": None},
        {"aspect": "size", "said": "red circle", "reference": "", "judgment": "both_supported"}
        | {"error": None, "severity": None, "span": None},
    ]
    wrong, omitted, right = marks(found, CAPTION)
    assert wrong == Marked(
        "wrong", (19, 32), "color_hallucination, severity 2; the reference: a green square"
    )
    assert (omitted.mark, omitted.span) == ("omitted", None)
    assert "a star" in omitted.note
    assert right == Marked("right", (2, 12), "size")
    with pytest.raises(ValueError, match="a claim is one of right, wrong, open, omitted"):
        Marked("maybe", None)


def test_underlined_text_is_the_caption_and_the_worse_verdict_wins():
    shown = underlined(CAPTION, [Marked("right", (0, 12), "whole"), Marked("wrong", (2, 5), "color")])
    assert re.sub(r"<[^>]+>", "", shown) == CAPTION
    assert '<u class=wrong title="color">red</u>' in shown
    assert shown.startswith('<u class=right title="whole">a </u>')
    assert underlined("", [Marked("right", (0, 3))]) == ""
    assert underlined("short", [Marked("wrong", (2, 99))]).endswith("</u>")


def test_what_captions_and_references_say_is_not_html(tmp_path):
    evil = '<script>alert("x")</script> & <u>'
    Image.new("RGB", (600, 300), "red").save(tmp_path / "a.png")
    told = Told(evil, str(tmp_path / "a.png"), evil, (Marked("wrong", (0, 8), evil),), {"facts": 0.5})
    text = page(evil, {"before": [told], "after": [told]})
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 5
    assert text.count("<article>") == 1
    assert text.count("data:image/") == 1
    assert "facts 0.50" in text


def test_captions_are_kept_as_they_are(tmp_path):
    told = [
        Told(CAPTION, None, "", (Marked("omitted", None, "a star"),), {}),
        Told("", None, "a", (), {"a": 1.0}),
    ]
    save(told, tmp_path / "told.json")
    assert load(tmp_path / "told.json") == told
    text = page("run", {"after": told})
    assert "Left out: a star" in text


class Judge:
    def __init__(self, name, claims):
        self.name, self.claims = name, claims

    def __call__(self, outcome):
        count = len(outcome.media)
        details = [{"claims": self.claims} for _ in range(count)]
        return RewardSignal(self.name, torch.zeros(count, 1), details=details)


def test_where_every_claim_is_checked_differences_tell_what_was_left_out():
    differences = Judge(
        "differences",
        [
            {"aspect": "color", "said": "red", "error": "color_hallucination", "judgment": "B"},
            {"aspect": "object", "said": "", "reference": "a star", "error": "object_omission"},
        ],
    )
    facts = Judge("facts", [{"aspect": "color", "said": "red", "span": (0, 3), "holds": True}])
    prompts = Prompts(["p"], torch.tensor([0]), torch.tensor([0]), [{}])
    for rewards in ([differences, facts], [facts, differences]):
        (verdict,) = verdicts(rewards, prompts, ["red"])
        assert {mark.mark for mark in marks(verdict.claims, "red")} == {"right", "omitted"}
    (alone,) = verdicts([differences], prompts, ["red"])
    assert [mark.mark for mark in marks(alone.claims, "red")] == ["wrong", "omitted"]
