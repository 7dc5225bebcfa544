"""A run that was killed and started again ends as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import FIELDS, WHEN, make
from toys import Notes, ToyFlow, source

from mmalign import checkpoints
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.distributed import Distributed
from mmalign.scoring import Scorer
from mmalign.trainer import Trainer, TrainingSettings

ROOT = Path(__file__).parents[1]


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what depends on the clock or the machine."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(FIELDS)} for row in rows]


def state(run_dir: Path) -> dict[str, Any]:
    folder = checkpoints.latest(run_dir)
    assert folder is not None
    return checkpoints.read_state(folder)


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_bit_for_bit_as_one_that_ran_through(tmp_path):
    child = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "killed.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert [end["signal"] for end in told] == [9] * len(WHEN) + [0]
    # Each start went on from the last complete checkpoint: the second one died while it was being written.
    assert [end["went_on_from"] for end in told] == [0, 2, 2, 4, 4]
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "through")
    assert len(metrics(tmp_path / "through")) == 7
    one, two = state(tmp_path / "through"), state(tmp_path / "killed")
    for found in (one, two):
        del found["seconds"]
    assert_same(one, two)
    rows = [sorted((tmp_path / name / "rollouts").iterdir()) for name in ("through", "killed")]
    assert [p.name for p in rows[0]] == [p.name for p in rows[1]]
    assert all(a.read_text() == b.read_text() for a, b in zip(*rows, strict=True))


def test_a_resumed_run_does_not_start_again(tmp_path):
    first = make(tmp_path, iterations=2)
    first.run()
    again = make(tmp_path, iterations=2)
    again.run()
    assert again.policy.forwards.sample == first.policy.forwards.sample
    longer = make(tmp_path, iterations=3)
    assert longer.resume()
    assert longer.iteration == 2
    for a, b in zip(longer.learner.parameters, first.learner.parameters, strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_shards_goes_on_where_they_are_cut_alike(tmp_path, monkeypatch):
    make(tmp_path, iterations=1).run()
    monkeypatch.setattr(Distributed, "holding", "shards of 2 processes by ZeRO-3")
    said = (
        "holds all weights, and each process of this run is to hold shards of 2 processes by ZeRO-3: launch"
    )
    with pytest.raises(checkpoints.CheckpointError, match=said):
        make(tmp_path, iterations=2).run()


def test_a_checkpoint_of_another_policy_is_refused(tmp_path):
    make(tmp_path, iterations=1).run()
    policy = ToyFlow()
    policy.module.frozen.requires_grad_(True)
    settings = TrainingSettings(iterations=2)
    algorithm = FlowGRPO(steps=4, clip=1e-2).build({"learned": 1.0})
    other = Trainer(
        policy, algorithm, Scorer(make(tmp_path, 1).scorer.rewards), source(), settings, run_dir=tmp_path
    )
    with pytest.raises(checkpoints.CheckpointError, match="not those of this policy"):
        other.resume()


def test_without_a_checkpoint_a_run_starts_and_forgets_what_a_dead_one_logged(tmp_path):
    notes = Notes()
    notes.log(0, {"old": 1.0})
    found = make(tmp_path, iterations=1)
    found.tracker = notes
    assert not found.resume()
    assert notes.metrics == {}
