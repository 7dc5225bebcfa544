"""Flow-GRPO: GRPO on a flow model whose ODE is sampled as an SDE (Liu et al. 2025, arXiv:2505.05470).

    J   = E 1/(G S) sum_i sum_s [ min(r A_i, clip(r, 1 - clip, 1 + clip) A_i) - kl KL ]
    A_i = (R_i - mean of the group) / std of the batch

Every step but the last is an action, since the last has next to no noise. N samples of T steps cost N T
forwards to sample and N (T - 1) to train, twice as many with guidance, plus N (T - 1) of the reference where
kl > 0.

Differs from the paper in that the KL is the exact one of the Gaussian steps. The public code at one time left
the step length out of it; `kl_form: per_step` is that form, and `mmalign.objectives.conversion` the factor
between the two.

`frames` is ours, for video: a step's log-probability is kept for each frame of the latent, a mean over its
places, and each frame has its own ratio and advantage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from mmalign.credit import Credit, by_frames, zscore, zscore_batch
from mmalign.objectives import REFERENCE, ClippedRatio, KLForm
from mmalign.plans import every_step
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class FlowGRPO:
    """Stochastic at every step but the last; rewards are added up and compared inside their group."""

    steps: int = 10  # denoising steps in training; fewer are faster, 10 rank as well as 40
    clip: float = 1e-4  # trust region of the ratio; made for log-probabilities that are means over the latent
    kl: float = 0.04  # pull towards the base model; raise it to keep quality and diversity, 0 saves a forward
    kl_form: KLForm = "gaussian"  # gaussian, per_step (Flow-GRPO's early code) or velocity
    std: Literal["batch", "group"] = "batch"  # whose standard deviation scales the advantage
    unbiased: bool = False  # divide the variance by n - 1 rather than n
    advantage_clip: float = 5.0  # bound on the advantage
    frames: bool = False  # of a video: each frame earns its own advantage, by rewards that judge frames apart
    noise: Noise = field(default_factory=lambda: Noise("flow", 0.7))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("FlowGRPO needs noise to learn from: noise.level must be above 0 (usual: 0.7)")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        normalize = partial(zscore_batch if self.std == "batch" else zscore, unbiased=self.unbiased)
        return Algorithm(
            plans=every_step(self.steps),
            credit=by_frames(weights, normalize, self.advantage_clip)
            if self.frames
            else Credit(weights, normalize, "total_first", "whole", clip=self.advantage_clip),
            split="frames" if self.frames else "whole",
            objective=ClippedRatio(self.clip, self.clip, self.kl, self.kl_form),
            noise=self.noise,
            copies={REFERENCE: 1.0} if self.kl else {},
        )
