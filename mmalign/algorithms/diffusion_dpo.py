"""Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908) in its form for flow models (arXiv:2501.13918).

Of a better sample x+ and a worse one x- of one prompt, both noised by the same e to the same t, the first
should gain on the second, in terms of the errors of flow matching and compared with the base model:

    m(x) = mean |v(x, t) - (e - x0)|^2
    D    = [m(x+) - m_ref(x+)] - [m(x-) - m_ref(x-)]
    L    = -log sigmoid(-(beta / 2) D)

`pairs: sampled` (online) draws a group and takes its best and its worst; groups of equal rewards give no
pair. `pairs: given` (offline) draws nothing: the prompt file names two pictures a line, {"prompt", "chosen",
"rejected"}, the reward is `preference`, and prompts.group is 2.

N samples of T steps make P pairs: N T forwards to sample (none where pairs are given), 2 P S to train at S =
`renoise.times` noise levels, as many of the reference, and as many again to know D before the backward
pass, unless an update is one minibatch. Twice with guidance.

beta is that of errors that are means over the latent, as in the public code; for sums divide it by the
latent's size. It is the same at all noise levels. Publicly both pictures are encoded by a draw of the
autoencoder's posterior, here by its mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from mmalign.copies import renewed
from mmalign.coupling import Coupled
from mmalign.credit import Credit, best_and_worst, moved
from mmalign.forward_process import Matching, NormGuard, preference
from mmalign.objectives import REFERENCE
from mmalign.plans import forward_process
from mmalign.records import Renoise
from mmalign.sde import Noise
from mmalign.trainer import Algorithm

SAMPLER = "sampler"


@dataclass(frozen=True)
class DiffusionDPO:
    """Learns from pairs alone, of the best and worst of a group or given by a file."""

    steps: int = 10  # denoising steps in training
    # sampled: the best and the worst of each group that the policy draws; given: two pictures a line of the
    # prompt file, with the reward `preference` and prompts.group 2
    pairs: Literal["sampled", "given"] = "sampled"
    renoise: Renoise = field(default_factory=lambda: Renoise(4, "uniform", shared=True))
    error: Matching = field(default_factory=Matching)
    beta: float = 2000.0  # how strongly the policy is held to the base model; smaller moves further
    norm_guard: NormGuard = field(default_factory=NormGuard)  # against velocities that grow
    refresh: int = 1  # iterations after which sampling takes over the live policy; 1 is always on policy

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.refresh < 1:
            raise ValueError(f"refresh must be at least 1, got {self.refresh}")
        if not self.renoise.shared:
            raise ValueError("renoise.shared must be true: a pair is compared under one noise")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        stale = {SAMPLER: partial(renewed, self.refresh)} if self.refresh > 1 else {}
        return Algorithm(
            plans=forward_process(self.steps, self.renoise, given=self.pairs == "given"),
            credit=Credit(weights, best_and_worst, "total_first", "whole", select=moved, learners=2),
            objective=Coupled(
                self.error.of,
                partial(preference, self.beta, 0.0, REFERENCE),
                (REFERENCE,),
                self.norm_guard.anchors,
                idle_at_zero=not self.norm_guard.weight,
            ),
            noise=Noise(level=0.0),
            copies={REFERENCE: 1.0, **stale},
            sampler=SAMPLER if stale else None,
        )
