"""DDPO and DPOK: policy gradients on the chain of denoising steps (Black et al. 2023, arXiv:2305.13301; Fan
et al. 2023, arXiv:2305.16381).

    DDPO-IS  max  E sum_s min(r A, clip(r, 1 - clip, 1 + clip) A)       r from the steps as they were taken
    DDPO-SF  max  E sum_s log p(x_(s-1) | x_s) A                        clip: null, training.updates: 1
    DPOK     either with kl > 0: - kl KL(step | step of the base model) at each step of the samples

    A = (R - mean) / std of the prompt's own samples, bounded by advantage_clip

A ratio without a clip has the gradient of DDPO-SF while it is 1, as it is in the first update of an
iteration. Steps are those of DDIM with eta = noise.level, on models that predict noise as on flow models. N
samples of T steps cost N T forwards to sample and N (T - 1) to train, twice as many with guidance, plus
N (T - 1) of the reference where kl > 0.

Differs from the public code in that a prompt's mean and std are those of its group in this iteration, where
the code keeps a buffer of past samples because it draws few of each prompt at a time; and in that the last
step draws no noise and is no action. DPOK's learned baseline of the value is the mean of the group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mmalign.credit import Credit, zscore
from mmalign.objectives import REFERENCE, ClippedRatio
from mmalign.plans import every_step
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class DDPO:
    """Every step but the last is an action; rewards are compared with those of the same prompt."""

    steps: int = 50  # denoising steps in training; fewer are faster
    clip: float | None = 1e-4  # trust region of the ratio; null: none, which is REINFORCE in one update
    kl: float = 0.0  # pull towards the base model (DPOK: 0.01 to 0.1); raise it to keep quality
    advantage_clip: float = 5.0  # bound on the advantage
    noise: Noise = field(default_factory=lambda: Noise("ddim", 1.0))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("DDPO needs noise to learn from: noise.level must be above 0 (usual: 1.0)")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        clip = math.inf if self.clip is None else self.clip
        return Algorithm(
            plans=every_step(self.steps),
            credit=Credit(weights, zscore, "total_first", "whole", clip=self.advantage_clip),
            objective=ClippedRatio(clip, clip, self.kl),
            noise=self.noise,
            copies={REFERENCE: 1.0} if self.kl else {},
        )
