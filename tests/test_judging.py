"""Judges of captions are judged: by exact labels, by captions that change places, by what they cost."""

import json
from dataclasses import replace

import pytest
from runs import ROOT

from mmalign.claims import Comparison, Difference, Fault, record
from mmalign.cli import main
from mmalign.config import ConfigError
from mmalign.judging import Agreement, evaluate, faults, read_labels, table
from mmalign.rewardmodels.caption_judges import Case, Judged
from mmalign.rewardmodels.lab_judge import LabJudge, labelled

CAPTIONS = ROOT / "assets/lab/captions/heldout.jsonl"


@pytest.fixture(scope="module")
def labels():
    return labelled(CAPTIONS, 40)


class Through:
    """The exact judge, with something done to what it says."""

    name = "through"
    needs = ("reference", "scene")

    def __init__(self, change):
        self.change, self.exact = change, LabJudge()

    def compare(self, cases):
        return [
            self.change(judged, case) for judged, case in zip(self.exact.compare(cases), cases, strict=True)
        ]

    def rate(self, cases):
        return self.exact.rate(cases)


def looked(judged, **changes):
    return replace(judged, looks=tuple(replace(look, **changes) for look in judged.looks))


def test_planted_mistakes_are_many_and_the_exact_judge_finds_each(labels):
    kinds = evaluate(LabJudge(), labels).kinds
    assert kinds["false"].labelled > 20
    assert kinds["left_out"].labelled > 40
    assert {"color/false", "size/left_out"} <= kinds.keys()
    assert all(one.precision == one.recall == 1 for one in kinds.values())
    found = evaluate(LabJudge(), labels)
    assert (found.missing, found.winner, found.consistent, found.first_bias) == (0, 1, 1, 0)
    assert all(label == said for label, said in found.severities)


def test_a_judge_that_overlooks_omissions_loses_their_recall_alone(labels):
    def blind(judged, case):
        look = judged.looks[0]
        kept = tuple(d for d in look.differences if d.error_a is None or not d.error_a.omission)
        return looked(judged, differences=kept)

    kinds = evaluate(Through(blind), labels).kinds
    assert kinds["left_out"] == Agreement(0, 0, kinds["left_out"].labelled)
    assert kinds["left_out"].precision is None
    assert kinds["left_out"].recall == 0
    assert kinds["false"].precision == kinds["false"].recall == 1


def test_a_judge_that_invents_errors_loses_precision_alone(labels):
    invented = Difference("object", "a dog", "", "B", Fault("object_hallucination", "", 3))

    def dreamer(judged, case):
        return looked(judged, differences=(*judged.looks[0].differences, invented))

    kinds = evaluate(Through(dreamer), labels).kinds
    one = kinds["object/false"]
    assert one.recall == 1
    assert one.precision == pytest.approx(one.labelled / (one.labelled + 40))
    assert kinds["left_out"].precision == 1


def test_a_taste_for_the_first_place_is_measured(labels):
    found = evaluate(Through(lambda judged, case: looked(judged, winner="A")), labels)
    assert found.first_bias == 1
    assert found.consistent == 0
    assert found.winner == sum(label.winner == "A" for _, label in labels) / len(labels)
    unasked = evaluate(LabJudge(), labels, swap=False)
    assert unasked.first_bias is unasked.consistent is None
    assert "taste for the first -" in table(unasked)


def test_severities_are_compared_where_errors_meet(labels):
    def milder(judged, case):
        kept = tuple(
            replace(d, error_a=replace(d.error_a, severity=1)) if d.error_a else d
            for d in judged.looks[0].differences
        )
        return looked(judged, differences=kept)

    found = evaluate(Through(milder), labels)
    assert {said for _, said in found.severities} == {1}
    assert sum(n for (label, _), n in found.severities.items() if label == 3) > 0


def test_what_is_not_answered_is_missing_and_counts_for_nothing(labels):
    silent = {case.key for case, _ in labels[:10]}

    def tired(judged, case):
        return (
            Judged(problem="no answer", calls=2)
            if case.key in silent
            else replace(judged, calls=1, tokens=50)
        )

    found = evaluate(Through(tired), labels)
    assert found.missing == pytest.approx(0.25)
    assert found.kinds["false"].recall == 1
    assert found.calls == pytest.approx((10 * 2 + 30) / 40)
    assert found.tokens == pytest.approx(50 * 30 / 40)


def test_errors_are_named_by_what_they_are_about():
    comparison = Comparison(
        (
            Difference("x", "red", "", "B", Fault("Color_Hallucination", "", 2)),
            Difference("x", "", "star", "B", Fault("object_omission", "", 3)),
            Difference("x", "a", "b", "A", None, Fault("color_hallucination")),
        ),
        "B",
    )
    assert dict(faults(comparison)) == {"color/false": [2], "object/left_out": [3]}


def test_labels_come_from_a_file(tmp_path, labels):
    case, label = labels[0]
    row = {"caption": case.caption, "reference": case.reference, "image": "a.png", "label": record(label)}
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps(row | {"scene": case.scene}) + "\n\n")
    ((read, found),) = read_labels(file)
    assert read == Case(case.caption, case.reference, str(tmp_path / "a.png"), case.scene)
    assert found == label
    file.write_text(json.dumps(row) + "\n" + json.dumps({"caption": "a"}))
    with pytest.raises(ConfigError, match="line 2: is no labelled case"):
        read_labels(file)
    with pytest.raises(ConfigError, match="there is no file"):
        read_labels(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="were asked for"):
        labelled(CAPTIONS, 10**6)


def test_the_command_prints_writes_and_replays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    kept = str(tmp_path / "answers.jsonl")
    given = ["judge", "--count", "5", "--record", kept, "--json", str(tmp_path / "found.json")]
    assert main(given) == 0
    first = capsys.readouterr().out
    assert "color/" in first or "size/" in first
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["kinds"]["left_out"]["recall"] == 1
    assert written["per_caption"]["calls"] == 0
    assert main([*given, "--replay"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["kinds"] == written["kinds"]
    assert main(["judge", "--judge", "nobody"]) != 0
    assert main(["judge", "--settings", "3"]) != 0
