"""Many rewards at once: what becomes of them between their verdicts and the credit.

A composition either says how the credit adds them up (weighted sum, normalized sum, kept apart), or is a rule
that makes one number a sample of them, the reward "total", which is then the only one that is trained on.
Weights may change over the iterations either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mmalign.contracts import RewardError
from mmalign.credit import Credit, Peers
from mmalign.records import Outcome, Prompts, RewardSignal, Unit, Whole
from mmalign.updates import Update

TOTAL = "total"  # the reward that a rule makes

Schedule = Mapping[int, float]  # a value at some iterations


def at(schedule: Schedule, iteration: int) -> float:
    """The value at an iteration: along straight lines between the given ones, and level outside of them."""
    known = sorted(schedule)
    before = [i for i in known if i <= iteration]
    after = [i for i in known if i > iteration]
    if not before or not after:
        return schedule[(before or after)[-1 if before else 0]]
    low, high = before[-1], after[0]
    share = (iteration - low) / (high - low)
    return schedule[low] + share * (schedule[high] - schedule[low])


@dataclass(frozen=True)
class Batch:
    """What a rule sees of one batch: verdicts on own samples, and their peers.

    values, valid: by reward, [B, V] float64 and bool on the CPU, V completions a sample; the value of a
    reward of several units is their mean. weights: of this iteration, by reward, 0 left out.
    """

    values: Mapping[str, Tensor]
    valid: Mapping[str, Tensor]
    weights: Mapping[str, float]
    prompts: Prompts
    peers: Peers

    def share(self, flags: Tensor, among: Tensor) -> float:
        """How many of the rows [B, V] of all ranks are so, among those that count; NaN where none does."""
        counts = torch.stack([(flags & among).sum(1), among.sum(1)], 1)
        hits, total = self.peers.all(counts).sum(0).tolist()
        return hits / total if total else float("nan")


@dataclass(frozen=True)
class Ruling:
    """One number a sample, [B, V], where there is a verdict, and what was seen on the way."""

    values: Tensor
    valid: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)


class Rule(Protocol):
    """Makes one reward out of several."""

    def check(self, rewards: Sequence[str]) -> None:
        """ValueError where the rule does not fit the rewards that have a weight."""
        ...

    def __call__(self, batch: Batch) -> Ruling: ...

    def close(self) -> Mapping[str, float]:
        """The end of an iteration, in which all ranks have seen the same; gives metrics."""
        ...

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stateless:
    """What rules without a memory need not say."""

    def close(self) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Composed:
    """What goes into the credit, with the weights of this iteration."""

    signals: list[RewardSignal]
    weights: Mapping[str, float]
    metrics: Mapping[str, float]


@dataclass
class Composer:
    """Applies a composition to every batch.

    weights: of the rewards by name; 0 is watched. rule: makes one reward of those with a weight. combine,
    standardize: what the credit does in place of what the method would; None leaves it as it is. update: how
    objectives kept apart are balanced.
    """

    weights: Mapping[str, Schedule]
    rule: Rule | None = None
    combine: Literal["total_first", "normalized", "apart"] | None = None
    standardize: bool = False
    update: Update | None = None

    def __post_init__(self) -> None:
        trained = [name for name, schedule in self.weights.items() if any(schedule.values())]
        for iteration in sorted({i for schedule in self.weights.values() for i in schedule}):
            if not any(at(schedule, iteration) for schedule in self.weights.values()):
                raise ValueError(f"in iteration {iteration} no reward has a weight other than 0")
        if self.rule is not None:
            if TOTAL in self.weights:
                raise ValueError(f"no reward may be named {TOTAL!r}: that is what the composition makes")
            self.rule.check(trained)

    @property
    def scheduled(self) -> bool:
        """Whether some weight changes over the iterations."""
        return any(len(set(schedule.values())) > 1 for schedule in self.weights.values())

    @property
    def shares(self) -> dict[str, float]:
        """The weights that the method is built with: other than 0 for whatever is trained on at all."""
        loudest = {name: max(schedule.values(), key=abs) for name, schedule in self.weights.items()}
        return loudest if self.rule is None else {**dict.fromkeys(loudest, 0.0), TOTAL: 1.0}

    def credit(self, credit: Credit) -> Credit:
        """The credit of a method with what this composition changes of it."""
        if self.combine is None:
            return credit
        return replace(credit, combine=self.combine, standardize=self.standardize)

    def __call__(
        self, signals: Sequence[RewardSignal], outcome: Outcome, peers: Peers, iteration: int
    ) -> Composed:
        now = {name: at(schedule, iteration) for name, schedule in self.weights.items()}
        metrics = {f"weight/{name}": weight for name, weight in now.items()} if self.scheduled else {}
        if self.rule is None:
            return Composed(list(signals), now, metrics)
        trained = {name: weight for name, weight in now.items() if weight}
        rows = {s.name: sample_means(s, outcome.views) for s in signals if s.name in trained}
        batch = Batch(
            {name: values for name, (values, _) in rows.items()},
            {name: valid for name, (_, valid) in rows.items()},
            trained,
            outcome.prompts,
            peers,
        )
        ruling = self.rule(batch)
        total = RewardSignal(
            TOTAL, ruling.values.reshape(-1, 1), Unit.SAMPLE, ruling.valid.reshape(-1, 1), Whole()
        )
        known = peers.all(torch.where(ruling.valid, ruling.values, torch.nan))
        metrics |= {f"composition/{name}": value for name, value in ruling.metrics.items()}
        metrics["composition/total"] = float(known.nanmean())
        return Composed([*signals, total], self.shares, metrics)

    def close(self) -> dict[str, float]:
        """The end of an iteration."""
        seen = self.rule.close() if self.rule is not None else {}
        return {f"composition/{name}": value for name, value in seen.items()}

    def state_dict(self) -> dict[str, object]:
        return self.rule.state_dict() if self.rule is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.rule is not None:
            self.rule.load_state_dict(state)


def sample_means(signal: RewardSignal, views: int) -> tuple[Tensor, Tensor]:
    """Mean of the valid units of each outcome, and whether there is any: [B, views] each."""
    assert signal.valid is not None  # filled in by RewardSignal
    valid = signal.valid.cpu()
    values = (signal.values.cpu().double() * valid).sum(1) / valid.sum(1).clamp(min=1)
    return values.reshape(-1, views), valid.any(1).reshape(-1, views)


def mapped(name: str, values: Tensor, ranges: Mapping[str, tuple[float, float]]) -> Tensor:
    """Values on a scale from 0 to 1 where a range is given for the reward, else as they are."""
    if name not in ranges:
        return values
    low, high = ranges[name]
    return ((values - low) / (high - low)).clamp(0, 1)


def check_ranges(ranges: Mapping[str, tuple[float, float]]) -> None:
    for name, (low, high) in ranges.items():
        if not low < high:
            raise ValueError(f"ranges.{name} must rise, got {[low, high]}")


def check_same(what: str, named: Sequence[str], rewards: Sequence[str]) -> None:
    """ValueError unless exactly the rewards with a weight are named."""
    if set(named) != set(rewards) or len(set(named)) < len(named):
        raise ValueError(
            f"{what} must name each reward with a weight once, which are {', '.join(rewards)}; "
            f"got {', '.join(named) or 'none'}"
        )


def check_known(what: str, named: Sequence[str], rewards: Sequence[str]) -> None:
    """ValueError where something is said of a reward that has no weight."""
    if unknown := sorted(set(named) - set(rewards)):
        raise ValueError(
            f"{what} speaks of {', '.join(unknown)}, but the rewards with a weight are {', '.join(rewards)}"
        )


def outside(name: str, values: Tensor, valid: Tensor, low: float, high: float) -> None:
    """RewardError where a verdict does not lie in low..high."""
    bad = valid & ((values < low) | (values > high))
    if bad.any():
        seen = values[bad][0].item()
        raise RewardError(
            f"reward {name!r} must lie in {low:g}..{high:g} to be a part of a product, got {seen:.4g}; "
            f"map it by composition.ranges.{name}=[worst, best]"
        )
