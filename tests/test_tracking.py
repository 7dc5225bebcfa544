import builtins
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from mmalign.tracking import (
    METRICS,
    Console,
    NoTracker,
    RunTracker,
    Tracker,
    line,
    read,
    start_wandb,
    write_whole,
)


def tracker(folder, **settings):
    return RunTracker(folder, tensorboard=False, **settings)


def test_an_iteration_is_one_line(tmp_path):
    track = tracker(tmp_path)
    track.log(0, {"reward/lab": 0.5, "groups": 3})
    track.log(1, {"reward/lab": 0.25})
    assert read(tmp_path / METRICS) == [
        {"step": 0, "reward/lab": 0.5, "groups": 3},
        {"step": 1, "reward/lab": 0.25},
    ]


def test_numbers_are_written_exactly_and_nan_as_null(tmp_path):
    tracker(tmp_path).log(0, {"third": 1 / 3, "nan": math.nan, "inf": math.inf})
    assert read(tmp_path / METRICS) == [{"step": 0, "third": 1 / 3, "nan": None, "inf": None}]


def test_a_resumed_run_forgets_what_it_will_make_again(tmp_path):
    track = tracker(tmp_path)
    for step in range(4):
        track.log(step, {"x": step})
        track.rollouts(step, [{"prompt": "a"}])
        track.images(step, "step", Image.new("RGB", (2, 2)))
    tracker(tmp_path).resume(2)
    assert [row["step"] for row in read(tmp_path / METRICS)] == [0, 1]
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == [
        "step_000000.jsonl",
        "step_000001.jsonl",
    ]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step_000000.png", "step_000001.png", "step_000002.png"
    ]  # fmt: skip


def test_a_half_written_last_line_is_dropped(tmp_path):
    tracker(tmp_path).log(0, {"x": 1.0})
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 1, "x"')
    track = tracker(tmp_path)
    track.resume(1)
    track.log(1, {"x": 2.0})
    assert (tmp_path / METRICS).read_text() == '{"step": 0, "x": 1.0}\n{"step": 1, "x": 2.0}\n'


def test_a_text_that_is_killed_on_its_way_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_whole(path, "before")

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "after")
    assert path.read_text() == "before"
    monkeypatch.undo()
    write_whole(path, "after")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.yaml", "after")]


def test_rollouts_are_written_anew_and_as_often_as_asked(tmp_path):
    track = tracker(tmp_path, rollouts_every=2)
    for step in (0, 1, 2, 2):
        track.rollouts(step, [{"prompt": "héllo", "rewards": {"lab": [1.0, None]}}] * 3)
    found = {path.name: path.read_text() for path in (tmp_path / "rollouts").iterdir()}
    assert set(found) == {"step_000000.jsonl", "step_000002.jsonl"}
    rows = [json.loads(text) for text in found["step_000002.jsonl"].splitlines()]
    assert rows == [{"prompt": "héllo", "rewards": {"lab": [1.0, None]}}] * 3


@pytest.mark.slow
def test_tensorboard_events_hold_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track = RunTracker(tmp_path)
    track.log(0, {"reward/lab": 0.5})
    track.log(1, {"reward/lab": 0.75})
    track.images(1, "step", Image.new("RGB", (4, 4)))
    track.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/lab")] == [(0, 0.5), (1, 0.75)]
    assert events.Tags()["images"] == ["samples/step"]


def test_missing_wandb_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'mmalign\[wandb\]'.*WANDB_MODE=offline"):
        start_wandb("project", tmp_path, {})


def test_the_console_tells_the_mean_time_of_an_iteration(capsys):
    console = Console(3, every=0.0)
    for step, seconds in enumerate((1.0, 3.0)):
        console.log(step, {"seconds/iteration": seconds})
    assert capsys.readouterr().err.splitlines() == [
        "iteration 1/3  1.0 s each  0:02 left",
        "iteration 2/3  2.0 s each  0:02 left",
    ]


def test_the_console_line_shows_rewards_and_what_is_left():
    said = line(9, {"reward/lab": 0.5, "reward/lab/std": 0.1, "kl": 0.01}, 20, 3.0)
    assert said == "iteration 10/20  reward/lab 0.5  kl 0.01  3.0 s each  0:30 left"


def test_both_trackers_are_trackers(tmp_path):
    for kind in (NoTracker(), tracker(tmp_path)):
        names = [name for name in vars(Tracker) if not name.startswith("_")]
        assert names
        assert all(callable(getattr(kind, name)) for name in names)
    assert not (tmp_path / METRICS).exists()
