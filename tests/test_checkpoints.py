"""Checkpoints: whole or not there at all."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign import checkpoints


def write(folder: Path, value: float = 1.0) -> None:
    checkpoints.write_state(folder, {"x": torch.full((3,), value), "n": [1, {"a": None}], "name": "é"})
    (folder / "sub").mkdir()
    (folder / "sub" / "weights.bin").write_bytes(b"w" * 100)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    folder = checkpoints.save(tmp_path, 12, write)
    assert folder == tmp_path / "checkpoints" / "step_000012" == checkpoints.latest(tmp_path)
    state = checkpoints.read_state(folder)
    assert torch.equal(state["x"], torch.ones(3))
    assert state["n"] == [1, {"a": None}]


def test_a_failing_write_leaves_the_earlier_checkpoint(tmp_path):
    first = checkpoints.save(tmp_path, 1, write)

    def broken(folder: Path) -> None:
        write(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(tmp_path, 2, broken)
    assert checkpoints.latest(tmp_path) == first
    checkpoints.save(tmp_path, 2, write)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("harm", ["manifest", "file", "short", "garbage"])
def test_what_is_not_complete_is_passed_over(tmp_path, harm):
    first, second = (checkpoints.save(tmp_path, step, write) for step in (1, 2))
    if harm == "manifest":
        (second / checkpoints.MANIFEST).unlink()
    elif harm == "file":
        (second / "sub" / "weights.bin").unlink()
    elif harm == "short":
        (second / checkpoints.STATE).write_bytes((second / checkpoints.STATE).read_bytes()[:-7])
    else:
        (second / checkpoints.MANIFEST).write_text('{"fil')
    assert checkpoints.latest(tmp_path) == first
    with pytest.raises(checkpoints.CheckpointError, match="not a complete checkpoint"):
        checkpoints.read_state(second)
    assert checkpoints.save(tmp_path, 2, write) == checkpoints.latest(tmp_path)


def test_only_the_last_few_are_kept(tmp_path):
    for step in range(5):
        checkpoints.save(tmp_path, step, write, keep=2)
    assert [step for step, _ in checkpoints.all_of(tmp_path)] == [3, 4]
    checkpoints.save(tmp_path, 5, write, keep=0)
    assert [step for step, _ in checkpoints.all_of(tmp_path)] == [3, 4, 5]


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    (tmp_path / "checkpoints" / "step_000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_x").mkdir()
    assert checkpoints.latest(tmp_path) is None


def test_the_global_generators_go_on_where_they_were():
    state = checkpoints.random_state()

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002

    first = draw()
    checkpoints.restore_random(state)
    assert draw() == first


def save_for_ever(run_dir: Path) -> None:
    for step in range(10**6):

        def fill(folder: Path, step: int = step) -> None:
            checkpoints.write_state(folder, {"step": torch.full((10_000,), float(step))})
            for i in range(3):
                (folder / f"part_{i}").write_bytes(bytes(100_000))

        checkpoints.save(run_dir, step, fill, keep=2)


def test_killed_at_any_moment_the_latest_checkpoint_loads(tmp_path):
    seen = []
    for delay in (0.02, 0.05, 0.09, 0.14, 0.2):
        child = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(tmp_path,))
        child.start()
        while not checkpoints.all_of(tmp_path) and child.is_alive():
            time.sleep(0.01)
        time.sleep(delay)
        child.kill()
        child.join()
        for step, folder in checkpoints.all_of(tmp_path):
            assert (checkpoints.read_state(folder)["step"] == step).all()
            seen.append(step)
    assert seen
