import json
import re
from xml.dom import minidom

import pytest
import torch

from mmalign import report
from mmalign.charts import COLORS, Line, bars, chart, figure, running_mean, ticks
from mmalign.evaluation import Verdict, summarize
from mmalign.grids import Panel, grid
from mmalign.tracking import RunTracker

KINDS = ["counting", "colors", "counting", "colors"]


def evaluated(shift, spread=1.0):
    found = [
        Verdict(
            {"lab": 0.1 * i + shift, "strict": float(i + 10 * shift > 2), "soft": 0.1 * i + shift}, KINDS[i]
        )
        for i in range(4)
    ]
    images = torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), spread)] * 4)
    twice = [v for v in found for _ in range(2)]
    return summarize(twice, images, torch.arange(4).repeat_interleave(2))


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "run"
    track = RunTracker(run, tensorboard=False)
    for step in range(6):
        track.log(
            step,
            {
                "reward/lab": 0.1 * step,
                "reward/lab/group_std": 0.2,
                "reward/lab/missing": 0.0,
                "groups/flat_share": 0.25,
                "ratio": 1.0,
                "log_ratio_max": 1e-5,
                "noise_floor/max": 1e-7,
                "clip_share": float("nan") if step == 2 else 0.1,
                "kl": 0.01 * step,
                "grad_norm": 1.0,
                "forwards/sample": 100.0 * (step + 1),
                "forwards/train": 20.0 * (step + 1),
                "forwards/reference": 0.0,
                "memory/peak_bytes": 1000.0 + step,
                "seconds/sample": 1.0,
                "seconds/reward": 0.5,
                "seconds/update": 2.0,
                "seconds/evaluate": 0.25,
                "seconds/other": 0.25,
                "seconds/iteration": 4.0,
                "share/reward": 0.125,
                **({"heldout/soft": 0.2} if step == 3 else {}),
            },
        )
    (run / "config.yaml").write_text("training: {seed: 7}\nevaluation: {seed: 3}\npolicy: {model: <m>}\n")
    (run / "facts.json").write_text(
        json.dumps({"setup_seconds": 2.0, "device": "cpu", "heldout_file": "h.txt"})
    )
    (run / "evaluation").mkdir()
    evaluated(0.0).save(run / "evaluation" / "base.json")
    evaluated(0.2, 0.9).save(run / "evaluation" / "trained.json")
    sheet = grid(["a"], [Panel("before", torch.rand(1, 3, 8, 8)), Panel("after", torch.rand(1, 3, 8, 8))])
    for name in ("before_after", "step_000000", "step_000006"):
        track.images(0, "step", sheet)
        sheet.save(run / "samples" / f"{name}.png")
    return run


def test_the_report_holds_every_promised_number(folder):
    result = report.write(folder)
    assert json.loads((folder / "report.json").read_text()) == result
    assert result["heldout"]["strict"]["base"] == pytest.approx(0.25)
    assert result["heldout"]["strict"]["trained"] == pytest.approx(0.75)
    assert result["heldout"]["soft"]["gain"] == pytest.approx(0.2)
    assert result["heldout"]["soft"]["gain_interval"] == [pytest.approx(0.2), pytest.approx(0.2)]
    assert result["heldout_by_category"]["soft"]["counting"]["base"] == pytest.approx(0.1)
    assert result["diversity"] == {
        "base": pytest.approx(1.0), "trained": pytest.approx(0.9), "ratio": pytest.approx(0.9)
    }  # fmt: skip
    assert result["forwards"]["sample"] == 600
    assert result["forwards"]["train"] == 120
    assert result["peak_memory_bytes"] == 1005
    assert result["seeds"] == {"training": 7, "evaluation": 3}
    assert result["iterations"] == 6


def test_seconds_of_the_parts_add_up_to_the_total(folder):
    seconds = report.write(folder)["seconds"]
    assert seconds["total"] == pytest.approx(6 * 4.0 + 2.0)
    assert seconds["total"] == pytest.approx(sum(value for name, value in seconds.items() if name != "total"))
    assert (seconds["sample"], seconds["reward"], seconds["update"]) == (6.0, 3.0, 12.0)


def test_the_page_is_whole_and_self_contained(folder):
    report.write(folder)
    page = (folder / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in page
    for title in ("Held-out prompts", "Before and after", "Curves", "Health", "Cost", "Settings"):
        assert f"<h2>{title}</h2>" in page
    for words in (
        "Clip share",
        "Groups without variance",
        "Log-ratio",
        "share of the time",
        "diversity",
        "counting",
    ):
        assert words in page
    assert "&lt;m&gt;" in page
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower().replace("finance", "")


def test_a_run_without_evaluations_still_has_a_report(tmp_path):
    RunTracker(tmp_path, tensorboard=False).log(0, {"reward/x": 1.0, "seconds/iteration": 1.0})
    result = report.write(tmp_path)
    assert result["heldout"] == {}
    assert result["diversity"]["ratio"] is None
    assert (tmp_path / "report.html").stat().st_size > 500


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no folder of a run: it has no metrics\.jsonl"):
        report.write(tmp_path)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 0.94), (-3e-7, 2e-6), (12, 48_000)])
def test_ticks_are_few_round_and_cover_the_range(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 3 <= len(marks) <= 8


def test_a_chart_draws_every_line_inside_its_frame():
    drawn = chart(
        [Line("a", [0, 1, 2], [0.0, float("nan"), 4.0], smooth=2), Line("b", [2], [1.0], [0.5], [1.5])]
    )
    svg = drawn[: drawn.index("</svg>") + 6].replace("role=img", "")
    shapes = minidom.parseString(re.sub(r"=([\w.#]+)(?=[ />])", r'="\1"', svg))
    numbers = [
        float(n)
        for path in shapes.getElementsByTagName("path")
        if "line" in path.getAttribute("class").split()
        for n in re.findall(r"[\d.]+", path.getAttribute("d"))
    ]
    assert min(numbers) >= 0
    assert max(numbers) <= 520
    assert drawn.count("<i style") == 2


def test_a_chart_of_nothing_says_so():
    assert "nothing was measured" in chart([Line("a", [], [])])
    assert "<svg" in chart([Line("flat", [0, 1], [2.0, 2.0])])


def test_a_running_mean_looks_back():
    assert running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


def test_shares_are_told_in_percent():
    assert "sample 75.0%" in bars([("sample", 3.0), ("update", 1.0)])


@pytest.mark.parametrize(("seconds", "said"), [(5.25, "5.2 s"), (125, "2 min 05 s"), (7260, "2 h 01 min")])
def test_durations_are_said_as_people_do(seconds, said):
    assert report.duration(seconds) == said


def test_a_figure_is_a_picture_of_its_own():
    lines = [Line("a < b", [0, 1.5], [0.0, 1.0], dots=True), Line("one", [1.0], [0.5], [0.4], [0.6])]
    page = minidom.parseString(figure(lines, "score & more", "nats"))
    told = {text.firstChild.data for text in page.getElementsByTagName("text")}
    assert {"score & more", "nats", "a < b", "one", "0.5"} <= told
    strokes = [path.getAttribute("stroke") for path in page.getElementsByTagName("path")]
    assert strokes.count(COLORS[0]) == 1
    assert strokes.count(COLORS[1]) == 2, "a point and its interval"


def hacked(folder, gold):
    """Evaluations of a run of six iterations whose trained reward rises while a watching one does as told."""
    (folder / "config.yaml").write_text("rewards: {proxy: {weight: 1.0}, gold: {weight: 0.0}}\n")
    ease = torch.linspace(-0.2, 0.2, 40)
    for i, (name, step) in enumerate((("base", 0), ("step_000002", 2), ("step_000004", 4), ("trained", 6))):
        rows = [Verdict({"proxy": 0.1 * step + float(e), "gold": gold[i] + float(e) ** 2}) for e in ease]
        found = summarize(rows, torch.zeros(40, 3, 8, 8), torch.arange(40))
        found.save(folder / "evaluation" / f"{name}.json")


def test_the_step_where_a_hacked_reward_parts_is_told(folder):
    hacked(folder, [0.2, 0.4, 0.3, 0.1])
    (found,) = report.write(folder)["hacking"]
    assert (found["trained"], found["watching"], found["parted"], found["step"]) == ("proxy", "gold", True, 2)
    assert found["rise"] == pytest.approx(0.4)
    assert found["fall"] == pytest.approx(-0.3)
    page = (folder / "report.html").read_text()
    assert "proxy against gold: they part after 2 iterations" in page
    assert "Gain in deviations over prompts" in page


def test_rewards_that_rise_together_do_not_part(folder):
    hacked(folder, [0.2, 0.3, 0.4, 0.5])
    (found,) = report.write(folder)["hacking"]
    assert not found["parted"]
    assert "they do not part" in (folder / "report.html").read_text()


def test_without_a_watching_reward_there_is_nothing_to_part_from(folder):
    assert report.write(folder)["hacking"] == []
    assert "watching" not in (folder / "report.html").read_text()


def test_the_static_alarm_is_told(tmp_path):
    for rang in ((), (3, 4)):
        run = tmp_path / str(len(rang))
        track = RunTracker(run, tensorboard=False)
        for step in range(6):
            alarm = float(step + 1 in rang)
            track.log(
                step, {"reward/motion": 0.5, "reward/motion/static": alarm, "health/static_alarm": alarm}
            )
        assert report.write(run)["static_alarm"] == [*rang]
        page = (run / "report.html").read_text()
        assert "Videos that stand still" in page
        told = "it rang in 2 of 6 iterations, first in iteration 3" if rang else "Static alarm: silent"
        assert told in page


def test_runs_of_pictures_have_no_static_alarm(folder):
    assert report.write(folder)["static_alarm"] == []
    assert "alarm" not in (folder / "report.html").read_text()
