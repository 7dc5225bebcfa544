"""DRaFT and AlignProp: rewards back-propagated through sampling (Clark et al. 2023, arXiv:2309.17400;
Prabhudesai et al. 2023, arXiv:2310.03739).

    J = E R(decode(x_0)),    with gradients through the last K steps alone:  x_K is a constant

    DRaFT-K    K = last; K = steps is DRaFT without truncation, K = 1 is the cheapest and often the best
    DRaFT-LV   K = 1 and noises = n: the finished sample is noised n times to the level of the last step, and
               each is denoised once: n gradients for one sampling, of less variance
    AlignProp  K anew in each iteration, a normal number around `last` of deviation `spread`, within 1..steps

N samples of T steps cost N T forwards to sample and N K to train (DRaFT-LV: N n), twice that with guidance.
With policy.gradient_checkpointing memory does not grow with K but for the states between steps, and every
forward of the update is made twice.

Differs from AlignProp's public code in that sampling is the plain ODE rather than DDIM with eta 1, and from
both in that the last K steps are drawn twice: once in sampling, and again with gradients in the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mmalign.contracts import Policy
from mmalign.credit import Credit
from mmalign.gradients import Differentiated, drawing_on
from mmalign.objectives import Measures
from mmalign.randomness import generator
from mmalign.records import Minibatch, Plan
from mmalign.sde import Noise, euler
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class DRaFT:
    """Learns fast where the reward has a gradient, and finds its holes as fast: watch a held-out reward."""

    steps: int = 10  # denoising steps in training
    last: int = 1  # steps that gradients flow through; more reach layout, cost forwards, and may explode
    spread: float = 0.0  # deviation of that number from iteration to iteration (AlignProp: 5 of 50 steps)
    noises: int = 0  # fresh noises per sample (DRaFT-LV: 2); 0 goes on from the state that was sampled
    scale: float = 1.0  # of the loss; lost on AdamW, but for the clip of the gradient and far below 1e-3

    def __post_init__(self) -> None:
        if not 1 <= self.last <= self.steps:
            raise ValueError(f"last must lie in 1..{self.steps}, the number of steps, got {self.last}")
        if self.spread < 0 or self.noises < 0:
            raise ValueError(f"spread and noises must not be negative, got {self.spread}, {self.noises}")
        if self.noises and (self.last > 1 or self.spread):
            raise ValueError("noises go with the last step alone: set last=1 and spread=0")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        through = Differentiated(weights, cost=lambda plan: plan.halt)
        return Algorithm(
            plans=self._plans,
            credit=Credit(weights),
            objective=LastSteps(through, self.noises > 0, self.scale),
            noise=Noise(level=0.0),
            through=through,
        )

    def _plans(self, iteration: int, seed: int) -> list[Plan]:
        moved = self.spread * float(torch.randn((), generator=generator(seed, "tail", iteration)))
        halt = min(max(1, round(self.last + moved)), self.steps)
        return [Plan(self.steps, halt=halt, noises=max(1, self.noises))]


@dataclass(frozen=True)
class LastSteps:
    """Raise the reward of the finished sample by the last steps that led to it.

    renewed: they start from the finished sample noised again, not from where it came from.
    """

    reward: Differentiated
    renewed: bool = False
    scale: float = 1.0
    clip_range: float | None = None
    idle_at_zero: bool = False

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        model = drawing_on(policy)
        at = model.halted(batch.trajectory, batch.pick)
        first = at.path[0]
        x = (1 - first) * at.clean + first * at.noise if self.renewed else at.x
        for sigma, after in pairwise(at.path):
            x = euler(x, model.velocity(batch.trajectory, batch.pick, x, sigma), sigma, after)
        reward = self.reward(model, batch, x / (1 - at.path[-1]))
        return -self.scale * (reward * batch.weight).sum(0, keepdim=True), {"drawn_reward": reward.detach()}
