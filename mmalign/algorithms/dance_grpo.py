"""DanceGRPO: noise at every step, learned from at a part of them (Xue et al. 2025, arXiv:2505.07818).

    J   = E 1/(G S) sum_i sum_{s in S} min(r A_i, clip(r, 1 - clip, 1 + clip) A_i)
    A_i = sum over rewards of (R_i - mean of the group) / std of the group

The members of a group start from one noise; S are floor(fraction (T - 1)) of the first T - 1 steps, drawn in
each iteration; there is no pull towards the base model. With best-of-n all n members of a group are compared,
and the `keep` best and worst of them learned from.

N samples in groups of G cost N T - (N - N / G) forwards to sample, with L of them learned from (L = N, or
2 keep N / G) L S to train, less L - N / G where the first step, whose state a group shares, is in S. Twice
that with guidance.

Differs from the public code in three ways: S is one set for all samples of an iteration, where there each has
its own; the standard deviation divides by n, not n - 1; best-of-n chooses inside each group, not among all
samples of a process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from mmalign.credit import Credit, extremes, zscore
from mmalign.objectives import ClippedRatio
from mmalign.plans import random_steps
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class DanceGRPO:
    """Noise of a constant rate at every step; a random part of the steps is learned from."""

    steps: int = 16  # denoising steps in training
    fraction: float = 0.6  # of the steps that are learned from; lower it to save time, down to half is free
    keep: int = 0  # learn from so many best and worst members of a group; 0: from all. Usual: 8 of 16 or more
    share_noise: bool = True  # one initial noise per group; independent ones led to hacking on video
    clip: float = 1e-4  # trust region of the ratio; made for log-probabilities that are means over the latent
    advantage_clip: float = 5.0  # bound on the advantage
    noise: Noise = field(default_factory=lambda: Noise("dance", 0.3))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("DanceGRPO needs noise to learn from: noise.level must be above 0 (usual: 0.3)")
        if not 0 < self.fraction <= 1 or self.trained < 1:
            raise ValueError(
                f"fraction must lie in (0, 1] and give at least one of {self.steps - 1} steps, "
                f"got {self.fraction}"
            )
        if self.keep < 0:
            raise ValueError(f"keep must not be negative, got {self.keep}")

    @property
    def trained(self) -> int:
        """How many steps are learned from; the last is none of them."""
        return math.floor(self.fraction * (self.steps - 1) + 1e-9)

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        among = range(self.steps - 1)
        return Algorithm(
            plans=random_steps(self.steps, self.trained, among, self.share_noise, noise_at_all=True),
            credit=Credit(
                weights,
                zscore,
                "normalized",
                "whole",
                clip=self.advantage_clip,
                select=partial(extremes, self.keep) if self.keep else None,
                learners=2 * self.keep,
            ),
            objective=ClippedRatio(self.clip, self.clip),
            noise=self.noise,
        )
