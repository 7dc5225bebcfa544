"""What the loop measures about itself: where time goes, how far the policy moves, what memory it takes."""

from __future__ import annotations

import resource
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor


class Clock:
    """Seconds by phase. On an accelerator a phase ends when its work is done, not when it is queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - began

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap; `other` is what no phase claimed, `iteration` the sum."""
        now = perf_counter()
        whole, self._began = now - self._began, now
        seconds, self.seconds = self.seconds, {}
        return {**seconds, "other": max(0.0, whole - sum(seconds.values())), "iteration": whole}


class Running:
    """Means of metrics that are not always there."""

    def __init__(self) -> None:
        self._seen: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._seen.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self._seen.items()}


@dataclass(frozen=True)
class Reading:
    """Of one measure over all counted actions: mean, mean and maximum of the size, mean by column of S."""

    mean: float
    size: float
    most: float
    by_column: list[float | None]
    share: bool  # of a yes-or-no measure


class Meter:
    """Sums up what objectives measure, on the device, until it is read once."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device, self._columns = device, columns
        self._count = self._zeros(columns)
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, Tensor] = {}
        self._most: dict[str, Tensor] = {}
        self._shares: set[str] = set()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def add(self, measures: Mapping[str, Tensor], counted: Tensor, columns: Tensor) -> None:
        """measures: [n, *site] each; counted: [n, *site] bool; columns: [n], the action of the sequence."""
        columns = columns.to(self._device)
        flat = counted.flatten(1) if counted.ndim > 1 else counted[:, None]
        self._count.index_add_(0, columns, flat.to(self._dtype).sum(1))
        for name, values in measures.items():
            if name not in self._sums:
                self._sums[name], self._sizes[name] = self._zeros(self._columns), self._zeros()
                self._most[name] = self._zeros()
            if values.dtype == torch.bool:
                self._shares.add(name)
            kept = torch.where(flat, values.reshape(flat.shape).to(self._dtype), 0.0)
            self._sums[name].index_add_(0, columns, kept.sum(1))
            self._sizes[name] += kept.abs().sum()
            self._most[name] = torch.maximum(self._most[name], kept.abs().amax())

    def read(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Reading]:
        """The readings over all ranks; each rank must have added the same measures."""
        names = sorted(self._sums)
        row = [
            self._count,
            *(self._sums[name] for name in names),
            *(self._sizes[name][None] for name in names),
        ]
        sums = gather(torch.cat(row)[None]).sum(0)
        most = gather(torch.stack([self._most[name] for name in names])[None]).amax(0) if names else sums[:0]
        count, total = sums[: self._columns], sums[: self._columns].sum().clamp(min=1)
        readings = {}
        for i, name in enumerate(names):
            by_column = sums[(i + 1) * self._columns : (i + 2) * self._columns]
            size = sums[(len(names) + 1) * self._columns + i]
            means = [float(s / c) if c else None for s, c in zip(by_column, count, strict=True)]
            readings[name] = Reading(
                float(by_column.sum() / total),
                float(size / total),
                float(most[i]),
                means,
                name in self._shares,
            )
        return readings


def named(readings: Mapping[str, Reading], steps: tuple[int, ...]) -> dict[str, float]:
    """Readings as metrics: the mean, the largest size, and the mean at each step of the schedule."""
    out: dict[str, float] = {}
    for name, reading in readings.items():
        out[name] = reading.mean
        if not reading.share:
            out[f"{name}_max"] = reading.most
        for column, mean in enumerate(reading.by_column):
            if mean is not None and column < len(steps):
                out[f"by_step/{name}/{steps[column]}"] = mean
    return out


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far: on the accelerator if it has one, else in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


STATIC_RISE = 0.1  # of the share of videos that stand still, above which the alarm rings
STATIC_WINDOW = 5  # iterations, at the start and at the end, over which that share is taken
STATIC_ALARM = "health/static_alarm"


class StaticAlarm:
    """Rings where videos come to a stand: the usual hack of judges of single frames.

    Rewards of videos tell in their details whether one is `static`. The mean of that share over the last
    `STATIC_WINDOW` iterations is held against that over the run's first ones; with a few prompts an iteration
    a single share says little. A run whose videos stand still from the first has nothing to rise from.
    """

    def __init__(self) -> None:
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, deque[float]] = {}
        self._warned: set[str] = set()

    def __call__(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The alarm of an iteration, 0 or 1, from what it measured; none where no reward tells.

        The first time that it rings by a reward there is a RuntimeWarning.
        """
        shares = {
            name: share
            for name, share in metrics.items()
            if name.startswith("reward/") and name.endswith("/static")
        }
        if not shares:
            return {}
        return {STATIC_ALARM: float(any([self._rings(name, share) for name, share in shares.items()]))}

    def _rings(self, name: str, share: float) -> bool:
        first = self._first.setdefault(name, [])
        last = self._last.setdefault(name, deque(maxlen=STATIC_WINDOW))
        last.append(share)
        if len(first) < STATIC_WINDOW:
            first.append(share)
            return False
        before, now = fmean(first), fmean(last)
        if not now > before + STATIC_RISE:
            return False
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"{name}: {now:.0%} of the videos of the last {STATIC_WINDOW} iterations stand still, "
                f"{before:.0%} of the first {STATIC_WINDOW} did. The policy may be hacking a judge of single "
                f"frames: give the reward 'motion' a weight. Said once, logged throughout ({STATIC_ALARM}).",
                RuntimeWarning,
                stacklevel=2,
            )
        return True

    def state_dict(self) -> dict[str, object]:
        return {
            "first": {name: list(shares) for name, shares in self._first.items()},
            "last": {name: list(shares) for name, shares in self._last.items()},
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first = {name: list(shares) for name, shares in state["first"].items()}
        self._last = {name: deque(shares, STATIC_WINDOW) for name, shares in state["last"].items()}
        self._warned = set(state["warned"])
