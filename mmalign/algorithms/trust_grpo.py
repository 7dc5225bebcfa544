"""Trust-GRPO: a judge of the thinking is believed as far as it agrees with the outcome (arXiv:2505.17018).

Of the G texts of a prompt with outcomes R^o in [0, 1] and thinking scores R^t in [0, 1], those with R^o of
1/2 or more are right, the others wrong:

    gamma = 1                                  if the mean R^t of the right is not below that of the wrong
          = exp(mean_right R^t - mean_wrong R^t)                  otherwise
    R_i   = R^o_i + gamma alpha exp(-s / T) R^t_i                 s: iterations so far
    A_i   = (R_i - mean R) / std R

alpha is the weight of the thinking reward. The guards of the public code are settings: a text whose outcome
is below `gate` gets no thinking score, and neither does a group whose thinking scores all lie at one end
(`even`). A group of right texts alone, or of wrong ones alone, has gamma = 1.

Differs in that T counts iterations, where the public code counts optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.credit import Credit, Peers, per_action, score, zscore
from mmalign.objectives import REFERENCE, ClippedRatio
from mmalign.plans import texts
from mmalign.records import RewardSignal, Trajectory
from mmalign.sde import Noise
from mmalign.trainer import Algorithm

RIGHT = 0.5  # outcome from which on a text is right


@dataclass(frozen=True)
class TrustGRPO:
    """One reward judges the thinking; all others, by their weights, are the outcome."""

    thinking: str  # name of the reward that judges the thinking; its weight is alpha (paper: 0.3)
    horizon: float = 1500.0  # iterations in which the thinking reward falls to 1/e; the length of the run
    gate: float = 0.2  # outcome below which thinking earns nothing; 0: it always does, as in the paper
    # Thinking scores of a group that all lie at or below the first, or at or above the second, tell nothing
    # apart and are left out; (0, 1) leaves out only those that are equal to an end.
    even: tuple[float, float] = (0.1, 0.9)
    clip: float = 0.2  # how far a probability may fall, as a share of itself
    clip_high: float = 0.2  # how far it may rise
    kl: float = 0.04  # pull towards the base model; 0 saves a forward
    advantage_clip: float = 5.0  # bound on the advantage

    def __post_init__(self) -> None:
        if not self.horizon > 0:
            raise ValueError(f"horizon must be positive, got {self.horizon}")
        if not 0 <= self.even[0] < self.even[1] <= 1:
            raise ValueError(f"even must rise within 0..1, got {self.even}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        others = [name for name, weight in weights.items() if weight and name != self.thinking]
        if not weights.get(self.thinking) or not others:
            raise ValueError(
                f"thinking must name one of at least two rewards with a weight, got {self.thinking!r} of "
                f"{dict(weights)}"
            )
        trust = Trust(self, weights)
        return Algorithm(
            plans=texts(),
            credit=Credit(
                weights, zscore, "total_first", "whole", per_action, self.advantage_clip, total=trust
            ),
            objective=ClippedRatio(self.clip, self.clip_high, self.kl),
            noise=Noise(),
            copies={REFERENCE: 1.0} if self.kl else {},
            memory=trust,
        )


class Trust:
    """Adds the thinking reward to the outcome, as far as it is trusted and the less the later."""

    def __init__(self, settings: TrustGRPO, weights: Mapping[str, float]) -> None:
        self.settings, self.weights = settings, weights
        self.iteration = 0
        self.seen: dict[str, float] = {}

    @property
    def annealing(self) -> float:
        return math.exp(-self.iteration / self.settings.horizon)

    def __call__(self, signals: Sequence[RewardSignal], trajectory: Trajectory, peers: Peers) -> RewardSignal:
        named = {signal.name: score(signal) for signal in signals}
        thinking = peers.all(named.pop(self.settings.thinking))
        outcome = torch.stack([self.weights[name] * peers.all(found) for name, found in named.items()]).sum(0)
        group = peers.group
        counted = thought(outcome, thinking, group, self.settings.gate, self.settings.even)
        believed = trust(outcome, thinking, group)
        share = self.weights[self.settings.thinking] * self.annealing
        total = outcome + share * believed * counted
        self.seen = {
            "trust/gamma": believed[~total.isnan()].mean().item(),
            "trust/doubted_share": (believed < 1)[~total.isnan()].double().mean().item(),
            "trust/annealing": self.annealing,
        }
        return RewardSignal("total", total[peers.mine, None])

    def observe(
        self, signals: Sequence[RewardSignal], trajectory: Trajectory, peers: Peers
    ) -> dict[str, float]:
        return self.seen

    def note(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        self.iteration = iteration + 1
        return {}

    def state_dict(self) -> dict[str, object]:
        return {"iteration": self.iteration}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.iteration = state["iteration"]


def trust(outcome: Tensor, thinking: Tensor, group: Tensor) -> Tensor:
    """gamma of the group of each text, [N] in (0, 1]; outcome, thinking: [N], NaN is no verdict."""
    right = _mean(thinking, outcome >= RIGHT, group)
    wrong = _mean(thinking, outcome < RIGHT, group)
    return (right - wrong).clamp(max=0).exp().nan_to_num(1.0)


def thought(
    outcome: Tensor, thinking: Tensor, group: Tensor, gate: float, even: tuple[float, float]
) -> Tensor:
    """The thinking scores that count, [N]; those below the gate and in even groups are 0."""
    known = ~thinking.isnan()
    apart = torch.zeros_like(known)
    for one in torch.unique(group):
        rows = group == one
        scores = thinking[rows & known]
        apart[rows] = not bool((scores <= even[0]).all() or (scores >= even[1]).all())
    return torch.where(known & ~(apart & (outcome >= gate)), 0.0, thinking)


def _mean(values: Tensor, chosen: Tensor, group: Tensor) -> Tensor:
    """Mean of the chosen values of each group, given back to its members, [N]; NaN where there is none."""
    row = torch.unique(group, return_inverse=True)[1]
    chosen = chosen & ~values.isnan()
    zeros = values.new_zeros(int(row.max()) + 1)
    total = zeros.index_add(0, row, torch.where(chosen, values, 0.0))
    return (total / zeros.index_add(0, row, chosen.to(values.dtype)))[row]
