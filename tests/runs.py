"""A tiny pipeline and the settings that let any recipe run on it in seconds."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from mmalign.testing import tiny_sd3

ROOT = Path(__file__).resolve().parent.parent


@cache
def tiny() -> Path:
    """One random pipeline for all tests of the session."""
    folder = Path(tempfile.mkdtemp(prefix="mmalign_tiny_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return tiny_sd3(folder)


def small(folder: Path, *more: str) -> list[str]:
    """Overrides that make a recipe tiny and put its run into `folder`."""
    return [
        f"policy.model={tiny()}",
        "policy.height=64",
        "policy.width=64",
        "prompts.file=assets/lab/prompts/train.txt",
        "prompts.heldout_file=assets/lab/prompts/heldout.txt",
        "prompts.per_iteration=2",
        "prompts.group=2",
        "algorithm.steps=4",
        "training.iterations=2",
        "training.updates=2",
        "evaluation.prompts=3",
        "evaluation.seeds=2",
        "evaluation.steps=2",
        "run.tensorboard=false",
        f"run.dir={folder}",
        *more,
    ]
