"""DiffusionNFT: negative-aware fine-tuning on the forward process (Zheng et al. 2025, arXiv:2509.16117).

Finished samples x0 of the old policy are noised again, x = (1 - t) x0 + t e, and the velocity v learns by
flow matching: towards a sample in the measure r in which it was good, away from it in the measure 1 - r, the
latter through the mirror image of v about the old policy's velocity:

    r    = 1/2 + clip(A, -strength, strength) / (2 strength),   A = (R - mean of the group) / std of the batch
    v+   = v_old + beta (v - v_old)        v- = v_old - beta (v - v_old)
    L    = E strength / beta [ r E0(v+) + (1 - r) E0(v-) ]
    E0(u) = mean |x - t u - x0|^2 / stopgrad(mean |x - t u - x0|)

No likelihood, no noise in sampling, any ODE solver: Euler's steps, or, as published, those of second order
of DPM-Solver++ (`order`), which cost as much. N samples of T steps cost N T forwards to sample, N S to
train at S = `renoise.times` noise levels each, and N S of the old policy, once more of the reference where kl
> 0; twice with guidance.

Noise levels are stratified over the sampler's own schedule; the public code goes through its grid in random
order (`renoise.law`). The old policy follows the trained one by eta = min(0.001 i, 0.5) after iteration i,
the first of the paper's two schedules; `old: {slope: 0.0075, most: 0.999, wait: 75}` is the second.

`frames` is ours, for video: r, E0(v+) and E0(v-) are of each frame of the latent, the loss their mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mmalign.contracts import Policy
from mmalign.copies import Ramp
from mmalign.credit import Credit, by_frames, zscore, zscore_batch
from mmalign.forward_process import Matching, NormGuard, renoised
from mmalign.objectives import OLD, REFERENCE, Anchor, Measures, anchored, frozen, pulled, summed, velocity_of
from mmalign.plans import forward_process
from mmalign.records import Minibatch, Renoise
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class DiffusionNFT:
    """Learns from finished samples alone; the fastest of the methods where the reward is exact."""

    steps: int = 10  # denoising steps in training
    order: Literal[1, 2] = 1  # of the solver: 1 Euler's, 2 DPM-Solver++ (published), sharper in few steps
    renoise: Renoise = field(default_factory=Renoise)
    error: Matching = field(default_factory=lambda: Matching("t", adaptive=True))
    beta: float = 1.0  # size of the implicit step; small is fast, near 1 is stable
    strength: float = 5.0  # advantage at which a sample counts as certainly good
    kl: float = 0.0  # pull of the velocity towards the base model; 1e-4 in the paper
    norm_guard: NormGuard = field(default_factory=NormGuard)  # against velocities that grow
    old: Ramp = field(default_factory=lambda: Ramp(slope=0.001, most=0.5))
    std: Literal["batch", "group"] = "batch"  # whose standard deviation scales the advantage
    frames: bool = False  # of a video: frames are good or bad on their own, by rewards that judge them apart

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order}")
        for name in ("beta", "strength"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.kl >= 0:
            raise ValueError(f"kl must be 0 or more, got {self.kl}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        normalize = zscore_batch if self.std == "batch" else zscore
        anchors = ((Anchor(self.kl),) if self.kl else ()) + self.norm_guard.anchors
        return Algorithm(
            plans=forward_process(self.steps, self.renoise, tail=self.steps if self.order == 2 else 0),
            credit=by_frames(weights, normalize, self.strength)
            if self.frames
            else Credit(weights, normalize, "total_first", "whole", clip=self.strength),
            split="frames" if self.frames else "whole",
            objective=NegativeAware(self.beta, self.strength, self.error, anchors),
            noise=Noise(level=0.0),
            copies={OLD: self.old} | ({REFERENCE: 1.0} if anchors else {}),
            sampler=OLD,
        )


@dataclass(frozen=True)
class NegativeAware:
    """Pull the velocity towards good samples and away from bad ones."""

    beta: float
    strength: float
    error: Matching
    anchors: tuple[Anchor, ...] = ()
    clip_range: float | None = None
    idle_at_zero: bool = False

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        old = velocity_of(frozen(policy, batch, OLD))
        held = anchored(self.anchors, policy, batch)
        state, velocity = renoised(policy.evaluate(batch.trajectory, batch.pick))
        change = velocity - old
        sites = batch.advantage.ndim - 2
        good = self.error(state, old + self.beta * change, sites)
        bad = self.error(state, old - self.beta * change, sites)
        share = (0.5 + batch.advantage / (2 * self.strength)).clamp(0, 1)  # [K, n, *site]
        loss = self.strength / self.beta * (share * good + (1 - share) * bad)
        penalty, pulls = pulled(self.anchors, held, velocity, batch.advantage)
        # What is said of a whole latent is said of each of its frames.
        parts = (-1, *[1] * sites)
        if isinstance(penalty, Tensor):
            penalty = penalty.reshape(parts)
        said = {"moved": change.detach().square().flatten(1).mean(1), **pulls}
        measures = {"error": good.detach()} | {n: m.reshape(parts).expand_as(good) for n, m in said.items()}
        return summed(loss, penalty, batch.weight), measures
