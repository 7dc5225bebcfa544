"""The checkpoint of a reward model's own training, from which a killed run goes on exactly."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECKPOINT = "training.pt"
Row = dict[str, float]


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """32 hex digits that stand for the contents, shapes and order of some tensors."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        found.update(f"{whole.dtype} {tuple(whole.shape)}".encode())
        found.update(whole.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class TrainingState:
    """What a training has to know to go on: the file training.pt of a folder; without one nothing is kept.

    begun: all that the numbers of a run depend on, by which it is known again. tensors: those that it changes
    (what learns, running means), on any device. generator: of its draws, where these are not keyed by their
    step. every: steps from one checkpoint to the next.
    """

    folder: Path | None
    begun: Mapping[str, Any]
    tensors: Sequence[Tensor]
    optimizers: Sequence[torch.optim.Optimizer]
    generator: torch.Generator | None = None
    every: int = 100

    @torch.no_grad()
    def load(self) -> list[Row]:
        """The rows of the steps that were done, whose outcome is put in place.

        Raises:
            ValueError: the run was begun with other settings, data or weights.
        """
        if self.folder is None or not (file := self.folder / CHECKPOINT).is_file():
            return []
        state = torch.load(file, map_location="cpu", weights_only=True)
        if odd := sorted(name for name in self.begun if self.begun[name] != state["begun"].get(name)):
            raise ValueError(f"{file}: was begun with other {', '.join(odd)}: use another --out")
        for tensor, saved in zip(self.tensors, state["tensors"], strict=True):
            tensor.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.generator is not None:
            self.generator.set_state(state["draws"])
        rows: list[Row] = state["rows"]
        return rows

    def save(self, rows: Sequence[Row], last: bool) -> None:
        """After each step: the rows of all steps so far; last: whether no step follows."""
        if self.folder is None or not (last or len(rows) % self.every == 0):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / CHECKPOINT
        state = {
            "begun": dict(self.begun),
            "rows": list(rows),
            "tensors": [tensor.detach() for tensor in self.tensors],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "draws": None if self.generator is None else self.generator.get_state(),
        }
        torch.save(state, file.with_suffix(".partial"))
        os.replace(file.with_suffix(".partial"), file)
