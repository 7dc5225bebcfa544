"""Pref-GRPO: GRPO on win rates inside the group (Wang et al. 2025, arXiv:2508.20751).

Scores of one prompt's samples differ little, and dividing by their small spread makes large advantages of
noise. A judge of pairs is asked instead which of two samples it prefers:

    w_i = 1 / (G - 1) sum_{j != i} [x_i preferred to x_j]
    A_i = (w_i - mean of the group) / std of the group

and then as in Flow-GRPO. The spread of win rates is bounded: G samples in strict order have a std of
sqrt((G + 1) / (12 (G - 1))). The judge is a reward of pairs (`mmalign.contracts.PairwiseReward`), for each
pair asked in both orders. With `rewards: scores` a reward of single samples is taken for the judge: it
prefers what it scores higher.

N samples in groups of G of T steps cost as Flow-GRPO: N T forwards to sample, less N - N / G for the first
step, which members share with their noise, and N (T - 1) less the same to train; twice with guidance. The
judge is asked N (G - 1) times, half as often with one order a pair.

Differs from the paper in the second order, which the public code does not ask; a tie counts 1/2. The paper
does not state the clip range; ours is that of Flow-GRPO.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mmalign.credit import Credit, zscore, zscore_of_rank
from mmalign.objectives import REFERENCE, ClippedRatio, KLForm
from mmalign.plans import every_step
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class PrefGRPO:
    """Flow-GRPO whose reward is how many of its group a sample beats, in the eyes of a judge of pairs."""

    steps: int = 25  # denoising steps in training
    # judge: rewards are win rates already, as those of a judge of pairs are; scores: make win rates of them
    rewards: Literal["judge", "scores"] = "judge"
    share_noise: bool = True  # one initial noise per group
    clip: float = 1e-4  # trust region of the ratio; made for log-probabilities that are means over the latent
    kl: float = 0.0  # pull towards the base model; raise it to keep quality and diversity, 0 saves a forward
    kl_form: KLForm = "gaussian"  # gaussian, per_step (Flow-GRPO's early code) or velocity
    advantage_clip: float = 5.0  # bound on the advantage
    noise: Noise = field(default_factory=lambda: Noise("flow", 0.7))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("PrefGRPO needs noise to learn from: noise.level must be above 0 (usual: 0.7)")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        return Algorithm(
            plans=every_step(self.steps, self.share_noise),
            credit=Credit(
                weights,
                zscore if self.rewards == "judge" else zscore_of_rank,
                "normalized",
                "whole",
                clip=self.advantage_clip,
            ),
            objective=ClippedRatio(self.clip, self.clip, self.kl, self.kl_form),
            noise=self.noise,
            copies={REFERENCE: 1.0} if self.kl else {},
        )
