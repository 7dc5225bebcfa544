"""Flow-GRPO-Fast: actions only in a short window within the first half of the schedule (Liu et al. 2025,
arXiv:2505.05470, and its public code).

The window is drawn anew in each iteration and is the same for all groups and ranks. With noise that is
shared, the members of a group are one sample up to the window's first step, which the network then sees once
per group: with N samples in groups of G, T steps and a window of S that starts at step k, sampling costs

    N T - (N - N / G) (k + 1)       forwards, training  N S - (N - N / G)

and N T and N S with independent noise; all of it twice with guidance.

Differs from the paper's published settings in nothing that we know of; noise of the group is shared by
default, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from mmalign.credit import Credit, zscore, zscore_batch
from mmalign.objectives import REFERENCE, ClippedRatio, KLForm
from mmalign.plans import random_window
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class FlowGRPOFast:
    """Flow-GRPO at a fraction of its cost: one or two stochastic steps, the rest by the ODE."""

    steps: int = 10  # denoising steps in training
    width: int = 2  # stochastic steps in a row; 1 halves the cost of the update and learns slightly slower
    # First steps that the window lies within; 0: the first half. Fewer where much is decided early, as in
    # edits (Meta-CoT, arXiv:2604.24625)
    within: int = 0
    share_noise: bool = True  # one initial noise per group: cheaper, but members differ by the window alone
    clip: float = 1e-5  # trust region of the ratio; made for log-probabilities that are means over the latent
    kl: float = 0.0  # pull towards the base model; raise it to keep quality and diversity, 0 saves a forward
    kl_form: KLForm = "gaussian"  # gaussian, per_step (Flow-GRPO's early code) or velocity
    std: Literal["batch", "group"] = "batch"  # whose standard deviation scales the advantage
    unbiased: bool = False  # divide the variance by n - 1 rather than n
    advantage_clip: float = 5.0  # bound on the advantage
    noise: Noise = field(default_factory=lambda: Noise("cps", 0.8, "unscaled"))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError(
                "FlowGRPOFast needs noise to learn from: noise.level must be above 0 (usual: 0.8)"
            )
        if not 0 <= self.within < self.steps:
            raise ValueError(f"within must lie in 0..{self.steps - 1}, got {self.within}")
        if not 1 <= self.width <= self.early:
            raise ValueError(
                f"width must lie in 1..{self.early}, the first steps that the window lies within, "
                f"got {self.width}"
            )

    @property
    def early(self) -> int:
        """The first steps that the window lies within."""
        return self.within or self.steps // 2

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        normalize = partial(zscore_batch if self.std == "batch" else zscore, unbiased=self.unbiased)
        starts = range(self.early - self.width + 1)
        return Algorithm(
            plans=random_window(self.steps, self.width, starts, self.share_noise),
            credit=Credit(weights, normalize, "total_first", "whole", clip=self.advantage_clip),
            objective=ClippedRatio(self.clip, self.clip, self.kl, self.kl_form),
            noise=self.noise,
            copies={REFERENCE: 1.0} if self.kl else {},
        )
