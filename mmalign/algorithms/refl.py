"""ReFL: reward feedback learning (Xu et al. 2023, arXiv:2304.05977).

The ODE is halted at a random late step t, the clean sample is predicted from there in one step, and the
reward's gradient flows back through that step alone:

    L = scale E max(0, margin - R(decode(x_t - sigma_t v(x_t))))        t ~ Uniform{first, ..., last}

N samples of T steps cost N T forwards to sample and N to train, twice that with guidance.

Differs from the paper in that t is drawn once an iteration, for all samples, and in that there is no loss on
data beside it, which the public trainer leaves out as well. Sampling goes on to the end, so that the reward
of finished samples is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.contracts import Policy
from mmalign.credit import Credit
from mmalign.gradients import Differentiated, drawing_on
from mmalign.objectives import Measures
from mmalign.randomness import generator
from mmalign.records import Minibatch, Plan
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class ReFL:
    """The cheapest of the gradient methods; learns looks, and hardly any layout."""

    steps: int = 40  # denoising steps in training
    first: float = 0.75  # share of the steps before the first halt; lower and rewards are asked about a blur
    last: float = 0.975  # share of the steps before the last halt
    margin: float = 2.0  # reward beyond which nothing more is asked for; keep it above the best and it is off
    scale: float = 1e-3  # of the loss; lost on AdamW, but for the clip of the gradient and far below 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last < 1:
            raise ValueError(f"first and last must rise within [0, 1), got {self.first}, {self.last}")
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        through = Differentiated(weights, cost=lambda plan: 1)
        return Algorithm(
            plans=self._plans,
            credit=Credit(weights),
            objective=OneStep(through, self.margin, self.scale),
            noise=Noise(level=0.0),
            through=through,
        )

    def _plans(self, iteration: int, seed: int) -> list[Plan]:
        low, high = int(self.first * self.steps), int(self.last * self.steps)
        step = low + int(torch.randint(high - low + 1, (), generator=generator(seed, "halt", iteration)))
        return [Plan(self.steps, halt=self.steps - step)]


@dataclass(frozen=True)
class OneStep:
    """Raise the reward of the clean sample that is predicted from where sampling was halted."""

    reward: Differentiated
    margin: float = 2.0
    scale: float = 1e-3
    clip_range: float | None = None
    idle_at_zero: bool = False

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        model = drawing_on(policy)
        at = model.halted(batch.trajectory, batch.pick)
        sigma = at.path[0]
        clean = at.x - sigma * model.velocity(batch.trajectory, batch.pick, at.x, sigma)
        reward = self.reward(model, batch, clean)
        loss = self.scale * (self.margin - reward).relu()
        measures = {"predicted_reward": reward.detach(), "satisfied_share": reward.detach() >= self.margin}
        return (loss * batch.weight).sum(0, keepdim=True), measures
