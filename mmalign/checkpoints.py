"""Checkpoints that are whole or not there at all.

A checkpoint is written into a hidden folder beside its place, flushed to the disk, and moved there in one
step. Its manifest, written last, lists every file with its size: `latest` passes over whatever is not
complete.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmalign.contracts import Policy

FOLDER, MANIFEST, STATE = "checkpoints", "manifest.json", "resume.pt"
_NAME = re.compile(r"step_(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says which and why."""


def place(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` iterations lies."""
    return run_dir / FOLDER / f"step_{step:06d}"


def save(
    run_dir: Path,
    step: int,
    write: Callable[[Path], None],
    keep: int = 0,
    main: bool = True,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Let `write` fill a folder and make it the checkpoint after `step` iterations.

    keep: how many of the latest to keep; 0 keeps all. With several processes all of them call this and
    `write` into one folder, which the main one makes and puts in place.
    """
    target = place(run_dir, step)
    draft = target.with_name(f".draft_{target.name}")
    if main:
        _remove(draft)
        draft.mkdir(parents=True)
    barrier()
    write(draft)
    barrier()
    if main:
        seal(draft)
        _remove(target)  # not complete, or of a run that was taken back to an earlier iteration
        draft.rename(target)
        _flush(target.parent)
        prune(run_dir, keep)
    barrier()
    return target


def seal(folder: Path) -> None:
    """Flush every file and write the manifest that makes the folder complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        _flush(path)
    manifest = folder / MANIFEST
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest.write_text(json.dumps({"files": sizes}, indent=1))
    for path in (manifest, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _flush(path)


def complete(folder: Path) -> bool:
    """Whether every file of the manifest is there in full."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def all_of(run_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run with the number of iterations behind each, oldest first."""
    folder = run_dir / FOLDER
    found = [(_NAME.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    return sorted((int(name[1]), path) for name, path in found if name and complete(path))


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = all_of(run_dir)
    return found[-1][1] if found else None


def weights_of(folder: Path) -> Path:
    """Where the weights lie that a run has written: its latest checkpoint, or the folder itself."""
    if (folder / FOLDER).is_dir():
        found = latest(folder)
        if found is None:
            raise FileNotFoundError(f"{folder} is a run without a complete checkpoint; let it train on")
        return found
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; the run that writes it has to be trained first, such as by "
            f"mmalign train --config assets/recipes/{folder.name}.yaml"
        )
    return folder


def begin(policy: Policy, weights: str | None) -> None:
    """Give a policy the weights that a run has written (`policy.weights`); None: it keeps its own."""
    if weights is not None:
        policy.load(weights_of(Path(weights)))


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints (0: none), and drafts that a killed run left behind."""
    for path in (run_dir / FOLDER).glob(".*"):
        _remove(path)
    for _, path in all_of(run_dir)[:-keep] if keep else ():
        _remove(path)


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Put a nest of dicts, lists, tensors and numbers into the folder."""
    torch.save(dict(state), folder / STATE)


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU; nothing but tensors and plain values is ever unpickled."""
    if not complete(folder):
        raise CheckpointError(f"{folder}: not a complete checkpoint (its files do not match {MANIFEST})")
    state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    return state


def random_state() -> dict[str, Any]:
    """The state of the global generators, for rewards that draw from them; our own streams are keyed."""
    import numpy as np

    _, words, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (
            torch.from_numpy(np.asarray(words).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave."""
    import numpy as np

    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    words = keys.numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _remove(path: Path) -> None:
    """Delete a folder so that, killed halfway, no part of it passes for a checkpoint."""
    if not path.exists():
        return
    gone = path.with_name(f".gone_{path.name.lstrip('.')}")
    if gone != path:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
    shutil.rmtree(gone)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
