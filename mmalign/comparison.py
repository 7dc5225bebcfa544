"""Means and differences over runs and prompts, with bootstrap intervals that draw anew from both.

Every function that resamples gives [1 + resamples, ...]: the estimate itself first, then one for each draw.
Runs of an arm are drawn independently of those of another; prompts are the same for all, so that nobody's
luck with easy ones counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.evaluation import RESAMPLES
from mmalign.randomness import generator


@dataclass(frozen=True)
class Measured:
    """A number of the runs of one arm, and what they had spent by then.

    values: [R, T, N] by run, point of the run and prompt; NaN: no verdict. forwards, seconds: [T], means over
    the runs.
    """

    values: Tensor
    forwards: Tensor
    seconds: Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or {len(self.forwards), len(self.seconds)} != {self.values.shape[1]}:
            raise ValueError(
                f"values must be [runs, points, prompts] with what was spent at each point, got "
                f"{tuple(self.values.shape)}, {len(self.forwards)} and {len(self.seconds)}"
            )

    @property
    def last(self) -> Measured:
        """The last point alone."""
        return Measured(self.values[:, -1:], self.forwards[-1:], self.seconds[-1:])


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Tensor) -> Estimate:
        """From [1 + resamples]. Infinite draws count, those that are not numbers do not."""
        drawn = found[1:][~found[1:].isnan()]
        if not len(drawn):
            return cls(float(found[0]), math.nan, math.nan)
        levels = torch.tensor([0.025, 0.975], dtype=found.dtype)
        low, high = drawn.quantile(levels, interpolation="nearest").tolist()
        return cls(float(found[0]), low, high)


def counts(size: int, resamples: int, *name: int | str) -> Tensor:
    """How often each of `size` things is drawn, [1 + resamples, size]; once each in the first row."""
    picks = torch.randint(size, (resamples, size), generator=generator(0, "bootstrap", *name))
    drawn = torch.zeros(resamples, size, dtype=torch.float64)
    drawn.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    return torch.cat([torch.ones(1, size, dtype=torch.float64), drawn])


def curves(measured: Measured, arm: str, resamples: int = RESAMPLES) -> Tensor:
    """The mean at each point of the runs, [1 + resamples, T]; arm: names its draws of runs."""
    runs, _, prompts = measured.values.shape
    by_run, by_prompt = counts(runs, resamples, "runs", arm), counts(prompts, resamples, "prompts")
    known = measured.values.isfinite()
    values = torch.where(known, measured.values, 0.0).double()

    def total(of: Tensor) -> Tensor:
        return torch.einsum("kr,rtn,kn->kt", by_run, of, by_prompt)

    return total(values) / total(known.double())


def at(curve: Tensor, x: Tensor, place: float) -> Tensor:
    """Curves [K, T] over x [T] at one place, linear between the points; [K]."""
    after = int((x < place).sum().clamp(1, len(x) - 1)) if len(x) > 1 else 0
    if not after:
        return curve[:, 0]
    before = after - 1
    share = ((place - x[before]) / (x[after] - x[before])).clamp(0, 1)
    return curve[:, before] + share * (curve[:, after] - curve[:, before])


def reaches(curve: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """Where curves [K, T] over x [T] first reach target [K], linear between the points; infinite: nowhere."""
    above = curve >= target[:, None]
    first = above.double().argmax(1)
    before = (first - 1).clamp(min=0)
    row = torch.arange(len(curve))
    low, high = curve[row, before], curve[row, first]
    share = torch.where(first > 0, (target - low) / (high - low), 0.0)
    place = x[before] + share * (x[first] - x[before])
    return torch.where(above.any(1), place, math.inf)


def difference(
    arm: Measured, than: Measured, names: tuple[str, str], seconds: bool = False, resamples: int = RESAMPLES
) -> Tensor:
    """The end of one arm less that of another, [1 + resamples].

    seconds: both when the one that ended first had ended.
    """
    ends = []
    place = min(float(arm.seconds[-1]), float(than.seconds[-1]))
    for measured, name in zip((arm, than), names, strict=True):
        curve = curves(measured, name, resamples)
        ends.append(at(curve, measured.seconds.double(), place) if seconds else curve[:, -1])
    return ends[0] - ends[1]


def speedup(
    arm: Measured, than: Measured, names: tuple[str, str], seconds: bool = False, resamples: int = RESAMPLES
) -> Tensor:
    """What `than` spent in all over what the arm needs for the same final score, [1 + resamples].

    0 where the arm never reaches it, infinite where it began there, as when `than` did not rise.
    """
    goal = curves(than, names[1], resamples)[:, -1]
    x = (arm.seconds if seconds else arm.forwards).double()
    whole = float((than.seconds if seconds else than.forwards)[-1])
    return whole / reaches(curves(arm, names[0], resamples), x, goal)
