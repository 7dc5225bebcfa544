"""From reward units to an advantage for every action. Four questions, four independent answers:

normalize  how good is a unit, compared with its peers?      [B, U] -> [B, U]
combine    which units add up, and when?                     [B, U] -> K x [B, U]
reach      which actions does a unit speak about?            [B, U] -> [B, S, *site]
weigh      how loudly does an action speak in the loss?      [B, S]

Peers may live on other ranks. Their values are gathered and put into an order that depends on the samples'
names alone, so that the same samples give the same advantage, to the last bit, however they are placed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mmalign.records import Advantage, Prompts, RewardSignal, Trajectory, Unit, Where, Whole

Normalize = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
Weigh = Callable[[Trajectory], Tensor]
Locate = Callable[[Where, Trajectory], Tensor]
Gather = Callable[[Tensor], Tensor]


# How good is a unit, compared with its peers? Each takes
#     values, valid: [N, U]; group: [N]; aligned: compare with the same unit of the other samples, else with
# every unit, and gives [N, U] in float64. Units without a verdict count in no statistic and get 0; units
# whose peers are all equal get exactly 0.


def center(values: Tensor, valid: Tensor, group: Tensor, aligned: bool) -> Tensor:
    """Distance to the mean of the peers."""
    peers = _statistics(values, valid, group, aligned)
    return peers.distance


def zscore(
    values: Tensor,
    valid: Tensor,
    group: Tensor,
    aligned: bool,
    *,
    unbiased: bool = False,
    epsilon: float = 1e-4,
) -> Tensor:
    """Distance to the mean of the peers, in their standard deviations (GRPO)."""
    peers = _statistics(values, valid, group, aligned)
    variance = peers.squares / (peers.count - int(unbiased)).clamp(min=1)
    return peers.distance / (variance.sqrt() + epsilon)


def zscore_batch(
    values: Tensor,
    valid: Tensor,
    group: Tensor,
    aligned: bool,
    *,
    unbiased: bool = False,
    epsilon: float = 1e-4,
) -> Tensor:
    """Distance to the mean of the peers, in standard deviations of the whole batch (Flow-GRPO).

    A group whose members are almost equal is then not blown up to the size of the others.
    """
    peers = _statistics(values, valid, group, aligned)
    batch = _statistics(values, valid, torch.zeros_like(group), aligned)
    variance = batch.squares / (batch.count - int(unbiased)).clamp(min=1)
    return peers.distance / (variance.sqrt() + epsilon)


def leave_one_out(values: Tensor, valid: Tensor, group: Tensor, aligned: bool) -> Tensor:
    """Distance to the mean of the other peers (RLOO): the baseline does not depend on the sample itself."""
    peers = _statistics(values, valid, group, aligned)
    return peers.distance * peers.count / (peers.count - 1).clamp(min=1)


def rank(values: Tensor, valid: Tensor, group: Tensor, aligned: bool) -> Tensor:
    """Share of the peers that a unit beats less the share that beats it, in [-1, 1]."""
    values, out = values.double(), torch.zeros_like(values, dtype=torch.float64)
    for one in torch.unique(group):
        rows = group == one
        v, ok = values[rows], valid[rows]
        shape = v.shape
        if not aligned:
            v, ok = v.reshape(-1, 1), ok.reshape(-1, 1)
        both = ok[:, None] & ok[None, :]  # [m, m, U]
        wins = (torch.sign(v[:, None] - v[None, :]) * both).sum(1)
        out[rows] = (wins / (both.sum(1) - 1).clamp(min=1)).reshape(shape)
    return out


@dataclass(frozen=True)
class _Statistics:
    """Of each unit's valid peers, itself among them: their number, its distance to their mean, their summed
    squares."""

    count: Tensor
    distance: Tensor
    squares: Tensor


def _statistics(values: Tensor, valid: Tensor, group: Tensor, aligned: bool) -> _Statistics:
    numbers, row = torch.unique(group, return_inverse=True)
    values = torch.where(valid, values.double(), 0.0)

    def total(x: Tensor) -> Tensor:
        sums = x.new_zeros(len(numbers), x.shape[1]).index_add_(0, row, x)
        return (sums if aligned else sums.sum(1, keepdim=True))[row].expand_as(x)

    def extreme(x: Tensor, how: str) -> Tensor:
        found = torch.zeros(len(numbers), x.shape[1], dtype=x.dtype)
        found.scatter_reduce_(0, row[:, None].expand_as(x), x, how, include_self=False)
        if not aligned:
            found = found.amax(1, keepdim=True) if how == "amax" else found.amin(1, keepdim=True)
        return found[row].expand_as(x)

    count = total(valid.double())
    mean = total(values) / count.clamp(min=1)
    high = extreme(torch.where(valid, values, -torch.inf), "amax")
    low = extreme(torch.where(valid, values, torch.inf), "amin")
    # Where all peers are equal their mean may still miss them by a rounding, which a small std would blow up.
    distance = torch.where(valid & (high > low), values - mean, 0.0)
    return _Statistics(count, distance, total(distance**2))


def best_and_worst(score: Tensor, counted: Tensor, group: Tensor, number: int) -> Tensor:
    """Which counted samples are among the `number` best or the `number` worst of their group; all are [N].

    Among equal ones the first are the lower; a group of fewer than twice the number keeps all.
    """
    chosen = torch.zeros_like(counted)
    for one in torch.unique(group):
        rows = ((group == one) & counted).nonzero().flatten()
        order = rows[torch.argsort(score[rows], stable=True)]
        chosen[order[:number]] = True
        chosen[order[max(0, len(order) - number) :]] = True
    return chosen


# How loudly does an action speak? Unscaled: Credit makes the weights of an update sum to 1.


def per_sample(trajectory: Trajectory) -> Tensor:
    """Every sample speaks equally loudly, and its actions share its voice."""
    mask = trajectory.mask.cpu().double()
    return mask / mask.sum(1, keepdim=True).clamp(min=1)


def per_action(trajectory: Trajectory) -> Tensor:
    """Every action speaks equally loudly (for words: the token mean)."""
    return trajectory.mask.cpu().double()


# Whom a sample is compared with.


def alone(rows: Tensor) -> Tensor:
    """The rows of all ranks where there is only one."""
    return rows


class Peers:
    """The samples of all ranks, in the order of their names: the same order however they are placed."""

    def __init__(self, prompts: Prompts, gather: Gather = alone) -> None:
        self._gather = gather
        names = torch.stack([prompts.group, prompts.member], 1).cpu()
        every = [(group, member) for group, member in gather(names).tolist()]
        place = {name: i for i, name in enumerate(sorted(every))}
        if len(place) < len(every):
            twice = next(name for name in sorted(every) if every.count(name) > 1)
            raise ValueError(
                f"two samples are both member {twice[1]} of group {twice[0]}; a name must be given once"
            )
        self.group = torch.tensor([group for group, _ in place], dtype=torch.int64)
        self.mine = torch.tensor(
            [place[group, member] for group, member in names.tolist()], dtype=torch.int64
        )
        self._order = torch.tensor(sorted(range(len(every)), key=every.__getitem__), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.group)

    def all(self, rows: Tensor) -> Tensor:
        """Own rows [B, ...] to those of all ranks [N, ...], on the CPU; shorter rows are padded with 0."""
        return self._gather(rows.detach().cpu())[self._order]


@dataclass(frozen=True)
class Credit:
    """A recipe for turning reward signals into an advantage."""

    weights: Mapping[str, float]  # one number per reward; a reward of weight 0 is watched, not trained on
    normalize: Normalize = zscore
    # total_first: add the rewards up before they are compared with their peers (plain GRPO); a sample that
    # lacks one of them is missing as a whole. normalized: compare each reward with its peers, then add up
    # (GDPO). apart: keep each as an objective of its own, to be balanced at the update (MARBLE).
    combine: Literal["total_first", "normalized", "apart"] = "normalized"
    # whole: every action. upstream: those that a unit speaks about and all before them. local: only those.
    reach: Literal["whole", "upstream", "local"] = "local"
    weigh: Weigh = per_sample
    clip: float = 5.0  # bound on the advantage
    # Of each group learn from so many of the best and as many of the worst alone; the others only take part
    # in the comparison (DanceGRPO's best-of-n). 0: from all.
    extremes: int = 0

    def __call__(
        self,
        signals: Sequence[RewardSignal],
        trajectory: Trajectory,
        locate: Locate,
        peers: Peers | None = None,
        part: Tensor | None = None,
    ) -> Advantage:
        """The advantage of own samples, compared with their peers (None: there are no other ranks).

        part: [B] int64, the update in which each sample takes part (None: one update); over each of them
        weights sum to 1.
        """
        unknown = {s.name for s in signals} ^ self.weights.keys()
        if unknown:
            raise ValueError(
                f"rewards and weights must have the same names; only one side has {sorted(unknown)}"
            )
        peers = peers or Peers(trajectory.outcome.prompts)
        signals = [fold(s, trajectory.outcome.views) for s in signals if self.weights[s.name] != 0]
        shares = [self.weights[s.name] for s in signals]
        if not signals:
            raise ValueError(f"at least one reward needs a weight other than 0, got {dict(self.weights)}")
        if self.combine == "total_first":
            signals, shares = [self._total(signals, peers)], [1.0]
        rows = [
            share * self._spread(s, trajectory, locate, peers)
            for s, share in zip(signals, shares, strict=True)
        ]
        names = tuple(s.name for s in signals) if self.combine == "apart" else ("total",)
        if self.combine != "apart":
            rows = [torch.stack(_alike(rows)).sum(0)]
        values = torch.stack(_alike(rows))
        counted = torch.stack([_valid(s).any(1) for s in signals]).any(0)
        if self.extremes:
            score = values.sum(0).flatten(1).mean(1)
            every, scored = peers.all(score), peers.all(counted.long()).bool()
            counted = best_and_worst(every, scored, peers.group, self.extremes)[peers.mine]
        values = values.clamp(-self.clip, self.clip)
        weight = self._loudness(trajectory, counted, peers, part)
        device = trajectory.log_prob.device
        return Advantage(values.float().to(device), weight.float().to(device), names)

    def _total(self, signals: Sequence[RewardSignal], peers: Peers) -> RewardSignal:
        total = sum((self.weights[s.name] * s.values.cpu().double()).sum(1, keepdim=True) for s in signals)
        complete = torch.stack([_complete(s, peers) for s in signals]).all(0)
        return RewardSignal("total", torch.as_tensor(total), valid=complete[:, None])

    def _spread(self, signal: RewardSignal, trajectory: Trajectory, locate: Locate, peers: Peers) -> Tensor:
        values, valid = peers.all(signal.values.cpu().double()), peers.all(_valid(signal).long()).bool()
        units = self.normalize(values, valid, peers.group, signal.unit.aligned)
        units = units[peers.mine, : signal.values.shape[1]]  # [B, U]
        if self.reach == "whole" or isinstance(signal.where, Whole):
            footprint = units.new_ones(1, 1, 1, *[1] * (trajectory.log_prob.ndim - 2))
        else:
            footprint = locate(signal.where, trajectory).cpu().double()  # [B, U, S, *site], broadcastable
        if self.reach == "upstream":
            footprint = footprint.flip(2).cummax(2).values.flip(2)
        return (units.reshape(*units.shape, *[1] * (footprint.ndim - 2)) * footprint).sum(1)

    def _loudness(self, trajectory: Trajectory, counted: Tensor, peers: Peers, part: Tensor | None) -> Tensor:
        weight = self.weigh(trajectory).cpu().double() * counted[:, None]  # [B, S]
        parts = peers.all(torch.zeros_like(peers.mine) if part is None else part)
        number = torch.unique(parts, return_inverse=True)[1]
        sums = torch.zeros(len(parts), dtype=torch.float64).index_add_(0, number, peers.all(weight.sum(1)))
        sums = sums[number][peers.mine]  # [B], the total of the update that each sample takes part in
        sites = trajectory.log_prob.shape[2:]
        weight = weight / torch.where(sums > 0, sums, 1.0)[:, None] / max(1, sites.numel())
        return weight.reshape(*weight.shape, *[1] * len(sites))


def fold(signal: RewardSignal, views: int) -> RewardSignal:
    """B * views verdicts as B verdicts of one unit per completion."""
    if views == 1:
        return signal
    if signal.unit is not Unit.SAMPLE:
        raise ValueError(
            f"{signal.name}: several completions can only be judged by a reward per sample, "
            f"not by one per {signal.unit.label}"
        )
    values, valid = signal.values.reshape(-1, views), _valid(signal).reshape(-1, views)
    return replace(signal, values=values, valid=valid, unit=Unit.COMPLETION, where=Whole(), details=None)


def _alike(rows: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.broadcast_tensors(*rows))  # type: ignore[no-untyped-call]


def _valid(signal: RewardSignal) -> Tensor:
    assert signal.valid is not None  # filled in by RewardSignal
    return signal.valid.cpu()


def _complete(signal: RewardSignal, peers: Peers) -> Tensor:
    """Which samples have all the verdicts that their total needs, [B].

    Of aligned units a sample needs each one that any member of its group has; a unit that nobody in the group
    has does not apply to the prompt. Of others it needs one: their number varies.
    """
    valid = _valid(signal)
    if not signal.unit.aligned:
        return valid.any(1)
    every = peers.all(valid.long())
    _, row = torch.unique(peers.group, return_inverse=True)
    applies = torch.zeros_like(every).index_add_(0, row, every)[row] > 0
    return (valid | ~applies[peers.mine, : valid.shape[1]]).all(1) & valid.any(1)
