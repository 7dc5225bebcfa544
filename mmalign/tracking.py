"""What a run writes as it goes: metrics, rollouts, pictures, and a line on the console.

Everything lies in the run's folder as plain files; TensorBoard and Weights & Biases get copies. Only the main
process writes.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

METRICS, ROLLOUTS, SAMPLES = "metrics.jsonl", "rollouts", "samples"


class Tracker(Protocol):
    """Where the loop puts what it measured."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def rollouts(self, step: int, rows: Iterable[Mapping[str, object]]) -> None: ...

    def images(self, step: int, name: str, image: Image) -> None: ...

    def resume(self, step: int) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    """Writes nothing: for the other processes, and where nobody reads."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        return

    def rollouts(self, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        return

    def images(self, step: int, name: str, image: Image) -> None:
        return

    def resume(self, step: int) -> None:
        return

    def close(self) -> None:
        return


class RunTracker:
    """Writes into a run's folder; `iterations` and `shown` shape the console line alone."""

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool = True,
        wandb: str = "",
        rollouts_every: int = 1,
        iterations: int | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._rollouts_every = rollouts_every
        self._console = Console(iterations)
        self._tensorboard_wanted, self._tensorboard = tensorboard, None
        self._wandb = start_wandb(wandb, run_dir, settings) if wandb else None
        run_dir.mkdir(parents=True, exist_ok=True)

    def resume(self, step: int) -> None:
        """Forget everything at and after iteration `step`, which will be made again."""
        truncate(self.run_dir / METRICS, step)
        for path in (self.run_dir / ROLLOUTS).glob("step_*.jsonl"):
            if number_of(path) >= step:
                path.unlink()
        for path in (self.run_dir / SAMPLES).glob("step_*.png"):
            if number_of(path) > step:  # the pictures of step n are drawn after n iterations
                path.unlink()
        self._purge = step

    _purge = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step, **{name: number(value) for name, value in metrics.items()}}
        append(self.run_dir / METRICS, [row])
        if self._tensorboard_wanted:
            for name, value in metrics.items():
                self._writer().add_scalar(name, float(value), step)
        if self._wandb is not None:
            # Pictures are drawn after the iteration and logged before its numbers; steps must not go back.
            self._wandb.log({name: float(value) for name, value in metrics.items()}, step=step + 1)
        self._console.log(step, metrics)

    def rollouts(self, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        """One line a sample: prompt, seed, every reward at its own grain, advantage."""
        if not self._rollouts_every or step % self._rollouts_every:
            return
        path = self.run_dir / ROLLOUTS / f"step_{step:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        append(path, rows, anew=True)

    def images(self, step: int, name: str, image: Image) -> None:
        """A picture drawn after `step` iterations, as samples/<name>_<step>.png."""
        path = self.run_dir / SAMPLES / f"{name}_{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        if self._tensorboard_wanted:
            import numpy as np

            self._writer().add_image(
                f"samples/{name}", np.asarray(image.convert("RGB")), step, dataformats="HWC"
            )
        if self._wandb is not None:
            import wandb

            self._wandb.log({f"samples/{name}": wandb.Image(image)}, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _writer(self) -> Any:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            writer: Any = SummaryWriter(str(self.run_dir), purge_step=self._purge or None)  # type: ignore[no-untyped-call]
            self._tensorboard = writer
        return self._tensorboard


def start_wandb(project: str, run_dir: Path, settings: Mapping[str, object] | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise ImportError(
            f"run.wandb={project!r} needs Weights & Biases: pip install 'mmalign[wandb]', or leave run.wandb "
            f"empty; without a network set WANDB_MODE=offline and sync later"
        ) from None
    return wandb.init(
        project=project, name=run_dir.name, dir=str(run_dir), config=dict(settings or {}), resume="allow"
    )


def number(value: float) -> float | int | None:
    """A value as JSON has it; JSON has no NaN."""
    if isinstance(value, bool | int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def append(path: Path, rows: Iterable[Mapping[str, object]], anew: bool = False) -> None:
    """Add rows to a .jsonl file and flush them to the disk."""
    with open(path, "w" if anew else "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one move: a killed run leaves the one before or this one, never a part of it."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a last line that a killed run left half written is not one."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def truncate(path: Path, step: int) -> None:
    """Keep the rows of iterations before `step`; the file is replaced in one move."""
    if not path.is_file():
        return
    kept = [row for row in read(path) if row["step"] < step]
    beside = path.with_suffix(".tmp")
    append(beside, kept, anew=True)
    beside.replace(path)


def number_of(path: Path) -> int:
    """The iteration in a name such as step_000012.png."""
    return int(path.stem.rpartition("_")[2])


class Console:
    """One line an iteration: on a terminal it stays in place, in a file it comes every few seconds."""

    def __init__(self, iterations: int | None = None, every: float = 10.0) -> None:
        self._iterations, self._every = iterations, every
        self._live = sys.stderr.isatty()
        self._said = self._spent = 0.0
        self._count = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._count += 1
        self._spent += metrics.get("seconds/iteration", 0.0)
        last = self._iterations is not None and step + 1 >= self._iterations
        if not (self._live or last or now - self._said >= self._every):
            return
        self._said = now
        text = line(step, metrics, self._iterations, self._spent / self._count)
        print(
            f"\r\x1b[K{text}" if self._live else text,
            end="" if self._live and not last else "\n",
            file=sys.stderr,
        )
        sys.stderr.flush()


def line(step: int, metrics: Mapping[str, float], iterations: int | None, seconds: float) -> str:
    """The console line of an iteration."""
    total = f"/{iterations}" if iterations else ""
    parts = [f"iteration {step + 1}{total}"]
    parts += [f"{name} {metrics[name]:.3g}" for name in shown(metrics)]
    parts.append(f"{seconds:.1f} s each")
    if iterations:
        left = seconds * (iterations - step - 1)
        parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
    return "  ".join(parts)


def shown(metrics: Mapping[str, float]) -> Sequence[str]:
    """The numbers worth a place on the console: every reward, then the health of the update."""
    rewards = [name for name in metrics if name.startswith("reward/") and name.count("/") == 1]
    return [*rewards[:4], *(name for name in ("kl", "clip_share", "grad_norm") if name in metrics)]
