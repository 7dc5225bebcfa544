"""Questions are kept if their picture answers them and a gray one does not."""

import json

import pytest
from PIL import Image
from runs import ROOT

from mmalign.cli import main
from mmalign.config import ConfigError
from mmalign.question_filter import Filter, ask, kept, read_rows, run, turned

CHOICES = ["red", "green", "blue", "cyan"]


class Oracle:
    """Knows a picture by its name; of a gray one it says `prior`, or takes the first choice."""

    def __init__(self, prior=None):
        self.prior, self.asked = prior, []

    def texts(self, prompts, key):
        out = []
        for text, extra in zip(prompts.text, prompts.extra, strict=True):
            self.asked.append(text)
            name = extra["image"].rpartition("/")[2]
            first = text.partition("? ")[2].split(",")[0]
            out.append(self.prior or first if name == "gray.png" else name.partition(".")[0])
        return out


@pytest.fixture
def file(tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
    question = {"question": "What color is it?", "choices": CHOICES}
    rows = [
        {"prompt": "p", "image": f"{name}.png", "questions": [question | {"answer": name}]}
        for name in ("red", "blue")
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_turned_choices_come_back_to_where_they_were():
    assert turned(CHOICES, 1) == ["green", "blue", "cyan", "red"]
    assert turned(CHOICES, 4) == CHOICES


def test_a_guess_by_place_is_right_one_time_in_as_many_as_there_are_choices(file):
    oracle = Oracle()
    asked = ask(oracle, read_rows(file)[1], Filter())
    assert [(one.seen, one.blind) for one in asked] == [(1.0, 0.25)] * 2
    assert (
        sum(text.startswith("What color is it? red,") for text in oracle.asked) == 4
    )  # two pictures, two rows
    assert len(oracle.asked) == 2 * 4 * 2


def test_what_is_known_without_the_picture_is_left_out(file, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run(Oracle(prior="red"), file, out, Filter()) == (1, 2)
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["image"] == "blue.png"
    assert row["questions"][0] | {"seen": 1.0, "blind": 0.0} == row["questions"][0]
    assert not list(tmp_path.glob("*.partial"))


def test_limits_are_those_of_the_paper_and_strict(file):
    rows, placed = read_rows(file)
    asked = ask(Oracle(), placed, Filter())
    assert kept(rows, asked, Filter()) == []  # 0.25 is not below 0.25
    assert len(kept(rows, asked, Filter(blind=0.3))) == 2
    assert kept(rows, asked, Filter(seen=1.0, blind=0.3)) == []
    with pytest.raises(ConfigError, match="--seen and --blind are shares"):
        Filter(seen=2.0)


def test_lines_without_questions_are_named(tmp_path, file):
    with pytest.raises(ConfigError, match="there is no file"):
        read_rows(tmp_path / "none.jsonl")
    file.write_text('{"prompt": "p", "image": "red.png"}\n')
    with pytest.raises(ConfigError, match="line 1: has no questions"):
        read_rows(file)
    question = {"question": "q", "choices": ["a"], "answer": "b"}
    file.write_text(json.dumps({"image": "red.png", "questions": [question]}))
    with pytest.raises(ConfigError, match="answer is among their choices"):
        read_rows(file)


@pytest.mark.slow
def test_the_labs_captioner_sees_what_it_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "assets/lab/captions/heldout.jsonl").read_text().splitlines()[:12]
    rows = [json.loads(line) for line in lines]
    source = tmp_path / "some.jsonl"
    for row in rows:
        row["image"] = str(ROOT / "assets/lab/captions" / row["image"])
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "kept.jsonl"
    given = ["filter-questions", "assets/lab/captioner", "--questions", str(source), "--out", str(out)]
    assert main([*given, "--blind", "0.6", "--tries", "2"]) == 0
    some = sum(len(json.loads(line)["questions"]) for line in out.read_text().splitlines())
    assert 0 < some < sum(len(row["questions"]) for row in rows)
    assert f"{some} of 36 questions kept" in capsys.readouterr().out
    assert main(["filter-questions", "assets/lab/flow", "--questions", str(source), "--out", str(out)]) != 0
