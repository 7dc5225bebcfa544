"""From reward units to an advantage for every action. Independent questions, independent answers:

read       what do verdicts on outcomes say of the actions?  units to units
normalize  how good is a unit, compared with its peers?      [B, U] -> [B, U]
combine    which units add up, and when?                     [B, U] -> K x [B, U]
reach      which actions does a unit speak about?            [B, U] -> [B, S, *site]
scale      how far does an advantage carry?                  [B, S]
weigh      how loudly does an action speak in the loss?      [B, S]
select     which of them are learned from after all?         [B, S]

Peers may live on other ranks. Their values are gathered and put into an order that depends on the samples'
names alone, so that the same samples give the same advantage, to the last bit, however they are placed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mmalign.records import Advantage, Plan, Prompts, RewardSignal, Steps, Trajectory, Unit, Where, Whole

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


def best_and_worst(values: Tensor, valid: Tensor, group: Tensor, aligned: bool) -> Tensor:
    """1 for the best of the peers, -1 for the worst, 0 for all others, and for all where they are equal."""
    peers, out = _statistics(values, valid, group, aligned), torch.zeros_like(values, dtype=torch.float64)
    for one in torch.unique(group):
        rows = (group == one).nonzero().flatten()
        distance = peers.distance[rows] if aligned else peers.distance[rows].reshape(-1, 1)
        best, worst = distance.argmax(0), distance.argmin(0)
        found = torch.zeros_like(distance)
        found.scatter_(0, best[None], 1.0).scatter_(0, worst[None], -1.0)
        out[rows] = torch.where(distance.abs().amax(0) > 0, found, 0.0).reshape(out[rows].shape)
    return out


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


def zscore_of_rank(values: Tensor, valid: Tensor, group: Tensor, aligned: bool) -> Tensor:
    """Distance of a unit's win rate to the mean of its peers', in their standard deviations (Pref-GRPO)."""
    return zscore(rank(values, valid, group, aligned), valid, group, aligned)


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
        self.member = torch.tensor([member for _, member in place], dtype=torch.int64)
        self.mine = torch.tensor(
            [place[group, member] for group, member in names.tolist()], dtype=torch.int64
        )
        self._order = torch.tensor(sorted(range(len(every)), key=every.__getitem__), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.group)

    def whole(self) -> bool:
        """Whether every group lies on one process; all ranks must ask."""
        number = torch.unique(self.group, return_inverse=True)[1]
        size, here = number.bincount(), number[self.mine].bincount(minlength=int(number.max()) + 1)
        return bool(self._gather(((here == 0) | (here == size)).all()[None]).all())

    def all(self, rows: Tensor) -> Tensor:
        """Own rows [B, ...] to those of all ranks [N, ...], on the CPU; shorter rows are padded with 0."""
        return self._gather(rows.detach().cpu())[self._order]


Read = Callable[[RewardSignal, Trajectory, Peers], RewardSignal]
# (all rewards that count, trajectory, peers) -> the verdict on each sample, of one unit
Total = Callable[[Sequence[RewardSignal], Trajectory, Peers], RewardSignal]
# (advantage [K, B, S, *site], which samples have a verdict [B], trajectory, peers) -> factor [B, S]
Select = Callable[[Tensor, Tensor, Trajectory, Peers], Tensor]


# Which actions are learned from after all? The advantage is not bounded yet; a factor may be [B, 1].


def varied(advantage: Tensor, counted: Tensor, trajectory: Trajectory, peers: Peers) -> Tensor:
    """Groups that tell their members apart; one whose advantages are all 0 says nothing."""
    _, row = torch.unique(peers.group, return_inverse=True)
    size = peers.all(_size(advantage))
    loudest = size.new_zeros(len(size)).scatter_reduce_(0, row, size, "amax")
    return (loudest[row] > 0)[peers.mine, None]


def moved(advantage: Tensor, counted: Tensor, trajectory: Trajectory, peers: Peers) -> Tensor:
    """Samples with an advantage; one of 0 says nothing."""
    return (_size(advantage) > 0)[:, None]


def extremes(number: int, advantage: Tensor, counted: Tensor, trajectory: Trajectory, peers: Peers) -> Tensor:
    """The `number` best and the `number` worst of each group; the others only take part in the comparison."""
    score = peers.all(advantage.sum(0).flatten(1).mean(1))
    known = peers.all(counted.long()).bool()
    return outermost(score, known, peers.group, number)[peers.mine, None]


def outermost(score: Tensor, counted: Tensor, group: Tensor, number: int) -> Tensor:
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


def _size(advantage: Tensor) -> Tensor:
    """The largest size of each sample's advantages [K, B, S, *site], [B]."""
    return advantage.abs().transpose(0, 1).flatten(1).amax(1)


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
    read: Read | None = None  # turns a reward's units into others, before they are compared
    # start: compare only members of a group that start from the same initial noise (`Plan.starts`).
    compare: Literal["group", "start"] = "group"
    scale: Weigh | None = None  # multiplies the bounded advantage of each action
    select: Select | None = None  # multiplies the weight of each action, once its advantage is known; 0: none
    standardize: bool = False  # bring the added-up advantages to mean 0 and deviation 1 over the batch (GDPO)
    learners: int = 0  # members of a group that `select` leaves, where their number is known before; 0: all
    total: Total | None = None  # with total_first: what they add up to, if not their weighted sum

    def __call__(
        self,
        signals: Sequence[RewardSignal],
        trajectory: Trajectory,
        locate: Locate,
        peers: Peers | None = None,
        part: Tensor | None = None,
    ) -> Advantage:
        """The advantage of own samples, compared with their peers (None: there are no other ranks).

        part: [B] or [B, S] int64, the update in which each sample or action takes part (None: one update);
        over each of them weights sum to 1.
        """
        peers = peers or Peers(trajectory.outcome.prompts)
        shares, signals = zip(*self.units(signals, trajectory, peers), strict=True)
        rows = [
            share * self._spread(s, trajectory, locate, peers)
            for s, share in zip(signals, shares, strict=True)
        ]
        names = tuple(s.name for s in signals) if self.combine == "apart" else ("total",)
        if self.combine != "apart":
            rows = [torch.stack(_alike(rows)).sum(0)]
        values = torch.stack(_alike(rows))
        sites = [1] * (trajectory.log_prob.ndim - 2)
        counted = torch.stack([_valid(s).any(1) for s in signals]).any(0)
        if self.standardize:
            values = torch.stack([_standardized(one, counted, peers) for one in values])
        weight = self.weigh(trajectory).cpu().double() * counted[:, None]  # [B, S]
        if self.select is not None:
            weight = weight * self.select(values, counted, trajectory, peers)
        values = values.clamp(-self.clip, self.clip)
        if self.scale is not None:
            scale = self.scale(trajectory).cpu().double()
            values = values * scale.reshape(*scale.shape, *sites)
        weight = _shared(weight, peers, part)
        weight = weight.reshape(*weight.shape, *sites) / max(1, trajectory.log_prob.shape[2:].numel())
        device = trajectory.log_prob.device
        return Advantage(values.float().to(device), weight.float().to(device), names)

    def units(
        self, signals: Sequence[RewardSignal], trajectory: Trajectory, peers: Peers
    ) -> list[tuple[float, RewardSignal]]:
        """What the rewards say of the actions, and each one's share: a single total if added up first."""
        unknown = {s.name for s in signals} ^ self.weights.keys()
        if unknown:
            raise ValueError(
                f"rewards and weights must have the same names; only one side has {sorted(unknown)}"
            )
        views = trajectory.outcome.views
        found = [(self.weights[s.name], s) for s in signals if self.weights[s.name] != 0]
        if not found:
            raise ValueError(f"at least one reward needs a weight other than 0, got {dict(self.weights)}")
        if self.combine == "total_first":
            counted = [s for _, s in found]
            total = (
                self.total(counted, trajectory, peers) if self.total else self._total(counted, peers, views)
            )
            found = [(1.0, total)]
        found = [(share, fold(s, views, trajectory.plan)) for share, s in found]
        if self.read is not None:
            found = [(share, self.read(s, trajectory, peers)) for share, s in found]
        return found

    def _total(self, signals: Sequence[RewardSignal], peers: Peers, views: int) -> RewardSignal:
        total = sum((self.weights[s.name] * s.values.cpu().double()).sum(1, keepdim=True) for s in signals)
        complete = torch.stack([_complete(s, peers, views) for s in signals]).all(0)
        return RewardSignal("total", torch.as_tensor(total), valid=complete[:, None])

    def _compared(self, trajectory: Trajectory, peers: Peers) -> Tensor:
        """The number of the samples with which each is compared, [N]."""
        if self.compare == "group":
            return peers.group
        if trajectory.plan is None:
            raise TypeError("compare='start' needs a policy that tells the plan it followed")
        start = trajectory.plan.kin(peers.member, 0)
        names: Tensor = torch.unique(torch.stack([peers.group, start], 1), dim=0, return_inverse=True)[1]
        return names

    def compared(
        self, values: Tensor, valid: Tensor, trajectory: Trajectory, peers: Peers, aligned: bool
    ) -> Tensor:
        """How good each unit is, [N, U]; values, valid: of the samples of all ranks."""
        return self.normalize(values, valid, self._compared(trajectory, peers), aligned)

    def _spread(self, signal: RewardSignal, trajectory: Trajectory, locate: Locate, peers: Peers) -> Tensor:
        values, valid = peers.all(signal.values.cpu().double()), peers.all(_valid(signal).long()).bool()
        units = self.compared(values, valid, trajectory, peers, signal.unit.aligned)
        units = units[peers.mine, : signal.values.shape[1]]  # [B, U]
        if self.reach == "whole" or isinstance(signal.where, Whole):
            footprint = units.new_ones(1, 1, 1, *[1] * (trajectory.log_prob.ndim - 2))
        else:
            footprint = locate(signal.where, trajectory).cpu().double()  # [B, U, S, *site], broadcastable
        if self.reach == "upstream":
            footprint = footprint.flip(2).cummax(2).values.flip(2)
        return (units.reshape(*units.shape, *[1] * (footprint.ndim - 2)) * footprint).sum(1)


class Taught(Credit):
    """Every action is learned from alike, whatever the rewards say of it: it was given, not drawn."""

    def __call__(
        self,
        signals: Sequence[RewardSignal],
        trajectory: Trajectory,
        locate: Locate,
        peers: Peers | None = None,
        part: Tensor | None = None,
    ) -> Advantage:
        peers = peers or Peers(trajectory.outcome.prompts)
        weight = _shared(self.weigh(trajectory).cpu().double(), peers, part)
        device, count = trajectory.log_prob.device, len(trajectory)
        return Advantage(torch.ones(1, count, 1, device=device), weight.float().to(device), ("total",))


def by_frames(weights: Mapping[str, float], normalize: Normalize, clip: float) -> Credit:
    """Each frame of a video is compared with the same frame of its peers, and its credit stays on it.

    Rewards of whole videos count for every frame.
    """
    return Credit(weights, normalize, "normalized", "local", clip=clip)


def _standardized(values: Tensor, counted: Tensor, peers: Peers, epsilon: float = 1e-4) -> Tensor:
    """Advantages [B, S, *site] so that over counted samples of all ranks their mean is 0, deviation 1."""
    rows = torch.stack([values.flatten(1).mean(1), values.square().flatten(1).mean(1)], 1)
    mean, square = peers.all(rows)[peers.all(counted.long()).bool()].mean(0)
    scaled: Tensor = (values - mean) / ((square - mean**2).clamp(min=0).sqrt() + epsilon)
    return scaled


def _shared(weight: Tensor, peers: Peers, part: Tensor | None) -> Tensor:
    """The weights [B, S] of own actions, so that those of all ranks in one update sum to 1."""
    if part is None:
        part = torch.zeros_like(peers.mine)
    part = part.cpu() if part.ndim == 2 else part.cpu()[:, None].expand_as(weight)
    number = torch.unique(peers.all(part), return_inverse=True)[1]  # [N, S]
    sums = torch.zeros(int(number.max()) + 1 if number.numel() else 0, dtype=torch.float64)
    sums.index_add_(0, number.flatten(), peers.all(weight).flatten())
    sums = sums[number[peers.mine]][:, : weight.shape[1]]  # [B, S], the total of each action's own update
    return weight / torch.where(sums > 0, sums, 1.0)


def fold(signal: RewardSignal, views: int, plan: Plan | None = None) -> RewardSignal:
    """B * views verdicts as B verdicts of one unit per completion, placed on the action it speaks about."""
    if views == 1:
        return signal
    if signal.unit is not Unit.SAMPLE:
        raise ValueError(
            f"{signal.name}: several completions can only be judged by a reward per sample, "
            f"not by one per {signal.unit.label}"
        )
    values, valid = signal.values.reshape(-1, views), _valid(signal).reshape(-1, views)
    where: Where = Whole()
    if plan is not None and plan.singular:
        where = Steps((torch.arange(views) // len(plan.strides)).expand(len(values), -1))
    return replace(signal, values=values, valid=valid, unit=Unit.COMPLETION, where=where, details=None)


def score(signal: RewardSignal) -> Tensor:
    """The mean of each sample's valid units, [B] in float64 on the CPU; NaN where there are none."""
    return torch.where(_valid(signal), signal.values.cpu().double(), torch.nan).nanmean(1)


def _alike(rows: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.broadcast_tensors(*rows))  # type: ignore[no-untyped-call]


def _valid(signal: RewardSignal) -> Tensor:
    assert signal.valid is not None  # filled in by RewardSignal
    return signal.valid.cpu()


def _complete(signal: RewardSignal, peers: Peers, views: int) -> Tensor:
    """Which outcomes have all the verdicts that their total needs, [B * views].

    Of aligned units an outcome needs each one that any member of its group has; a unit that nobody in the
    group has does not apply to the prompt. Of others it needs one: their number varies.
    """
    valid = _valid(signal)
    if not signal.unit.aligned:
        return valid.any(1)
    every = peers.all(valid.long().reshape(-1, views, valid.shape[1]))
    _, row = torch.unique(peers.group, return_inverse=True)
    applies = torch.zeros_like(every).index_add_(0, row, every)[row] > 0
    applies = applies[peers.mine, :, : valid.shape[1]].reshape(valid.shape)
    return (valid | ~applies).all(1) & valid.any(1)
