"""Frozen copies of the trainable parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    so no second network is ever held. Of parameters that FSDP2 or ZeRO-3 have sharded a copy holds what lies
    on this rank; to take, move or use it no rank needs another.
    """

    def __init__(self, module: nn.Module) -> None:
        self._live = [p for p in module.parameters() if p.requires_grad]
        self._saved: dict[str, list[Tensor]] = {}
        self._forget = forgetting(module)

    def __contains__(self, name: str) -> bool:
        return name in self._saved

    def save(self, name: str) -> None:
        """Remember the present values under `name`."""
        self._saved[name] = [part.clone() for part in self._parts()]

    @torch.no_grad()
    def follow(self, name: str, keep: float) -> None:
        """Move a copy towards the live parameters: copy = keep * copy + (1 - keep) * live."""
        for copy, live in zip(self._saved[name], self._parts(), strict=True):
            copy.lerp_(live, 1 - keep)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Run with a copy's values in place of the live ones; the live values come back whatever happens."""
        if name not in self._saved:
            raise KeyError(f"there is no copy named {name!r}; there are {sorted(self._saved)}")
        live = [part.clone() if is_sharded(p) else p.data for p, part in self._pairs()]
        try:
            self._put(self._saved[name])
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for (p, part), value in zip(self._pairs(), values, strict=True):
            if is_sharded(p):
                part.copy_(value)  # what shards keeps to its storage
            else:
                p.data = value
        self._forget()

    def _parts(self) -> list[Tensor]:
        return [local(p).detach() for p in self._live]

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return zip(self._live, self._parts(), strict=True)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return self._saved

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for name, tensors in state.items():
            shapes = [tuple(t.shape) for t in tensors]
            parts = self._parts()
            if shapes != [tuple(part.shape) for part in parts]:
                raise ValueError(f"copy {name!r} does not fit the trainable parameters of this model")
            self._saved[name] = [
                t.to(part.device, part.dtype).clone() for t, part in zip(tensors, parts, strict=True)
            ]


# A parameter that FSDP2 has sharded is a DTensor; one of ZeRO-3 is empty between forwards, with its shard
# beside it.


def is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "to_local") or hasattr(parameter, "ds_tensor")


def local(parameter: Tensor) -> Tensor:
    """What of a parameter this rank holds: its storage, which may be read and written in place.

    A shard of FSDP2 is a part of its rows, one of ZeRO-3 is flat and may end in padding.
    """
    if hasattr(parameter, "ds_tensor"):
        flat: Tensor = parameter.ds_tensor
        return flat
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[operator]
    return part


def numel(parameter: Tensor) -> int:
    """How many numbers a parameter has over all ranks."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def forgetting(module: nn.Module) -> Callable[[], None]:
    """What makes a sharded module let go of parameters that it has gathered and would use again as they are.

    FSDP2 may keep them from forward to forward, and ZeRO-3 those that are small or soon asked for again.
    """
    parts: list[Any] = list(module.modules())
    found = [part.reshard for part in parts if hasattr(part, "reshard")]
    engine: Any = getattr(module, "optimizer", None)
    if hasattr(engine, "empty_partition_cache"):
        found.append(engine.empty_partition_cache)

    def forget() -> None:
        for one in found:
            one()

    return forget
