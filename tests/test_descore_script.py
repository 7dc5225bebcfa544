"""scripts/descore.py from nothing to a judge that is measured, with steps of a second."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def descore(monkeypatch, tmp_path):
    script = runpy.run_path(str(ROOT / "scripts/descore.py"))["main"]
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["descore.py", *map(str, words)])
        script()

    return run


@pytest.mark.slow
def test_from_a_captioner_to_a_judge_of_videos(descore, tmp_path, capsys):
    start = ROOT / "assets/lab/captioner"
    descore("watcher", "--out", "watch", "--start", start, "--steps", 1, "--pairs", 1)
    descore("pairs", "--out", "pairs", "--count", 6)
    lines = (tmp_path / "pairs/pairs.jsonl").read_text().splitlines()
    assert len(lines) == 6
    cold = ("--instruction", "{prompt}", "--frames", 3, "--longest", 8, "--batch", 2, "--rank", 2)
    common = ("--pairs", "pairs", "--steps", 1, "--calibrate", 2)
    descore("train", "--stage", 1, "--model", "watch/watcher", "--out", "cold", *common, *cold)
    dual = ("--batch", 2, "--rollouts", 2, "--minibatch", 1)
    descore("train", "--stage", 2, "--start", "cold", "--out", "dual", *common, *dual)
    assert {"reward", "accuracy", "preference", "kl"} <= json.loads(Path("dual/log.jsonl").read_text()).keys()
    descore("evaluate", "--weights", "dual", "--pairs", "pairs", "--json", "found.json", "--batch", 3)
    found = json.loads(Path("found.json").read_text())
    assert found["all"]["pairs"] == sum(not json.loads(line)["tie"] for line in lines)
    assert "| all |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: stage 2 needs --start, what stage 1 wrote"):
        descore("train", "--stage", 2, "--pairs", "pairs", "--out", "other")
    descore("train", "--stage", 2, "--start", "cold", "--out", "dual", *common, *dual)  # it is done already
    with pytest.raises(SystemExit, match="error: stage 2 takes no --hide"):
        descore("train", "--stage", 2, "--start", "cold", "--hide", 0.1, "--out", "other", *common)
    with pytest.raises(SystemExit, match=r"error: nowhere: has no pairs\.jsonl"):
        descore("train", "--stage", 2, "--start", "cold", "--pairs", "nowhere", "--out", "other")
