"""Runs reward models over outcomes. A failure is a missing verdict, counted and explained, never a zero."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmalign.contracts import PairwiseReward, Reward, RewardError, RewardModel, judges_alone
from mmalign.credit import Gather, Peers, alone
from mmalign.pairwise import win_rates
from mmalign.records import Outcome, RewardSignal
from mmalign.verdicts import joined

__all__ = ["RewardError", "Scorer", "Scores", "judge", "summarize", "verdict"]

Judged = tuple[RewardSignal, Counter[str]]  # a verdict, and why some of it is missing
Objects = Callable[[Sequence[object]], list[object]]  # gathers objects of all ranks


@dataclass(frozen=True)
class Scores:
    """The verdicts on a batch, and why some are missing: per reward, how many samples for each reason."""

    signals: list[RewardSignal]
    reasons: Mapping[str, Counter[str]] = field(default_factory=dict)

    @property
    def details(self) -> Mapping[str, list[Mapping[str, object]]]:
        return {signal.name: signal.details for signal in self.signals if signal.details is not None}


class Scorer:
    """All rewards of a run.

    missing_limit: the share of samples without a verdict, over all ranks, above which scoring stops. threads:
    how many rewards work at the same time; 0 runs one after the other, raise it for rewards that wait for a
    server.
    """

    def __init__(self, rewards: Sequence[Reward], missing_limit: float = 0.2, threads: int = 0) -> None:
        names = [reward.name for reward in rewards]
        if not names:
            raise ValueError("a run needs at least one reward")
        if len(set(names)) < len(names):
            raise ValueError(f"every reward needs a name of its own, got {names}")
        if not 0 <= missing_limit <= 1:
            raise ValueError(f"missing_limit is a share between 0 and 1, got {missing_limit}")
        self.rewards, self.missing_limit = list(rewards), missing_limit
        self._pool = ThreadPoolExecutor(threads, "reward") if threads else None
        self._warned: set[tuple[str, str]] = set()

    def __call__(self, outcome: Outcome, gather: Gather = alone) -> Scores:
        """Verdicts on own samples; whether too many are missing is judged over all ranks."""
        return self.conclude(outcome, [self.singles(outcome)], gather)

    def singles(self, outcome: Outcome) -> list[Judged]:
        """What rewards say that judge samples alone; asks no other process, so any thread may call it."""
        ask = map if self._pool is None else self._pool.map
        rewards = [reward for reward in self.rewards if judges_alone(reward)]
        return list(ask(lambda reward: judge(reward, outcome), rewards))

    def conclude(self, outcome: Outcome, parts: Sequence[Sequence[Judged]], gather: Gather = alone) -> Scores:
        """Verdicts on own samples from what `singles` gave for the parts of the outcome, in their order."""
        judged = iter([_together(said) for said in zip(*parts, strict=True)])
        # Those that compare ask other processes for members of a group, which must not happen in threads.
        found = [
            next(judged) if judges_alone(reward) else verdict(reward, outcome, gather)
            for reward in self.rewards
        ]
        scores = Scores(
            [signal for signal, _ in found],
            {signal.name: reasons for signal, reasons in found if reasons},
        )
        self._check(scores, gather)
        return scores

    def _check(self, scores: Scores, gather: Gather) -> None:
        missing = torch.stack([_missing(signal) for signal in scores.signals], 1)  # [B, rewards]
        share = gather(missing).double().mean(0).tolist()
        for signal, lost in zip(scores.signals, share, strict=True):
            reasons = scores.reasons.get(signal.name, Counter())
            said = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            if lost > self.missing_limit:
                raise RewardError(
                    f"reward {signal.name!r} has no verdict for {lost:.0%} of the samples, more than the "
                    f"limit of {self.missing_limit:.0%} (training.max_missing). "
                    f"{'On this process: ' + said if said else 'The failures are on another process.'}"
                )
            for reason in reasons:
                if (signal.name, reason) not in self._warned:
                    self._warned.add((signal.name, reason))
                    warnings.warn(
                        f"reward {signal.name!r} has no verdict for {reasons[reason]} of {len(missing)} "
                        f"samples ({reason}). They count as missing; said once, logged throughout.",
                        RuntimeWarning,
                        stacklevel=3,
                    )


def verdict(reward: Reward, outcome: Outcome, gather: Gather = alone) -> Judged:
    """The verdict of any reward on own samples; all ranks ask one that compares the members of a group."""
    if isinstance(reward, PairwiseReward):
        return win_rates(reward, outcome, gather)
    if not judges_alone(reward) and not Peers(outcome.prompts, gather).whole():
        raise RewardError(
            f"{reward.name!r} compares the members of a group on a server, which must lie on one process: "
            "make prompts.per_iteration a multiple of the processes"
        )
    return judge(reward, outcome)


def judge(reward: RewardModel, outcome: Outcome) -> Judged:
    """One reward's verdict on the CPU, and the reasons why some of it is missing.

    A reward that raises on the batch is asked sample by sample, so that one bad sample costs one verdict.
    """
    with torch.no_grad():
        try:
            signal = checked(reward, reward(outcome), outcome)
        except RewardError:
            raise
        except Exception as error:
            if len(outcome.prompts) == 1:
                return _silent(reward, outcome), Counter({_reason(error): 1})
            parts = [judge(reward, sample(outcome, row)) for row in range(len(outcome.prompts))]
            whole = joined(reward.name, [part for part, _ in parts])
            if not _valid(whole).any():
                return whole, Counter({_reason(error): len(parts)})
            return whole, sum((reasons for _, reasons in parts), Counter())
    lost = int(_missing(signal).sum())
    return signal, Counter({"the value is not finite, or marked as no verdict": lost} if lost else {})


def checked(reward: RewardModel, signal: object, outcome: Outcome) -> RewardSignal:
    """What a reward returned, if it is what the contract asks for; moved to the CPU."""
    if not isinstance(signal, RewardSignal):
        raise RewardError(f"reward {reward.name!r} must return a RewardSignal, got {type(signal).__name__}")
    if signal.name != reward.name:
        raise RewardError(
            f"reward {reward.name!r} signs its verdict as {signal.name!r}; both names must be equal"
        )
    rows = len(outcome.prompts) * outcome.views
    if len(signal.values) != rows:
        raise RewardError(
            f"reward {reward.name!r} must give values of shape [{rows}, units], one row per outcome, "
            f"got {list(signal.values.shape)}"
        )
    if signal.details is not None and len(signal.details) != rows:
        raise RewardError(
            f"reward {reward.name!r} must give {rows} details, one per outcome, got {len(signal.details)}"
        )
    assert signal.valid is not None  # filled in by RewardSignal
    return replace(signal, values=signal.values.detach().float().cpu(), valid=signal.valid.cpu())


def sample(outcome: Outcome, row: int) -> Outcome:
    """One sample of an outcome with all its completions."""
    media = outcome.media[row * outcome.views : (row + 1) * outcome.views]
    return Outcome(outcome.prompts.take(torch.tensor([row])), media, outcome.views)


def _together(parts: Sequence[Judged]) -> Judged:
    if len(parts) == 1:
        return parts[0]
    reasons = sum((found for _, found in parts), Counter[str]())
    return joined(parts[0][0].name, [signal for signal, _ in parts]), reasons


def summarize(scores: Scores, peers: Peers, views: int, objects: Objects = list) -> dict[str, float]:
    """Numbers about each reward over all ranks: mean, spread, spread inside groups, share missing; and its
    details.

    A sample's value is the mean of its valid units.
    """
    out: dict[str, float] = {}
    _, row = torch.unique(peers.group, return_inverse=True)
    for signal in scores.signals:
        valid = _valid(signal).reshape(-1, views * signal.values.shape[1])
        values = signal.values.double().reshape(valid.shape)
        means = peers.all((values * valid).sum(1) / valid.sum(1).clamp(min=1))
        ok = peers.all(valid.any(1).long()).bool()
        name = f"reward/{signal.name}"
        out[f"{name}/missing"] = 1 - ok.double().mean().item()
        if not ok.any():
            continue
        out[name] = means[ok].mean().item()
        out[f"{name}/std"] = means[ok].std(correction=0).item()
        out[f"{name}/group_std"] = _group_std(means, ok, row)
        out |= {
            f"{name}/{key}": value for key, value in _means(scores.details.get(signal.name), objects).items()
        }
    return out


def _group_std(values: Tensor, ok: Tensor, row: Tensor) -> float:
    """Mean over groups of the standard deviation inside them."""
    groups = int(row.max()) + 1

    def mean(x: Tensor) -> Tensor:
        total = x.new_zeros(groups).index_add_(0, row, torch.where(ok, x, 0.0))
        return total / torch.zeros(groups).double().index_add_(0, row, ok.double()).clamp(min=1)

    variance = mean((values - mean(values)[row]) ** 2)
    return variance.sqrt()[torch.unique(row[ok])].mean().item()


def _means(details: Sequence[Mapping[str, object]] | None, objects: Objects) -> dict[str, float]:
    """Mean of every number among the details, over the samples of all ranks that have it."""
    sums: dict[str, tuple[float, int]] = {}
    for detail in details or ():
        for key, value in detail.items():
            if isinstance(value, int | float):
                total, count = sums.get(key, (0.0, 0))
                sums[key] = total + float(value), count + 1
    merged: dict[str, tuple[float, int]] = {}
    for part in objects([sums]):
        assert isinstance(part, dict)
        for key, (total, count) in part.items():
            before, seen = merged.get(key, (0.0, 0))
            merged[key] = before + total, seen + count
    return {key: total / count for key, (total, count) in sorted(merged.items())}


def _valid(signal: RewardSignal) -> Tensor:
    assert signal.valid is not None  # filled in by RewardSignal
    return signal.valid


def _missing(signal: RewardSignal) -> Tensor:
    """Which outcomes have no verdict at all, [B * views]."""
    return ~_valid(signal).any(1)


def _silent(reward: RewardModel, outcome: Outcome) -> RewardSignal:
    rows = len(outcome.prompts) * outcome.views
    return RewardSignal(reward.name, torch.zeros(rows, 1), valid=torch.zeros(rows, 1, dtype=torch.bool))


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
