"""Relative trajectory balance in its variance form: sampling in proportion to p_ref exp(beta R), rather than
maximizing R (relative trajectory balance, arXiv:2405.20971; GFlowNets on diffusion, arXiv:2406.00633).

If the policy samples from p_ref(x0 | prompt) exp(beta R(x0)) / Z, then for each of its trajectories

    delta_i = sum_t log [p(x_t' | x_t) / p_ref(x_t' | x_t)] - beta R_i = -log Z

is the same number. Of a group the loss is half of its variance, which needs no log Z:

    L = 1/2 Var_group(delta)

At p = p_ref its gradient is that of the policy gradient with R_i less the mean of the group, times -beta;
from there on the log-ratio keeps what the base model had, instead of one best sample.

The law of the first noise is fixed. So the optimum holds exactly only where x0 does not depend on it, which
is so for the memoryless noise level of sqrt(2) (arXiv:2409.08861), the default; with less noise the tilt is
one per first noise, and `share_noise` makes a group compare under one.

N samples of T steps cost N T forwards to sample, N (T - 1) to train, N (T - 1) of the reference and as many
to know delta before the backward pass, unless an update is one minibatch; with shared noise N - N / G less of
each. Twice with guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from mmalign.coupling import Coupled, Population
from mmalign.credit import Credit, center
from mmalign.objectives import REFERENCE, Measures
from mmalign.plans import every_step
from mmalign.records import Evaluation
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class TrajectoryBalance:
    """Tilts the base model's law by the reward and keeps its diversity."""

    steps: int = 10  # denoising steps in training
    beta: float = 1.0  # how far the reward may tilt the law: gain of log-probability per unit of reward
    share_noise: bool = False  # one initial noise per group; for noise levels below sqrt(2)
    noise: Noise = field(default_factory=lambda: Noise("flow", math.sqrt(2), reduction="sum"))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("TrajectoryBalance needs noise: noise.level must be above 0 (usual: sqrt(2))")
        if self.noise.reduction != "sum" or self.noise.density != "gaussian":
            raise ValueError(
                "noise.reduction must be sum and noise.density gaussian: balance is of true probabilities"
            )
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        return Algorithm(
            plans=every_step(self.steps, self.share_noise),
            credit=Credit(weights, center, "total_first", "whole", clip=math.inf),
            objective=Coupled(log_prob, partial(group_variance, self.beta), (REFERENCE,)),
            noise=self.noise,
            copies={REFERENCE: 1.0},
        )


def log_prob(found: Evaluation) -> Tensor:
    """The log-probability of each step."""
    return found.log_prob


def group_variance(beta: float, everyone: Population) -> tuple[Tensor, Measures]:
    """Half the variance of delta inside each group, in the mean over groups."""
    log_ratio = (everyone.now - everyone.frozen[REFERENCE]).sum(1, keepdim=True)  # [N, 1]
    delta = (log_ratio - beta * everyone.advantage[..., :1]).expand_as(everyone.advantage)
    count = everyone.total(delta.new_ones(delta.shape)).clamp(min=1)
    distance = delta - everyone.total(delta) / count
    measures = {"log_ratio": log_ratio.detach().expand_as(everyone.now), "delta": distance[0].detach()}
    return (distance**2 / 2 * everyone.weight).sum((1, 2)), measures
