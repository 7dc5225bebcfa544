"""MixGRPO: actions in a window of steps that moves from noise to detail (Li et al. 2025, arXiv:2507.21802).

    J   = E 1/(G w) sum_i sum_{s in W} min(r A_i, clip(r, 1 - clip, 1 + clip) A_i),   W = {l .. l + w - 1}
    A_i = sum over rewards of weight (R_i - mean of the group) / std of the group

Outside the window W the steps follow the ODE. It starts at l = 0 and moves on by `stride` steps whenever it
has stayed for tau iterations, until l = T - 1 - w, where it remains (the last step draws no noise):

    progressive   tau = interval
    decay         tau = (1 - p) interval + p max(1, interval / 4), rounded down, with p = l / (T - 1 - w)
    exp_decay     tau = interval exp(-decay max(0, l - decay_after)), rounded up
    random        l drawn in each iteration          frozen   l = 0

Flash: after the window max(floor(rate n), 1) steps of second-order DPM-Solver++ take the place of the n = T -
l - w Euler steps that are left; usual are rate 0.4 with a moving window, and 0.2 with a frozen one (Flash*).

N samples in groups of G cost N (l + w + n') - (N - N / G) (l + 1) forwards to sample, n' of them per sample
after the window (n or Flash's), and N w - (N - N / G) to train; N T and N w with independent noise. Once more
the latter of the reference where kl > 0, and twice all of it with guidance.

Weights of rewards are used as given; the paper's sum to 1. Differs from the public code in that the window
never shrinks at the end, that the standard deviation divides by n, not n - 1, and in Flash, whose grid there
is one step short and does not begin where the window ends. The paper's hybrid inference, the base model for
the last steps, is `evaluation.tuned`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mmalign.credit import Credit, zscore
from mmalign.objectives import REFERENCE, ClippedRatio, KLForm
from mmalign.plans import PlanAt, random_window, sliding_window
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class MixGRPO:
    """Flow-GRPO at the cost of a window: noise and learning in few steps at a time, which move on."""

    steps: int = 25  # denoising steps in training
    width: int = 4  # actions in a row; raise it for faster credit, lower it for less work
    # How the window moves: at even intervals, ever faster, by chance in each iteration, or not at all.
    schedule: Literal["progressive", "decay", "exp_decay", "random", "frozen"] = "progressive"
    interval: int = 25  # iterations before the window moves on; too few leave early steps under-trained
    stride: int = 1  # steps by which the window moves
    decay: float = 0.1  # of exp_decay: how much shorter the stay becomes with each step
    decay_after: int = 13  # of exp_decay: the first start from which stays are shorter
    rate: float = 0.0  # Flash: share of the steps after the window that are taken, at second order; 0: Euler
    share_noise: bool = True  # one initial noise per group; false explores more and costs more
    clip: float = 1e-4  # trust region of the ratio; made for log-probabilities that are means over the latent
    kl: float = 0.0  # pull towards the base model; raise it to keep quality and diversity, 0 saves a forward
    kl_form: KLForm = "gaussian"  # gaussian, per_step (Flow-GRPO's early code) or velocity
    advantage_clip: float = 5.0  # bound on the advantage
    noise: Noise = field(default_factory=lambda: Noise("flow", 0.7))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("MixGRPO needs noise to learn from: noise.level must be above 0 (usual: 0.7)")
        if not 1 <= self.width <= self.steps - 1:
            raise ValueError(
                f"width must lie in 1..{self.steps - 1} for steps={self.steps}, whose last draws no noise, "
                f"got {self.width}"
            )
        for name in ("interval", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("decay", "decay_after"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is a share between 0 and 1, got {self.rate}")

    @property
    def last(self) -> int:
        """Where the window starts at the end."""
        return self.steps - 1 - self.width

    def stay(self, start: int) -> int:
        """For how many iterations the window stays where it starts at this step."""
        if self.schedule == "decay":
            done = start / max(1, self.last)
            return int((1 - done) * self.interval + done * max(1, self.interval // 4))
        if self.schedule == "exp_decay":
            return math.ceil(self.interval * math.exp(-self.decay * max(0, start - self.decay_after)))
        return self.interval

    def plans(self) -> PlanAt:
        if self.schedule in ("random", "frozen"):
            starts = range(self.last + 1 if self.schedule == "random" else 1)
            return random_window(self.steps, self.width, starts, self.share_noise, self.rate)
        return sliding_window(self.steps, self.width, self.stay, self.stride, self.share_noise, self.rate)

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        return Algorithm(
            plans=self.plans(),
            credit=Credit(weights, zscore, "normalized", "whole", clip=self.advantage_clip),
            objective=ClippedRatio(self.clip, self.clip, self.kl, self.kl_form),
            noise=self.noise,
            copies={REFERENCE: 1.0} if self.kl else {},
        )
