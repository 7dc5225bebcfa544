"""AWM: advantage weighted matching (Xue et al. 2025, arXiv:2509.25050).

The pretraining loss of finished samples stands in for their likelihood, and its change under an update for
the ratio of PPO; x = (1 - t) x0 + t e is the same state for both policies:

    l(x0; t, e) = -(t / p) [(m + 1e-10)^p - (1e-10)^p],   m = mean |v(x, t) - (e - x0)|^2
    ratio       = exp(l - l_old)
    J           = E min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)
                  - kl mean |v - v_ref|^2 - ema_kl mean |v - v_ema|^2

On policy the ratio is 1 and the gradient A times that of flow matching. `likelihood` is the weighting, of
which p = 1 is t m; `renoise` the noise levels; `ratio: sample` compares the mean of l over a sample's levels
instead of each, which is the estimator of the ELBO policy gradients of arXiv:2602.04663: `ratio: sample`,
`likelihood: {weight: elbo, power: 1}`, `renoise: {law: uniform}` and a clip of 1 are theirs with the loss of
GRPO.

N samples of T steps cost N T forwards to sample, N S to train at S = `renoise.times` levels, and N S of each
frozen policy that is asked: the reference where kl > 0, the average where ema_kl > 0, and the one that
sampled in all updates of an iteration but the first. `ratio: sample` looks at each state once more, which is
N S as well, unless an update is one minibatch. Twice with guidance.

Levels are drawn for each sample; the public code draws them once for a batch. There the advantage is divided
by the bound on it, as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mmalign.contracts import Policy
from mmalign.copies import Ramp
from mmalign.coupling import Coupled, Population
from mmalign.credit import Credit, zscore, zscore_batch
from mmalign.forward_process import Matching, NormGuard
from mmalign.objectives import (
    CEILING,
    LAST,
    OLD,
    REFERENCE,
    Anchor,
    Measures,
    anchored,
    clipped_gain,
    frozen,
    pulled,
    summed,
    velocity_of,
)
from mmalign.plans import forward_process
from mmalign.records import Minibatch, Renoise
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class AWM:
    """Flow matching of own samples, weighed by their advantage: towards good ones, away from bad ones."""

    steps: int = 14  # denoising steps in training
    renoise: Renoise = field(default_factory=lambda: Renoise(6, "grid", (0.1, 0.9)))
    likelihood: Matching = field(default_factory=lambda: Matching("t", power=0.25))
    ratio: Literal["draw", "sample"] = "draw"  # one for each noised state, or one a sample from their mean
    clip: float = 1.0  # trust region of the ratio; 1 is none above 0, 1e-5 for several updates an iteration
    kl: float = 0.001  # pull towards the base model; 0.0001 to 0.003 in the paper, 0 saves a forward
    ema_kl: float = 1.0  # pull towards the moving average of the policy, which steadies; 0 saves a forward
    norm_guard: NormGuard = field(default_factory=NormGuard)  # against velocities that grow
    ema: Ramp = field(default_factory=lambda: Ramp(slope=0.001, most=0.3))
    std: Literal["batch", "group"] = "batch"  # whose standard deviation scales the advantage
    advantage_clip: float = 5.0  # bound on the advantage, by which it is then divided

    def __post_init__(self) -> None:
        for name in ("clip", "advantage_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("kl", "ema_kl"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        anchors = [*([Anchor(self.kl)] if self.kl else []), *self.norm_guard.anchors]
        held = {REFERENCE: 1.0} if anchors else {}
        anchors += [Anchor(self.ema_kl, OLD, name="ema_kl")] if self.ema_kl else []
        per_draw = MatchingRatio(self.likelihood, self.clip, self.advantage_clip, tuple(anchors))
        per_sample = Coupled(
            self.likelihood.of,
            partial(mean_ratio, self.clip, self.advantage_clip),
            (LAST,),
            tuple(anchors),
            self.clip,
            not anchors,
        )
        return Algorithm(
            plans=forward_process(self.steps, self.renoise),
            credit=Credit(
                weights,
                zscore_batch if self.std == "batch" else zscore,
                "total_first",
                "whole",
                clip=self.advantage_clip,
            ),
            objective=per_draw if self.ratio == "draw" else per_sample,
            noise=Noise(level=0.0),
            copies={LAST: 0.0} | held | ({OLD: self.ema} if self.ema_kl else {}),
        )


@dataclass(frozen=True)
class MatchingRatio:
    """The clipped gain of each noised state by itself."""

    likelihood: Matching
    clip: float
    strength: float
    anchors: tuple[Anchor, ...] = ()

    @property
    def clip_range(self) -> float | None:
        return self.clip

    @property
    def idle_at_zero(self) -> bool:
        return not self.anchors

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        held = anchored(self.anchors, policy, batch)
        before = None if batch.fresh else self.likelihood.of(frozen(policy, batch, LAST))
        now = policy.evaluate(batch.trajectory, batch.pick)
        error = self.likelihood.of(now)
        log_ratio = (error.detach() if before is None else before) - error
        advantage = batch.advantage / self.strength
        penalty, pulls = pulled(self.anchors, held, velocity_of(now), batch.advantage)
        loss = -clipped_gain(log_ratio, advantage, self.clip, self.clip)
        measures = {"error": error.detach(), **_about(log_ratio.detach()), **pulls}
        return summed(loss, penalty, batch.weight), measures


def mean_ratio(clip: float, strength: float, everyone: Population) -> tuple[Tensor, Measures]:
    """The clipped gain of each sample, whose log-ratio is the mean over its noised states."""
    log_ratio = (everyone.frozen[LAST] - everyone.now).mean(1, keepdim=True).expand_as(everyone.now)
    gain = clipped_gain(log_ratio, everyone.advantage / strength, clip, clip)
    measures = {"error": everyone.now.detach(), **_about(log_ratio.detach())}
    return -(gain * everyone.weight).sum((1, 2)), measures


def _about(log_ratio: Tensor) -> Measures:
    return {"log_ratio": log_ratio, "ratio": torch.exp(log_ratio.clamp(max=CEILING))}
