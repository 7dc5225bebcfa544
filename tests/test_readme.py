"""What the README shows can be typed."""

import json
import re
import shlex
from pathlib import Path

import pytest
from runs import ROOT, small

from mmalign.cli import main, parse

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = [line.partition("#")[0].strip() for line in LINES if line.startswith("mmalign ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line, capsys):
    words = shlex.split(line)[1:]
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            parse(words)
    else:
        assert parse(words).command is not None


def test_there_is_a_line_for_every_important_command():
    named = {line.split()[1] for line in COMMANDS}
    assert {"train", "sample", "evaluate", "benchmark", "plan", "reproduce"} <= named


@pytest.mark.parametrize(
    ("experiment", "arm", "scores"),
    [
        ("claimdiff", "claims", ("hallucination", "omission")),
        ("editing", "nft", ("strict", "change")),
        ("video", "clips", ("direction",)),
        ("video", "frames", ("direction",)),
    ],
)
def test_figures_are_those_of_the_results(experiment, arm, scores):
    arms = json.loads((ROOT / f"docs/results/{experiment}.json").read_text())["arms"]
    for found in (arms[arm]["scores"][score] for score in scores):
        for value in (found["base"], found["trained"]["value"]):
            assert f"{100 * value:.1f} %" in README


def test_links_lead_somewhere():
    places = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert [place for place in places if not (ROOT / place).exists()] == []


@pytest.mark.slow
def test_a_reward_of_ones_own_is_one_file(tmp_path: Path, monkeypatch):
    (source,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "class Brightness" in b]
    (tmp_path / "brightness_of_the_readme.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    given = ["train", "--plan", "--config", "assets/recipes/lab_flow_grpo_fast.yaml"]
    reward = "rewards.brightness_of_the_readme:Brightness=1"
    assert main([*given, *small(tmp_path / "run", reward)]) == 0
