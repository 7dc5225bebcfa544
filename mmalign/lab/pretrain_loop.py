"""The one loop of pretraining: a schedule, moving averages, a log and a checkpoint that continues exactly."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """Warm up, hold, decay linearly to zero.

    The hold does not depend on `steps`: a finished or interrupted run may continue with more steps, and the
    same checkpoint may be brought to its end earlier.
    """

    steps: int
    warmup: int = 50
    decay: int = 400

    def __call__(self, step: int) -> float:
        """The share of the full learning rate at a step, the first being 0."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / max(self.decay, 1))


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix-shaped updates are orthogonalized (Jordan et al. 2024), scaled to AdamW's RMS.

    As torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but in fp32, which is ten times faster than bf16
    on CPUs without bf16 units, and with all matrices of one shape in one batch.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    direction = parameter.grad.lerp(momentum, group["momentum"])
                    by_shape.setdefault(parameter.shape, []).append((parameter, direction))
            for shape, found in by_shape.items():
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                updates = orthogonalize(torch.stack([direction for _, direction in found]))
                for (parameter, _), update in zip(found, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=size)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices [n, rows, columns] of the same singular vectors, singular values near 1 (Newton-Schulz)."""
    flipped = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if flipped else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if flipped else x


def split_optimizers(
    modules: Mapping[str, nn.Module], lr: float, decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers, AdamW for embeddings, biases and gains (those without decay)."""
    named = [(key, p) for module in modules.values() for key, p in module.named_parameters()]
    inner = [p for key, p in named if p.ndim == 2 and "embed" not in key and "prototypes" not in key]
    kept = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in kept]
    return [Muon(inner, lr, decay=decay), torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=0.0)]


class Average:
    """An exponential moving average of the parameters of several modules."""

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.values = {
            f"{name}.{key}": parameter.detach().clone()
            for name, module in modules.items()
            for key, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, modules: Mapping[str, nn.Module], step: int) -> None:
        """Moves toward the modules; the decay grows from 0, so that the initial weights are forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, module in modules.items():
            for key, parameter in module.named_parameters():
                self.values[f"{name}.{key}"].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self, modules: Mapping[str, nn.Module]) -> None:
        """Exchanges the averages with the modules' parameters; a second call exchanges them back."""
        for name, module in modules.items():
            for key, parameter in module.named_parameters():
                value = self.values[f"{name}.{key}"]
                live = parameter.detach().clone()
                parameter.copy_(value)
                value.copy_(live)


@dataclass
class Stage:
    """One training: what learns, how, and where its state lives.

    `loss(step, generator)` gives the loss and the numbers to log, all its randomness from the generator. That
    is keyed by seed, stage and step, so that a continued run draws what an uninterrupted one would have.
    """

    name: str
    folder: Path
    modules: Mapping[str, nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    schedule: Schedule
    loss: Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]
    seed: int = 0
    ema: float = 0.997
    save_every: int = 250
    clip: float = 1.0

    def __post_init__(self) -> None:
        self.average = Average(self.modules, self.ema)
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def run(self, on_save: Callable[[int], None] = lambda step: None) -> None:
        """Trains from the last checkpoint to the end, then leaves the averaged weights in the modules.

        `on_save(step)` is called at every checkpoint, with the averaged weights in the modules.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        start = self._load()
        parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        bar = tqdm(range(start, self.schedule.steps), self.name, initial=start, total=self.schedule.steps)
        with open(self.folder / f"{self.name}.jsonl", "a") as log:
            for step in bar:
                began = time.perf_counter()
                factor = self.schedule(step)
                for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * factor
                loss, numbers = self.loss(step, keyed(self.seed, self.name, step))
                loss.backward()  # type: ignore[no-untyped-call]
                norm = nn.utils.clip_grad_norm_(parameters, self.clip, error_if_nonfinite=True)
                for optimizer in self.optimizers:
                    optimizer.step()
                for parameter in parameters:
                    parameter.grad = None
                self.average.update(self.modules, step)
                seconds = time.perf_counter() - began
                row = {"step": step + 1, "loss": loss.item(), **numbers, "norm": norm.item(), "rate": factor}
                log.write(json.dumps({**row, "seconds": round(seconds, 3)}) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                if (step + 1) % self.save_every == 0 or step + 1 == self.schedule.steps:
                    self._save(step + 1)
                    self.average.swap(self.modules)
                    on_save(step + 1)
                    self.average.swap(self.modules)
        self.average.swap(self.modules)

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average.values,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def _load(self) -> int:
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        if state["step"] > self.schedule.steps:
            raise ValueError(
                f"{self.checkpoint}: has {state['step']} steps, more than the {self.schedule.steps} asked for"
            )
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average.values = state["average"]
        return int(state["step"])


def keyed(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator for one purpose and index, independent of every other."""
    key = int.from_bytes(purpose.encode()[:4].ljust(4), "big")
    return torch.Generator().manual_seed((seed * 1_000_003 + key) * 1_000_003 + index)


def remember(config: Any, out: Path, free: Sequence[str]) -> None:
    """Writes the settings, a dataclass, beside the run; refuses to go on with others but the `free` ones."""
    out.mkdir(parents=True, exist_ok=True)
    file, now = out / "pretraining.json", asdict(config)
    if file.exists():
        before = json.loads(file.read_text())
        if changed := [key for key in now if now[key] != before.get(key) and key not in free]:
            raise ValueError(f"{out}: was begun with other settings of {changed}: use another --out")
    file.write_text(json.dumps(now, indent=2) + "\n")
