"""Flow-DPPO: a mask by the exact divergence in the place of the clip (arXiv:2606.11025).

    D = |m_old - m|^2 / (2 std^2)     of each step, from the means under the sampling and the present policy
    M = 0 if D > delta and (A > 0 and r > 1  or  A < 0 and r < 1),  else 1
    J = E 1/(G S) sum_i sum_s M r A - kl KL

An update is dropped only if the policy is far away and the update leads farther; one that leads back keeps
its gradient. Actions are at random steps in the first half of the schedule, the others follow the ODE.

D is a mean over the latent of n numbers, as log r is; a delta made for sums is n times as large. N samples of
T steps cost N T forwards to sample and N S to train with S actions each, once more N S of the reference where
kl > 0, twice with guidance; with noise that a group shares, (N - N / G) (k + 1) less to sample and N - N / G
less to train, k being the first action.

The paper's thresholds, 1e-7 for Flow-SDE and 1e-6 for CPS, have a scaling of its own; 1e-5 for the mean is
that of public code. Each sample takes part in one update, so where the paper goes through its samples more
than once, this goes once. The steps are drawn for all samples of an iteration together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmalign.contracts import Policy
from mmalign.credit import Credit, zscore
from mmalign.objectives import CEILING, REFERENCE, KLForm, Measures, divergence, penalized
from mmalign.plans import random_steps
from mmalign.records import Evaluation, Minibatch
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class FlowDPPO:
    """Trusts the exact divergence of a step rather than the ratio of one sample."""

    steps: int = 10  # denoising steps in training
    actions: int = 3  # stochastic steps, drawn from the first half; fewer are cheaper and noisier
    delta: float = 1e-5  # divergence (mean over the latent) from which updates that lead farther are dropped
    share_noise: bool = False  # one initial noise per group: cheaper, but explores less
    kl: float = 0.0  # pull towards the base model; 1e-3 helps with several rewards, 0 saves a forward
    kl_form: KLForm = "gaussian"  # gaussian, per_step (Flow-GRPO's early code) or velocity
    advantage_clip: float = 5.0  # bound on the advantage
    noise: Noise = field(default_factory=lambda: Noise("flow", 0.8))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("FlowDPPO needs noise to learn from: noise.level must be above 0 (usual: 0.8)")
        if not 1 <= self.actions <= self.steps // 2:
            raise ValueError(
                f"actions must lie in 1..{self.steps // 2}, half of steps={self.steps}, got {self.actions}"
            )

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        return Algorithm(
            plans=random_steps(self.steps, self.actions, range(self.steps // 2), self.share_noise),
            credit=Credit(weights, zscore, "normalized", "whole", clip=self.advantage_clip),
            objective=MaskedRatio(self.delta, self.kl, self.kl_form),
            noise=self.noise,
            copies={REFERENCE: 1.0} if self.kl else {},
        )


def leads_farther(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """Where raising r A makes the divergence grow; log_ratio: [n, *site], advantage: [K, n, *site]."""
    return ((advantage > 0) & (log_ratio > 0)) | ((advantage < 0) & (log_ratio < 0))


@dataclass(frozen=True)
class MaskedRatio:
    """Raise the odds of good actions, but not of those at which the policy is too far away already."""

    delta: float
    kl: float = 0.0
    kl_form: KLForm = "gaussian"
    clip_range: float | None = None

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"delta must be positive, got {self.delta}")
        if not self.kl >= 0:
            raise ValueError(f"kl must be 0 or more, got {self.kl}")

    @property
    def idle_at_zero(self) -> bool:
        return self.kl == 0

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        def gain(new: Evaluation) -> tuple[Tensor, Measures]:
            if new.drawn is None:
                raise TypeError(
                    "Flow-DPPO needs Gaussian actions and a policy that tells how they were drawn"
                )
            log_ratio = new.log_prob - batch.log_prob
            sampled = Evaluation(batch.log_prob, new.drawn.mean)
            far = divergence(new, sampled).detach().expand_as(log_ratio)
            masked = (far > self.delta) & leads_farther(log_ratio.detach(), batch.advantage)
            ratio = log_ratio.clamp(max=CEILING).exp()
            measures = {
                "log_ratio": log_ratio.detach(),
                "ratio": ratio.detach(),
                "divergence": far,
                "masked_share": masked.any(0),
            }
            return torch.where(masked, 0.0, ratio * batch.advantage), measures

        return penalized(policy, batch, gain, self.kl, self.kl_form)
