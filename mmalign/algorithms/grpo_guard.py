"""GRPO-Guard: ratios that are centered and alike at every step (arXiv:2510.22319).

With mean m and m_old under the present policy and the one that sampled, and x' = m_old + std z,

    log r     = -|m_old - m|^2 / (2 std^2) - <m_old - m, z> / std        biased below 0, spread by 1 / std
    log r_hat = std (log r + |m_old - m|^2 / (2 std^2)) = <m - m_old, z>
    J         = E 1/(G S) sum_i sum_s 1 / balance_s min(r_hat A, clip(r_hat, 1 - clip, 1 + clip) A) - kl KL

balance is the length d of the step, as in the paper, which gives every step of Flow-SDE but the first one
and the same pull on the velocity, or `slope`, |d m / d v|, which does so for any noise (arXiv:2605.23522).

log r_hat is a mean over the latent and has its unit: latents and noise that are c times as large make it c
times as large, and the clip range with it. Costs what Flow-GRPO costs: N samples of T steps N T forwards to
sample and N (T - 1) to train, once more of the reference where kl > 0, twice with guidance.

Differs from some public code in that the division by d is there. The inner product is computed as such, not
as a difference of log-probabilities, whose rounding would fill so small a clip range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mmalign.contracts import Policy
from mmalign.credit import Credit, zscore, zscore_batch
from mmalign.objectives import REFERENCE, KLForm, Measures, clipped_gain, penalized, ratio_measures
from mmalign.plans import every_step
from mmalign.records import Evaluation, Minibatch
from mmalign.sde import Noise
from mmalign.trainer import Algorithm

Balance = Literal["step", "slope"]


@dataclass(frozen=True)
class GRPOGuard:
    """Flow-GRPO whose clip range means the same at every step; slows over-optimization down."""

    steps: int = 10  # denoising steps in training
    clip: float = 2e-6  # trust region of r_hat, in the unit of the latent; for 65,536 numbers a latent
    balance: Balance = "step"  # what each step's gain is divided by; slope for noise other than flow
    kl: float = 0.0  # pull towards the base model; raise it to keep quality and diversity, 0 saves a forward
    kl_form: KLForm = "gaussian"  # gaussian, per_step (Flow-GRPO's early code) or velocity
    std: Literal["batch", "group"] = "batch"  # whose standard deviation scales the advantage
    advantage_clip: float = 5.0  # bound on the advantage
    noise: Noise = field(default_factory=lambda: Noise("flow", 0.7))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("GRPOGuard needs noise to learn from: noise.level must be above 0 (usual: 0.7)")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        normalize = zscore_batch if self.std == "batch" else zscore
        return Algorithm(
            plans=every_step(self.steps),
            credit=Credit(weights, normalize, "total_first", "whole", clip=self.advantage_clip),
            objective=GuardedRatio(self.clip, self.balance, self.kl, self.kl_form),
            noise=self.noise,
            copies={REFERENCE: 1.0} if self.kl else {},
        )


def guarded_log_ratio(new: Evaluation) -> Tensor:
    """log r_hat of each action, [n, *site]: a mean over the latent."""
    if new.mean is None or new.std is None or new.drawn is None:
        raise TypeError("GRPO-Guard needs Gaussian actions and a policy that tells how they were drawn")
    z = (new.drawn.x_next - new.drawn.mean) / new.std
    product = (new.mean - new.drawn.mean) * z
    return product.mean(tuple(range(1, product.ndim - new.log_prob.ndim + 1)))


@dataclass(frozen=True)
class GuardedRatio:
    """Raise the odds of good actions by a ratio that is centered and alike at every step."""

    clip: float
    balance: Balance = "step"
    kl: float = 0.0
    kl_form: KLForm = "gaussian"

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        if not self.kl >= 0:
            raise ValueError(f"kl must be 0 or more, got {self.kl}")

    @property
    def clip_range(self) -> float | None:
        return self.clip

    @property
    def idle_at_zero(self) -> bool:
        return self.kl == 0

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        def gain(new: Evaluation) -> tuple[Tensor, Measures]:
            log_ratio = guarded_log_ratio(new)
            by = new.step if self.balance == "step" else new.slope
            assert by is not None  # Gaussian actions have it
            gained = clipped_gain(log_ratio, batch.advantage, self.clip, self.clip)
            shares = by.reshape(-1, *[1] * (log_ratio.ndim - 1))
            return gained / shares, ratio_measures(log_ratio, self.clip, self.clip)

        return penalized(policy, batch, gain, self.kl, self.kl_form)
