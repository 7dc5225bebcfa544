"""DGPO: direct group preference optimization (Luo et al. 2025, arXiv:2510.08425).

The good and the bad part of a group are set against each other as in DPO, each sample weighed by its
advantage. As advantages of a group sum to 0, the intractable constant of the likelihood drops out, and errors
of flow matching can stand in for it; t and e are the same for all members:

    d_i = mean |v(x_i, t) - (e - x0_i)|^2 - mean |v_ref(x_i, t) - (e - x0_i)|^2,   x_i = (1 - t) x0_i + t e
    L   = -log sigmoid(-(beta / G) sum_i A_i d_i) + kl mean |v - v_ref|^2

A sample whose ratio exp(m_old - m) has left 1 - clip..1 + clip in the direction of its advantage gives no
gradient; m is the error, and old the moving average, which also samples once `live_until` iterations are
over. Groups whose rewards are all equal are left out.

M samples of T steps, of which N are in groups that vary, cost M T forwards to sample, N S to train at S =
`renoise.times` noise levels, and N S of each of the reference and, where clip > 0, the average; N S more to
know the weight of each group, which depends on all of its members, before the backward pass, unless an update
is one minibatch; and 2 N S of the base model where the pull to it is guided. Twice with guidance.

Differs from the public code in that groups may be spread over minibatches and ranks in any way (there a
group must fill the batch of all ranks), and that sampling and training share the policy's guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from mmalign.copies import Ramp
from mmalign.coupling import Coupled
from mmalign.credit import Credit, varied, zscore, zscore_batch
from mmalign.forward_process import Matching, preference
from mmalign.objectives import OLD, REFERENCE, Anchor
from mmalign.plans import forward_process
from mmalign.records import Renoise
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class DGPO:
    """Preference between the good and the bad part of a group, learned by flow matching."""

    steps: int = 10  # denoising steps in training
    renoise: Renoise = field(default_factory=lambda: Renoise(4, "grid", (0.0, 0.7), shared=True))
    error: Matching = field(default_factory=Matching)
    beta: float = 100.0  # sharpness of the preference: 10 to 100, or 2000 to 5000 with reference: average
    reference: Literal["base", "average"] = "base"  # whose errors are subtracted
    clip: float = 1e-2  # trust region of the ratio, 1e-5 to 1e-2; 0: none, which saves a forward
    kl: float = 1e-3  # pull of the velocity towards the base model
    kl_guidance: float | None = None  # guidance of the base model in that pull; null: the policy's own
    average: Ramp = field(default_factory=lambda: Ramp(slope=0.001, most=0.3))
    live_until: int = 200  # iterations in which the live policy samples; after them the average does
    std: Literal["batch", "group"] = "group"  # whose standard deviation scales the advantage
    advantage_clip: float = 5.0  # bound on the advantage

    def __post_init__(self) -> None:
        for name in ("beta", "advantage_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("clip", "kl", "live_until"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.renoise.shared:
            raise ValueError("renoise.shared must be true: DGPO compares errors under one noise")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        base = REFERENCE if self.reference == "base" else OLD
        return Algorithm(
            plans=forward_process(self.steps, self.renoise),
            credit=Credit(
                weights,
                zscore if self.std == "group" else zscore_batch,
                "total_first",
                "whole",
                clip=self.advantage_clip,
                select=varied,
            ),
            objective=Coupled(
                self.error.of,
                partial(preference, self.beta, self.clip, base),
                tuple(dict.fromkeys([base, OLD] if self.clip else [base])),
                (Anchor(self.kl, guidance=self.kl_guidance),) if self.kl else (),
                idle_at_zero=self.kl == 0,
            ),
            noise=Noise(level=0.0),
            copies={OLD: self.average} | ({REFERENCE: 1.0} if base == REFERENCE or self.kl else {}),
            sampler=lambda iteration: None if iteration < self.live_until else OLD,
        )
