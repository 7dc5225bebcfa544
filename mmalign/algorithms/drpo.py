"""DRPO: brevity is weighed among right texts alone, and never held against one (arXiv:2510.04474).

With s(o) = 1/|o| sum_t log p(o_t), and of the texts of a prompt P the right ones and N the wrong ones:

    w(o) = exp(b(o) / lambda) / mean_P exp(b / lambda)               b(o) = 1 - |o| / C, or another reward
    J    = mean_P w s  -  tau log mean_N exp(s / tau)  -  beta max(0, KL - delta)

w is the best tilt of the right texts towards brevity at a KL price of lambda: always positive, so that no
right text is pushed down for its length. Prompts with right texts alone, or wrong ones alone, are left out.
The KL is from the policy that sampled, estimated over all words of the update by r - 1 - log r.

A text is right if its reward (the sum of all, by their weights) is at least `right`. For captions: right
without a false claim, and `prefer` a watched reward of coverage, lets the more complete of them weigh more.
Losses compare texts of a group, so one forward without gradient a text comes on top (`mmalign.coupling`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmalign.coupling import Coupled, Population
from mmalign.credit import Credit, Peers, per_sample, score
from mmalign.objectives import CEILING, LAST, Measures
from mmalign.plans import texts
from mmalign.records import RewardSignal, Trajectory
from mmalign.sde import Noise
from mmalign.trainer import Algorithm

ROUNDING = 1e-6  # rewards are fp32


@dataclass(frozen=True)
class DRPO:
    """A discriminative loss of right and wrong texts, with a preference among the right ones."""

    prefer: str = ""  # reward that weighs the right texts (times its weight); empty: brevity
    right: float = 1.0  # reward from which on a text is right
    longest: int = 1024  # C: words at which brevity is 0; the policy's max_tokens
    temperature: float = 0.1  # lambda: lower it for a stronger preference among right texts
    tau: float = 10.0  # higher weighs all wrong texts alike, lower the likeliest of them alone
    penalty: float = 1000.0  # beta: how hard it is to leave the trust region
    delta: float = 1e-4  # KL from the policy that sampled up to which there is no penalty

    def __post_init__(self) -> None:
        for name in ("longest", "temperature", "tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        if self.prefer and not (weights.get(self.prefer) and sum(map(bool, weights.values())) > 1):
            raise ValueError(
                f"prefer must name one of at least two rewards with a weight, got {self.prefer!r} of "
                f"{dict(weights)}"
            )
        return Algorithm(
            plans=texts(),
            credit=Credit(
                weights,
                as_it_is,
                "total_first",
                "whole",
                per_sample,
                clip=torch.inf,
                total=partial(self.sides, weights),
            ),
            objective=Coupled(lambda new: new.log_prob, self.loss, against=(LAST,)),
            noise=Noise(),
            copies={LAST: 0.0},
        )

    def sides(
        self,
        weights: Mapping[str, float],
        signals: Sequence[RewardSignal],
        trajectory: Trajectory,
        peers: Peers,
    ) -> RewardSignal:
        """w of each right text and -1 for each wrong one; none in a prompt that has but one kind."""
        scores = {signal.name: weights[signal.name] * score(signal) for signal in signals}
        written = trajectory.mask.sum(1).cpu()
        preferred = scores.pop(self.prefer) if self.prefer else 1 - written.double() / self.longest
        total = torch.stack(list(scores.values())).sum(0)
        found = sides(
            peers.all(total), peers.all(preferred), peers.group, self.right - ROUNDING, self.temperature
        )
        return RewardSignal("total", torch.where(written > 0, found[peers.mine], torch.nan)[:, None])

    def loss(self, everyone: Population) -> tuple[Tensor, Measures]:
        log_ratio = everyone.now - everyone.frozen[LAST]
        words = everyone.weight > 0
        counted = words.any(1)
        likely = (everyone.now * words).sum(1) / words.sum(1).clamp(min=1)
        side = everyone.advantage[0, :, 0]
        gains = [
            discriminated(likely[rows], side[rows], self.tau)
            for one in torch.unique(everyone.group[counted])
            for rows in [counted & (everyone.group == one)]
        ]
        away = log_ratio.clamp(max=CEILING).expm1() - log_ratio
        kl = away[words].mean()
        loss = self.penalty * (kl - self.delta).clamp(min=0) - torch.stack(gains).mean()
        return loss[None], {"log_ratio": log_ratio, "kl": away}


def as_it_is(values: Tensor, valid: Tensor, group: Tensor, aligned: bool) -> Tensor:
    """The weight of a text is compared with its peers' already."""
    return values.double() * valid


def sides(total: Tensor, preferred: Tensor, group: Tensor, right: float, temperature: float) -> Tensor:
    """w for the right texts of each group, -1 for the wrong; NaN where one kind is missing. All are [N]."""
    out = torch.full_like(total, torch.nan)
    for one in torch.unique(group):
        known = (group == one) & ~(total.isnan() | preferred.isnan())
        good, bad = known & (total >= right), known & (total < right)
        if good.any() and bad.any():
            out[good] = tilt(preferred[good], temperature)
            out[bad] = -1.0
    return out


def tilt(preferred: Tensor, temperature: float) -> Tensor:
    """exp(b / lambda) over its mean, [n]: positive, with mean 1."""
    return (preferred / temperature).softmax(0) * len(preferred)


def discriminated(likely: Tensor, side: Tensor, tau: float) -> Tensor:
    """What one prompt gains: mean_P w s - tau log mean_N exp(s / tau); likely, side: [n]."""
    good, bad = side > 0, side < 0
    wrong = (likely[bad] / tau).logsumexp(0) - math.log(int(bad.sum()))
    return (side[good] * likely[good]).mean() - tau * wrong
