"""DiffusionNFT: negative-aware fine-tuning on the forward process (Zheng et al. 2025, arXiv:2509.16117).

Finished samples x0 of the old policy are noised again, x = (1 - t) x0 + t e, and the velocity v learns by
flow matching: towards a sample in the measure r in which it was good, away from it in the measure 1 - r, the
latter through the mirror image of v about the old policy's velocity:

    r    = 1/2 + clip(A, -strength, strength) / (2 strength),   A = (R - mean of the group) / std of the batch
    v+   = v_old + beta (v - v_old)        v- = v_old - beta (v - v_old)
    L    = E strength / beta [ r E0(v+) + (1 - r) E0(v-) ]
    E0(u) = |x - t u - x0|^2 / stopgrad(mean |x - t u - x0|)

No likelihood, no noise in sampling, any ODE solver. N samples of T steps cost N T forwards to sample, N S to
train at S = `times` noise levels each, and N S of the old policy, once more of the reference where kl > 0;
twice with guidance.

Noise levels are stratified over the sampler's own schedule; the public code goes through its grid in random
order. The old policy follows the trained one by eta = min(ramp i, most) after iteration i, the first of the
paper's two schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mmalign.contracts import Policy
from mmalign.credit import Credit, zscore, zscore_batch
from mmalign.objectives import REFERENCE, Measures
from mmalign.plans import forward_process
from mmalign.records import Minibatch, Noised
from mmalign.sde import Noise
from mmalign.trainer import Algorithm

OLD = "old"


@dataclass(frozen=True)
class DiffusionNFT:
    """Learns from finished samples alone; the fastest of the methods where the reward is exact."""

    steps: int = 10  # denoising steps in training
    times: int = 4  # noise levels at which each sample is learned; more lower the variance and cost forwards
    beta: float = 1.0  # size of the implicit step; small is fast, near 1 is stable
    strength: float = 5.0  # advantage at which a sample counts as certainly good
    kl: float = 0.0  # pull of the velocity towards the base model; 1e-4 in the paper
    ramp: float = 0.001  # how fast the old policy becomes slower to follow
    most: float = 0.5  # share of itself that the old policy keeps in the end; 0 is always the last policy
    std: Literal["batch", "group"] = "batch"  # whose standard deviation scales the advantage

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"times must be at least 1, got {self.times}")
        for name in ("beta", "strength"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not (self.ramp >= 0 and 0 <= self.most < 1):
            raise ValueError(
                f"ramp must not be negative and most lie in [0, 1), got {self.ramp}, {self.most}"
            )
        if not self.kl >= 0:
            raise ValueError(f"kl must be 0 or more, got {self.kl}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        normalize = zscore_batch if self.std == "batch" else zscore
        return Algorithm(
            plans=forward_process(self.steps, self.times),
            credit=Credit(weights, normalize, "total_first", "whole", clip=self.strength),
            objective=NegativeAware(self.beta, self.strength, self.kl),
            noise=Noise(level=0.0),
            copies={OLD: partial(kept, self.ramp, self.most)} | ({REFERENCE: 1.0} if self.kl else {}),
            sampler=OLD,
        )


def kept(ramp: float, most: float, iteration: int) -> float:
    """How much of itself the old policy keeps after an iteration."""
    return min(ramp * iteration, most)


def x0_error(state: Noised, velocity: Tensor) -> Tensor:
    """Squared error of the clean estimate, divided by its own absolute error (no gradient), [n]."""
    miss = state.x - state.sigma * velocity - state.clean
    return miss.square().flatten(1).mean(1) / miss.detach().abs().flatten(1).mean(1).clamp(min=1e-5)


@dataclass(frozen=True)
class NegativeAware:
    """Pull the velocity towards good samples and away from bad ones."""

    beta: float = 1.0
    strength: float = 5.0
    kl: float = 0.0
    clip_range: float | None = None
    idle_at_zero: bool = False

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        frozen: dict[str, Tensor] = {}
        for name in (OLD, REFERENCE) if self.kl else (OLD,):
            with torch.no_grad(), policy.copies.use(name):
                velocity = policy.evaluate(batch.trajectory, batch.pick).velocity
            assert velocity is not None
            frozen[name] = velocity
        now = policy.evaluate(batch.trajectory, batch.pick)
        if now.noised is None or now.velocity is None:
            raise TypeError("DiffusionNFT needs a policy that noises its samples again, as Plan.renoise asks")
        change = now.velocity - frozen[OLD]
        good = x0_error(now.noised, frozen[OLD] + self.beta * change)
        bad = x0_error(now.noised, frozen[OLD] - self.beta * change)
        share = (0.5 + batch.advantage / (2 * self.strength)).clamp(0, 1)  # [K, n]
        loss = self.strength / self.beta * (share * good + (1 - share) * bad)
        moved = change.detach().square().flatten(1).mean(1)
        measures = {"error": good.detach(), "moved": moved}
        if self.kl:
            away = (now.velocity - frozen[REFERENCE]).square().flatten(1).mean(1)
            measures["kl"] = away.detach()
            loss = loss + self.kl * away / len(loss)
        return (loss * batch.weight).flatten(1).sum(1), measures
