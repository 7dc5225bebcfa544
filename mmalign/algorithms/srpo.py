"""SRPO: Direct-Align and semantic relative preference (Shen et al. 2025, arXiv:2509.06942).

Direct-Align. A finished sample x0 is noised by a known noise e to a level a; the model makes one short step
to b = a - stride; what is left of e is taken away exactly. The result is sharp at any level, so that early
steps can be trained with one gradient step. The inversion branch goes the other way, from b up to a:

    denoise   x = (1 - a) x0 + a e,   y = x + (b - a) v(x, a),   x0' = (y - b e) / (1 - b)
    invert    x = (1 - b) x0 + b e,   y = x + (a - b) v(x, b),   x0' = (y - a e) / (1 - a)

Semantic relative preference. The reward is asked twice, with a wanted and an unwanted word before the prompt;
what both have in common, such as a love of strong colors, cancels out. Inversion swaps the two, because it
moves the sample the other way:

    r  = (1 + k) R(x0', wanted + prompt) - R(x0', unwanted + prompt)           in the denoise branch
    r' = (1 + k') R(x0', unwanted + prompt) - R(x0', wanted + prompt)          in the invert branch
    L  = max(0, margin - r) + max(0, margin - r')

k = k' = 0 is the paper's relative form; the public code has k from 0.1 to 0.25 and k' from 0.3 to 0.01 over
the schedule. Without an unwanted word its R is 0 (plain Direct-Align). N samples of T steps cost N T forwards
to sample and 2 N to train (N without inversion), twice that with guidance.

Differs from the public code in that samples come from the plain ODE, in that levels are those of the
sampler's schedule, one an iteration for all samples, and in that k is 0 unless it is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.contracts import DrawsOn, Policy
from mmalign.credit import Credit
from mmalign.gradients import Differentiated, drawing_on
from mmalign.objectives import Measures
from mmalign.randomness import generator
from mmalign.records import Halted, Minibatch, Plan
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class SRPO:
    """Trains early steps through the reward, against its own taste."""

    steps: int = 25  # denoising steps in training
    first: float = 0.1  # share of the schedule before the noisiest level; nearer to 0 structure breaks
    last: float = 0.6  # share of the schedule before the cleanest level; nearer to 1 colors are hacked
    stride: float = 0.1  # how far the model steps, in sigma; the rest of the noise is taken away exactly
    margin: float = 0.7  # relative reward beyond which nothing more is asked for
    wanted: str = ""  # word before the prompt that the reward should agree with, such as "realistic"
    unwanted: str = ""  # word before the prompt that it should not; empty: plain Direct-Align
    boost: tuple[float, float] = (0.0, 0.0)  # k at pure noise and at the clean end, linear in sigma between
    boost_inverted: tuple[float, float] = (0.0, 0.0)  # the same for k', of the inversion branch
    invert: bool = True  # also train the inversion branch; off saves half of the update and is hacked sooner
    scale: float = 1.0  # of the loss; lost on AdamW, but for the clip of the gradient and far below 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.last < 1:
            raise ValueError(f"first and last must rise within (0, 1), got {self.first}, {self.last}")
        if not 0 < self.stride < 1:
            raise ValueError(f"stride must lie in (0, 1), got {self.stride}")
        if self.wanted == self.unwanted and self.wanted:
            raise ValueError(f"wanted and unwanted are both {self.wanted!r}: nothing would be left to learn")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        through = Differentiated(weights, cost=lambda plan: 1 + self.invert)
        return Algorithm(
            plans=self._plans,
            credit=Credit(weights),
            objective=DirectAlign(
                through,
                self.stride,
                self.margin,
                self.wanted,
                self.unwanted,
                self.invert,
                self.scale,
                self.boost,
                self.boost_inverted,
            ),
            noise=Noise(level=0.0),
            through=through,
        )

    def _plans(self, iteration: int, seed: int) -> list[Plan]:
        low, high = (
            min(max(1, int(share * self.steps)), self.steps - 1) for share in (self.first, self.last)
        )
        level = low + int(torch.randint(high - low + 1, (), generator=generator(seed, "level", iteration)))
        return [Plan(self.steps, halt=self.steps - level)]


def recovered(model: DrawsOn, batch: Minibatch, at: Halted, here: Tensor, there: Tensor) -> Tensor:
    """x0' after one step of the model from level `here` to `there` and the removal of the known noise."""
    x = (1 - here) * at.clean + here * at.noise
    y = x + (there - here) * model.velocity(batch.trajectory, batch.pick, x, here)
    return (y - there * at.noise) / (1 - there)


@dataclass(frozen=True)
class DirectAlign:
    """Raise the relative reward of the recovered sample, in one or both branches."""

    reward: Differentiated
    stride: float = 0.1
    margin: float = 0.7
    wanted: str = ""
    unwanted: str = ""
    invert: bool = True
    scale: float = 1.0
    boost: tuple[float, float] = (0.0, 0.0)
    boost_inverted: tuple[float, float] = (0.0, 0.0)
    clip_range: float | None = None
    idle_at_zero: bool = False

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        model = drawing_on(policy)
        at = model.halted(batch.trajectory, batch.pick)
        high = at.path[0]
        low = (high - self.stride).clamp(min=0)
        liked, disliked = self.asked(model, batch, recovered(model, batch, at, high, low))
        gain = (1 + between(self.boost, high)) * liked - disliked
        loss = (self.margin - gain).relu()
        if self.invert:
            liked, disliked = self.asked(model, batch, recovered(model, batch, at, low, high))
            loss = loss + (self.margin - (1 + between(self.boost_inverted, high)) * disliked + liked).relu()
        measures = {"relative_reward": gain.detach(), "satisfied_share": gain.detach() >= self.margin}
        return self.scale * (loss * batch.weight).sum(0, keepdim=True), measures

    def asked(self, model: DrawsOn, batch: Minibatch, clean: Tensor) -> tuple[Tensor, Tensor]:
        """The reward with the wanted word and with the unwanted one, 0 without one; [n] each."""
        liked = self.reward(model, batch, clean, lambda text: f"{self.wanted} {text}".strip())
        if not self.unwanted:
            return liked, torch.zeros_like(liked)
        return liked, self.reward(model, batch, clean, lambda text: f"{self.unwanted} {text}")


def between(ends: tuple[float, float], sigma: Tensor) -> Tensor:
    """A number that is the first of `ends` at sigma = 1, the second at 0, and on a line between them."""
    return ends[0] * sigma + ends[1] * (1 - sigma)
