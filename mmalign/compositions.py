"""The compositions by name. Each is a dataclass of settings with `build(weights) -> Composer`."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.composition import (
    Batch,
    Composer,
    Ruling,
    Schedule,
    Stateless,
    check_known,
    check_ranges,
    check_same,
    mapped,
    outside,
)
from mmalign.updates import Balanced


class Composition(Protocol):
    """What every entry of the table can do."""

    def build(self, weights: Mapping[str, Schedule]) -> Composer: ...


@dataclass(frozen=True)
class WeightedSum:
    """Rewards are added up before samples are compared; the one with the widest spread leads."""

    def build(self, weights: Mapping[str, Schedule]) -> Composer:
        return Composer(weights, combine="total_first")


@dataclass(frozen=True)
class GDPO:
    """Each reward is compared inside its group, then all are added: no scale counts (arXiv:2601.05242)."""

    standardize: bool = True  # the sum is brought to mean 0 and deviation 1 over the batch

    def build(self, weights: Mapping[str, Schedule]) -> Composer:
        return Composer(weights, combine="normalized", standardize=self.standardize)


@dataclass(frozen=True)
class MARBLE:
    """One gradient a reward, and the direction that worsens none of them (arXiv:2605.06507).

    A weight scales the advantage of its reward, not its share in the direction.
    """

    every: int = (
        10  # updates between two looks at the gradients apart; lower follows them closer and costs more
    )
    keep: float = 0.7  # of the old shares at each look; higher is steadier
    shares: Literal["min_norm", "equal"] = "min_norm"  # equal: their plain mean, to compare with

    def __post_init__(self) -> None:
        Balanced(self.every, self.keep)  # says what is out of range

    def build(self, weights: Mapping[str, Schedule]) -> Composer:
        return Composer(weights, combine="apart", update=Balanced(self.every, self.keep, self.shares))


@dataclass(frozen=True)
class Product(Stateless):
    """One primary reward, multiplied down by all others (CaRL, arXiv:2504.17838).

    R = w P prod_j p_j^(w_j), and 0 where a hard rule fails. The weight of a factor is its exponent. Nothing
    can be earned by a factor alone.
    """

    primary: str  # the reward that is multiplied, 0 or more
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # worst and best: mapped to 0..1
    least: Mapping[str, float] = field(default_factory=dict)  # hard rules: below it the whole reward is 0

    def __post_init__(self) -> None:
        check_ranges(self.ranges)

    def build(self, weights: Mapping[str, Schedule]) -> Composer:
        if low := [name for name, schedule in weights.items() if min(schedule.values()) < 0]:
            raise ValueError(f"a factor of a product has no negative weight, but {', '.join(low)} has")
        return Composer(weights, self)

    def check(self, rewards: Sequence[str]) -> None:
        for what, named in (("primary", [self.primary]), ("ranges", self.ranges), ("least", self.least)):
            check_known(f"composition.{what}", list(named), rewards)

    def __call__(self, batch: Batch) -> Ruling:
        if self.primary not in batch.values:
            raise ValueError(f"the primary reward {self.primary!r} of a product needs a weight throughout")
        scaled = {name: mapped(name, values, self.ranges) for name, values in batch.values.items()}
        for name, values in scaled.items():
            outside(name, values, batch.valid[name], 0, math.inf if name == self.primary else 1)
        total = batch.weights[self.primary] * scaled[self.primary]
        for name, values in scaled.items():
            if name != self.primary:
                total = total * values.clamp(min=0) ** batch.weights[name]
        kept = torch.ones_like(total, dtype=torch.bool)
        for name, least in self.least.items():
            if name in batch.values:
                kept &= batch.values[name] >= least
        valid = _all(batch.valid)
        passed = batch.share(kept & (total > 0), valid)
        return Ruling(torch.where(kept, total, 0.0), valid, {"passed": passed})


@dataclass(frozen=True)
class Gated(Stateless):
    """Rewards in order of priority; each counts only where all before it pass (G-RA, arXiv:2508.10548).

    R = sum_k gate_k w_k R_k with gate_k = 1[R_(k-1) > threshold] gate_(k-1).
    """

    order: tuple[str, ...]  # rewards from the first to the last
    above: Mapping[str, float]  # what each but the last must exceed to let the next ones count

    def build(self, weights: Mapping[str, Schedule]) -> Composer:
        return Composer(weights, self)

    def check(self, rewards: Sequence[str]) -> None:
        check_same("composition.order", self.order, rewards)
        check_same("composition.above", list(self.above), self.order[:-1])

    def __call__(self, batch: Batch) -> Ruling:
        order = [name for name in self.order if name in batch.values]
        first = batch.valid[order[0]]
        gate, total, valid = torch.ones_like(first), torch.zeros(first.shape, dtype=torch.float64), first
        metrics = {}
        for name in order:
            valid = valid & (batch.valid[name] | ~gate)  # what is behind a closed gate is not asked
            total = total + gate * batch.weights[name] * batch.values[name]
            if name in self.above:
                gate = gate & batch.valid[name] & (batch.values[name] > self.above[name])
                metrics[f"open/{name}"] = batch.share(gate, first)
        return Ruling(total, valid, metrics)


@dataclass(frozen=True)
class LogSigmoid(Stateless):
    """Sum of log sigmoid(reward less a reference of its prompt), a logical AND (arXiv:2402.00742).

    u = sum_i w_i log sigmoid((r_i - ref_i) / temperature_i): little to gain above the reference, and as much
    as ever below. References are quantiles of the base model's rewards: `mmalign evaluate --references FILE`.
    A method that then divides by the standard deviation of each group takes a part of the effect away.
    """

    references: str  # JSON file: prompt -> reward -> value
    temperature: Mapping[str, float] = field(default_factory=dict)  # of each reward; 1 where none is given
    floor: float = -10.0  # bound on each term

    def __post_init__(self) -> None:
        for name, value in self.temperature.items():
            if not value > 0:
                raise ValueError(f"temperature.{name} must be positive, got {value}")
        if not self.floor < 0:
            raise ValueError(f"floor must be below 0, got {self.floor}")

    def build(self, weights: Mapping[str, Schedule]) -> Composer:
        return Composer(weights, Centered(self, read_references(Path(self.references))))


@dataclass(frozen=True)
class Centered(Stateless):
    """The rule of `LogSigmoid` with its references, prompt -> reward -> value."""

    settings: LogSigmoid
    references: Mapping[str, Mapping[str, float]]

    def check(self, rewards: Sequence[str]) -> None:
        check_known("composition.temperature", list(self.settings.temperature), rewards)
        for prompt, known in self.references.items():
            if missing := [name for name in rewards if name not in known]:
                raise ValueError(
                    f"{self.settings.references} has no reference of {', '.join(missing)} for {prompt!r}; "
                    f"make it anew: mmalign evaluate ... --rewards {' '.join(rewards)} --references FILE"
                )

    def __call__(self, batch: Batch) -> Ruling:
        known = [self.references.get(text, {}) for text in batch.prompts.text]
        valid, total = _all(batch.valid), torch.zeros(())
        for name, values in batch.values.items():
            reference = torch.tensor([row.get(name, math.nan) for row in known], dtype=torch.float64)[:, None]
            valid = valid & torch.isfinite(reference)
            term = log_sigmoid_centered(values, reference, self.settings.temperature.get(name, 1.0))
            total = total + batch.weights[name] * term.clamp(min=self.settings.floor)
        missing = torch.tensor([not row for row in known])[:, None].expand_as(valid)
        return Ruling(total, valid, {"without_reference": batch.share(missing, torch.ones_like(valid))})


def log_sigmoid_centered(values: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """log sigmoid((r - r_ref) / temperature), 0 at most."""
    return logsigmoid((values - reference) / temperature)


def read_references(path: Path) -> dict[str, dict[str, float]]:
    """What `mmalign evaluate --references` has written; ValueError where it is something else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(prompt): {str(name): float(value) for name, value in row.items()}
            for prompt, row in raw["references"].items()
        }
    except FileNotFoundError:
        raise ValueError(
            f"composition.references: there is no file {path}; make it from the base model by "
            "mmalign evaluate MODEL --prompts FILE --rewards NAMES --references FILE"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no references as mmalign evaluate writes them: {error!r}") from None


@dataclass(frozen=True)
class Ordered(Stateless):
    """Two samples of a group are compared by the first reward on which they differ (HERON, arXiv:2309.02632).

    The total of a sample is the share of its peers that it beats less that of those that beat it. With
    margins a beats b beats c beats a can happen.
    """

    order: tuple[str, ...]  # rewards from the most important to the least
    margin: Mapping[str, float] = field(default_factory=dict)  # what is a tie, in deviations over the batch

    def __post_init__(self) -> None:
        for name, value in self.margin.items():
            if not value >= 0:
                raise ValueError(f"margin.{name} must be 0 or more, got {value}")

    def build(self, weights: Mapping[str, Schedule]) -> Composer:
        return Composer(weights, self)

    def check(self, rewards: Sequence[str]) -> None:
        check_same("composition.order", self.order, rewards)
        check_known("composition.margin", list(self.margin), rewards)

    def __call__(self, batch: Batch) -> Ruling:
        peers, order = batch.peers, [name for name in self.order if name in batch.values]
        values = torch.stack(
            [peers.all(batch.weights[name] * batch.values[name]) for name in order]
        )  # [K, N, V]
        valid = torch.stack([peers.all(batch.valid[name].long()).bool() for name in order])
        margin = torch.stack(
            [
                self.margin.get(name, 0.0) * v[ok].std(correction=0) if ok.any() else v.new_zeros(())
                for name, v, ok in zip(order, values, valid, strict=True)
            ]
        )
        total, known = torch.zeros(values.shape[1:], dtype=torch.float64), torch.zeros_like(valid[0])
        level = torch.zeros(len(order) + 1, dtype=torch.float64)
        for one in torch.unique(peers.group):
            rows = (peers.group == one).nonzero().flatten()
            wins, compared, decided = duel(values[:, rows], valid[:, rows], margin)
            total[rows] = wins.sum(1) / compared.sum(1).clamp(min=1)
            known[rows] = compared.any(1)
            level += decided
        shares = (level / level.sum().clamp(min=1)).tolist()
        metrics = {f"decided/{name}": share for name, share in zip([*order, "none"], shares, strict=True)}
        return Ruling(total[peers.mine], known[peers.mine], metrics)


def duel(values: Tensor, valid: Tensor, margin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Who beats whom in a group, by the first of the rewards on which they differ by more than a margin.

    values, valid: [K, m, V], margin: [K]. Gives wins [m, m, V], 1 where the first beats the second and -1
    where it loses; which pairs could be compared, [m, m, V]; and how many were decided by each reward, the
    last by none, [K + 1].
    """
    members, views = values.shape[1:]
    wins = torch.zeros(members, members, views, dtype=torch.float64)
    open_ = ~torch.eye(members, dtype=torch.bool)[:, :, None].expand(-1, -1, views)
    compared, decided = open_.clone(), []
    for v, ok, least in zip(values, valid, margin, strict=True):
        both = ok[:, None] & ok[None, :]
        compared &= both | ~open_  # a verdict that would have decided is missing
        open_ = open_ & both
        gap = v[:, None] - v[None, :]
        found = torch.sign(gap) * (gap.abs() > least) * open_
        wins += found
        decided.append((found != 0).sum())
        open_ = open_ & (found == 0)
    decided.append(open_.sum())
    return wins * compared, compared, torch.stack(decided).double()


@dataclass(frozen=True)
class Limit:
    """How often something may happen: the reward falls below, or rises above, a value."""

    rate: float  # share of samples in which it may
    below: float | None = None  # it happens where the reward is less
    above: float | None = None  # it happens where the reward is more

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate is a share in [0, 1), got {self.rate}")
        if (self.below is None) == (self.above is None):
            raise ValueError("a limit needs exactly one of below and above")

    def happens(self, values: Tensor) -> Tensor:
        return values > self.above if self.above is not None else values < (self.below or 0.0)


@dataclass(frozen=True)
class Constrained:
    """The other rewards as long as rates of events stay within limits (arXiv:2412.07177).

    r = l_0 sum_i w_i r_i - sum_k l_k (1[event k] - rate_k), with l the softmax of (0, z) and z_k moving by
    step (measured rate - rate_k) after every iteration: the scale stays bounded whatever the multipliers do.
    """

    limits: Mapping[str, Limit] = field(default_factory=dict)  # by reward
    step: float = 0.5  # of the multipliers; slower than the policy learns
    keep: float = 0.8  # of the measured rates from iteration to iteration
    bound: float = 6.0  # on z

    def __post_init__(self) -> None:
        for name in ("step", "bound"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep must lie in [0, 1), got {self.keep}")

    def build(self, weights: Mapping[str, Schedule]) -> Composer:
        return Composer(weights, Multipliers(self))


@dataclass
class Multipliers:
    """The rule of `Constrained`: dual ascent on the logarithms z of the multipliers."""

    settings: Constrained
    z: dict[str, float] = field(init=False)
    rates: dict[str, float] = field(init=False)  # smoothed

    def __post_init__(self) -> None:
        self.z = dict.fromkeys(self.settings.limits, 0.0)
        self.rates = {}
        self._seen: dict[str, list[float]] = {name: [] for name in self.settings.limits}
        self._warned: set[str] = set()

    def check(self, rewards: Sequence[str]) -> None:
        check_known("composition.limits", list(self.settings.limits), rewards)
        if set(rewards) <= set(self.settings.limits):
            raise ValueError("composition.limits leaves no reward to be maximized")

    def multipliers(self) -> tuple[float, dict[str, float]]:
        """That of the rewards, and that of each limit; they sum to 1."""
        parts = {name: math.exp(z) for name, z in self.z.items()}
        whole = 1 + sum(parts.values())
        return 1 / whole, {name: part / whole for name, part in parts.items()}

    def __call__(self, batch: Batch) -> Ruling:
        first, others = self.multipliers()
        valid, total = _all(batch.valid), torch.zeros((), dtype=torch.float64)
        for name, values in batch.values.items():
            if (limit := self.settings.limits.get(name)) is None:
                total = total + first * batch.weights[name] * values
                continue
            event = limit.happens(values)
            total = total - others[name] * (event.double() - limit.rate)
            self._seen[name].append(batch.share(event, batch.valid[name]))
        return Ruling(total, valid)

    def close(self) -> dict[str, float]:
        settings = self.settings
        metrics: dict[str, float] = {}
        for name, limit in settings.limits.items():
            seen = [rate for rate in self._seen[name] if math.isfinite(rate)]
            self._seen[name] = []
            if not seen:
                continue
            rate = sum(seen) / len(seen)
            before = self.rates.get(name, rate)
            self.rates[name] = settings.keep * before + (1 - settings.keep) * rate
            z = self.z[name] + settings.step * (self.rates[name] - limit.rate)
            self.z[name] = max(-settings.bound, min(settings.bound, z))
            if z > settings.bound and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"the limit on {name!r} cannot be held: it happens in {rate:.0%} of the samples, allowed "
                    f"are {limit.rate:.0%}, and its multiplier is at its bound. Raise "
                    f"composition.limits.{name}.rate.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            metrics |= {f"rate/{name}": rate, f"multiplier/{name}": self.multipliers()[1][name]}
        return metrics

    def state_dict(self) -> dict[str, object]:
        return {"z": dict(self.z), "rates": dict(self.rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.z |= {name: z for name, z in state["z"].items() if name in self.z}
        self.rates = {name: rate for name, rate in state["rates"].items() if name in self.z}


def _all(valid: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(valid.values())).all(0)


COMPOSITIONS: dict[str, type[Composition]] = {
    "weighted_sum": WeightedSum,
    "gdpo": GDPO,
    "marble": MARBLE,
    "product": Product,
    "gated": Gated,
    "log_sigmoid": LogSigmoid,
    "ordered": Ordered,
    "constrained": Constrained,
}
