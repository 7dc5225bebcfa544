"""POW3R: criteria on which a group disagrees teach more than those that all pass or fail (arXiv:2605.20164).

Of the G texts of a prompt, with verdicts v_ij in [0, 1] on criteria j of weight w_j in categories k:

    s_j  = std of v_1j ... v_Gj and two verdicts more, a 0 and a 1         (smoothed: never 0)
    c_j  = max(0, s_j - s_0) / (1/2 - s_0)                                s_0: that of G equal verdicts
    a_j  = floor + (cap - floor) c_j
    w~_j = w_j a_j, rescaled inside each category to the sum of its w_j
    R_i  = sum_j w~_j v_ij / sum_j w~_j,    A_i = (R_i - mean R) / std R

The paper states what the factor a_j must do (smoothed contrast, a floor for every criterion, a bound, the
mass of a category kept) but not its form; this one is ours. A criterion whose judge answers by chance has
the highest contrast of all: see first that the judge repeats itself.

A reward with units per criterion brings the verdicts; the weight and category of each are those of the items
of the prompt, in their order: `{"questions": [{..., "weight": 2, "category": "color"}, ...]}`. Without them
criteria weigh alike and are of one category. What is logged and evaluated stays the reward itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmalign.credit import Credit, Peers, per_action, zscore
from mmalign.objectives import REFERENCE, ClippedRatio
from mmalign.plans import texts
from mmalign.records import Prompts, RewardSignal, Trajectory, Unit
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class POW3R:
    """GRPO on rubrics whose criteria are weighed by what they can teach now."""

    items: str = "questions"  # what in a prompt lists the criteria, with their weights and categories
    floor: float = 0.5  # factor of a criterion on which all agree; equal to cap: static weights
    cap: float = 1.5  # factor of one on which half pass
    clip: float = 0.2  # how far a probability may fall, as a share of itself
    clip_high: float = 0.2  # how far it may rise
    kl: float = 0.0  # pull towards the base model; 0 saves a forward
    advantage_clip: float = 5.0  # bound on the advantage

    def __post_init__(self) -> None:
        if not 0 < self.floor <= self.cap:
            raise ValueError(f"floor must be positive and no more than cap, got {self.floor}, {self.cap}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        total = partial(self.total, weights)
        return Algorithm(
            plans=texts(),
            credit=Credit(
                weights, zscore, "total_first", "whole", per_action, self.advantage_clip, total=total
            ),
            objective=ClippedRatio(self.clip, self.clip_high, self.kl),
            noise=Noise(),
            copies={REFERENCE: 1.0} if self.kl else {},
        )

    def total(
        self,
        weights: Mapping[str, float],
        signals: Sequence[RewardSignal],
        trajectory: Trajectory,
        peers: Peers,
    ) -> RewardSignal:
        """The rubric score of each text, by weights that fit its group; rewards are added by their own."""
        if not any(signal.unit is Unit.CRITERION for signal in signals):
            raise ValueError(
                "POW3R weighs criteria, so at least one reward must give a unit per criterion, got "
                + ", ".join(f"{signal.name} per {signal.unit.label}" for signal in signals)
            )
        scores = [
            weights[signal.name] * self.score(signal, trajectory.outcome.prompts, peers) for signal in signals
        ]
        return RewardSignal("total", torch.stack(scores).sum(0)[:, None])

    def score(self, signal: RewardSignal, prompts: Prompts, peers: Peers) -> Tensor:
        """The score of each own text, [B]; NaN where a reward has no verdict."""
        assert signal.valid is not None  # filled in by RewardSignal
        verdicts = torch.where(signal.valid, signal.values.double(), torch.nan).cpu()
        if signal.unit is not Unit.CRITERION:
            return verdicts.nanmean(1)
        if bool(((verdicts < 0) | (verdicts > 1)).any()):
            raise ValueError(f"POW3R needs verdicts in [0, 1]; {signal.name} gave some outside of it")
        factor = factors(peers.all(verdicts), peers.group, self.floor, self.cap)
        weight, category = rubric(prompts, self.items, verdicts.shape[1])
        adapted = rescaled(weight, factor[peers.mine, : verdicts.shape[1]], category)
        known = ~verdicts.isnan()
        return (adapted * verdicts.nan_to_num()).sum(1) / (adapted * known).sum(1)


def smoothed_std(verdicts: Tensor) -> Tensor:
    """Standard deviation of the verdicts [G, J] and of a 0 and a 1 beside them, [J]; NaN is no verdict."""
    known = ~verdicts.isnan()
    count = known.sum(0) + 2
    mean, square = ((verdicts.nan_to_num() ** n).mul(known).sum(0).add(1) / count for n in (1, 2))
    return (square - mean**2).sqrt()


def factors(verdicts: Tensor, group: Tensor, floor: float, cap: float) -> Tensor:
    """a_j of each text's group, [N, J] in [floor, cap]; 0 where nobody has a verdict. verdicts: [N, J]."""
    out = torch.zeros_like(verdicts)
    for one in torch.unique(group):
        rows = group == one
        mine = verdicts[rows]
        least = smoothed_std(torch.where(mine.isnan(), torch.nan, 0.0))
        contrast = (smoothed_std(mine) - least).clamp(min=0) / (0.5 - least)
        out[rows] = torch.where(mine.isnan().all(0), 0.0, floor + (cap - floor) * contrast)
    return out


def rubric(prompts: Prompts, items: str, count: int) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the categories of the criteria, [B, count] each."""
    weight, category = torch.ones(len(prompts), count).double(), torch.zeros(len(prompts), count).long()
    for row, extra in enumerate(prompts.extra):
        listed: Any = extra.get(items)
        if listed is None:
            continue
        names: dict[object, int] = {}
        for j, item in enumerate(listed[:count]):
            weight[row, j] = float(item.get("weight", 1.0))
            category[row, j] = names.setdefault(item.get("category"), len(names))
    if bool((weight < 0).any()):
        raise ValueError(f"the weights of {items!r} must not be negative")
    return weight, category


def rescaled(weight: Tensor, factor: Tensor, category: Tensor) -> Tensor:
    """weight times factor, with the sum of the weights that apply kept inside each category; all [B, J]."""

    def mass(x: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter_add_(1, category, x).gather(1, category)

    adapted, applies = weight * factor, factor > 0
    return adapted * mass(weight * applies) / mass(adapted).clamp(min=torch.finfo(adapted.dtype).tiny)
