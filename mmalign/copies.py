"""Frozen copies of the trainable parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ramp:
    """How much of itself a copy keeps as it follows: start, and from `wait` on slope more each iteration."""

    start: float = 0.0  # before it rises; 0 is always the last policy
    slope: float = 0.001  # rise with each iteration
    most: float = 0.5  # where it stops rising
    wait: int = 0  # iterations before it begins to rise

    def __post_init__(self) -> None:
        if not (0 <= self.start <= self.most < 1 and self.slope >= 0 and self.wait >= 0):
            raise ValueError(
                f"a ramp needs 0 <= start <= most < 1, and slope and wait not negative, got "
                f"start={self.start}, most={self.most}, slope={self.slope}, wait={self.wait}"
            )

    def __call__(self, iteration: int) -> float:
        return min(self.start + self.slope * max(0, iteration - self.wait), self.most)


def renewed(every: int, iteration: int) -> float:
    """How much of itself a copy keeps after an iteration: all, but nothing after every `every`-th."""
    return 0.0 if (iteration + 1) % every == 0 else 1.0


class Copies:
    """Frozen copies of a module's trainable parameters, by name: the reference, the old policy, an average.

    With LoRA a copy is as small as the adapter, and the copy taken before the first update is the base model,
    so no second network is ever held. Of parameters that FSDP2 has sharded a copy holds the shards.
    """

    def __init__(self, module: nn.Module) -> None:
        self._live = [p for p in module.parameters() if p.requires_grad]
        self._saved: dict[str, list[Tensor]] = {}
        # Parts of a sharded module that gather their parameters, and may keep them from forward to forward.
        self._gathering: list[Any] = [part for part in module.modules() if hasattr(part, "reshard")]

    def __contains__(self, name: str) -> bool:
        return name in self._saved

    def save(self, name: str) -> None:
        """Remember the present values under `name`."""
        self._saved[name] = [p.detach().clone() for p in self._live]

    @torch.no_grad()
    def follow(self, name: str, keep: float) -> None:
        """Move a copy towards the live parameters: copy = keep * copy + (1 - keep) * live."""
        for copy, live in zip(self._saved[name], self._live, strict=True):
            copy.lerp_(live.detach(), 1 - keep)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Run with a copy's values in place of the live ones; the live values come back whatever happens."""
        if name not in self._saved:
            raise KeyError(f"there is no copy named {name!r}; there are {sorted(self._saved)}")
        live = [p.detach().clone() if _is_sharded(p) else p.data for p in self._live]
        try:
            self._put(self._saved[name])
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self._live, values, strict=True):
            if _is_sharded(p):
                p.to_local().copy_(value.to_local())  # type: ignore[attr-defined]  # FSDP keeps to its storage
            else:
                p.data = value
        for part in self._gathering:
            part.reshard()

    def state_dict(self) -> dict[str, list[Tensor]]:
        return self._saved

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for name, tensors in state.items():
            shapes = [tuple(t.shape) for t in tensors]
            if shapes != [tuple(p.shape) for p in self._live]:
                raise ValueError(f"copy {name!r} does not fit the trainable parameters of this model")
            self._saved[name] = [
                t.to(p.device, p.dtype).clone() for t, p in zip(tensors, self._live, strict=True)
            ]


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")
