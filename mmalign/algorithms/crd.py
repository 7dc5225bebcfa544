"""CRD: centered reward distillation (2026, arXiv:2603.14128).

The optimum of reward maximization under a KL has reward = beta log(p / p_old) + a constant of the prompt.
Centering both sides inside the group removes the constant, and what is left is a regression:

    r   = -(m / w - m_old / w_old),   m = mean |v - (e - x0)|^2,   w = stopgrad(mean |v - (e - x0)|)
    a   = 1/2 + clip(A, -strength, strength) / (2 strength)
    L   = strength / beta mean (beta r_c - a_c)^2 + mean k_i |v - v_ref|^2

r_c = r - stopgrad(mean r) and a_c = a - mean a, with means over the group at one noise level, uniform or, at
a `temperature`, once with weights softmax(a / temperature) and once with softmax(-a / temperature), half of
each; at temperature 0 over the samples better, and over those worse, than the mean of the group. The pull k_i
to the base model, which may be guided, grows from 1e-4 at a = 0 to kl at a = 1. Samples come from a slower
copy of the policy than the one of m_old.

N samples of T steps cost N T forwards to sample, N S to train at S = `renoise.times` levels, N S of the old
policy and N S more to know the means before the backward pass (unless an update is one minibatch), and N S of
the reference where kl > 0, twice that where it is guided and the policy is not.

The paper is known to us in part; what it leaves open follows the trainer of Flow-Factory. That one takes the
means over whatever lies in a batch, here they are taken inside each prompt's group; at temperature 0 it
weighs by softmax(a) inside each side, here all samples of a side count alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from mmalign.copies import Ramp
from mmalign.coupling import Coupled, Population
from mmalign.credit import Credit, zscore, zscore_batch
from mmalign.forward_process import Matching
from mmalign.objectives import OLD, REFERENCE, Anchor, Measures
from mmalign.plans import forward_process
from mmalign.records import Renoise
from mmalign.sde import Noise
from mmalign.trainer import Algorithm

SAMPLER = "sampler"
LEAST_KL = 1e-4


@dataclass(frozen=True)
class CRD:
    """Regresses how much likelier a sample became onto how good it was, both centered in its group."""

    steps: int = 10  # denoising steps in training
    renoise: Renoise = field(default_factory=lambda: Renoise(20, "grid", (0.0, 0.99)))
    error: Matching = field(default_factory=lambda: Matching("one", adaptive=True))
    beta: float = 1.0  # scale of the likelihood against the reward; smaller makes larger steps
    loss: Literal["mse", "bce"] = "mse"  # of the regression; bce compares their sigmoids
    temperature: float | None = None  # of the weights in the means; null: uniform
    strength: float = 5.0  # advantage at which a sample counts as certainly good
    kl: float = 0.1  # pull of the velocity towards the base model
    kl_guidance: float | None = 4.5  # guidance of the base model in that pull; null: the policy's own
    adaptive_kl: bool = True  # hold good samples more than bad ones
    old: Ramp = field(default_factory=lambda: Ramp(0.25, 0.005, 0.999))
    sampler: Ramp = field(default_factory=lambda: Ramp(slope=0.0075, most=0.999, wait=75))
    std: Literal["batch", "group"] = "batch"  # whose standard deviation scales the advantage

    def __post_init__(self) -> None:
        for name in ("beta", "strength"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.kl >= 0:
            raise ValueError(f"kl must be 0 or more, got {self.kl}")
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, or null, got {self.temperature}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        scale = partial(held_more, self.kl, self.strength) if self.adaptive_kl else None
        return Algorithm(
            plans=forward_process(self.steps, self.renoise),
            credit=Credit(
                weights,
                zscore_batch if self.std == "batch" else zscore,
                "normalized",
                "whole",
                clip=self.strength,
            ),
            objective=Coupled(
                self.error.of,
                partial(centered_regression, self.beta, self.strength, self.loss, self.temperature),
                (OLD,),
                (Anchor(self.kl, guidance=self.kl_guidance, scale=scale),) if self.kl else (),
            ),
            noise=Noise(level=0.0),
            copies={OLD: self.old, SAMPLER: self.sampler} | ({REFERENCE: 1.0} if self.kl else {}),
            sampler=SAMPLER,
        )


def goodness(advantage: Tensor, strength: float) -> Tensor:
    """The advantage as a share in [0, 1]."""
    return (0.5 + advantage / (2 * strength)).clamp(0, 1)


def held_more(kl: float, strength: float, advantage: Tensor) -> Tensor:
    """Factor on the pull of each sample: 1 where it is certainly good, 1e-4 / kl where certainly bad."""
    least = LEAST_KL / kl
    return least + (1 - least) * goodness(advantage, strength)


def shares(good: Tensor, advantage: Tensor, temperature: float | None, everyone: Population) -> list[Tensor]:
    """Weights of the means, [K, N, S] each, that sum to 1 over a group."""
    if temperature is None:
        unscaled = [torch.ones_like(good)]
    elif temperature > 0:
        unscaled = [(sign * (good - 0.5) / temperature).exp() for sign in (1, -1)]
    else:
        unscaled = []
        for side in (advantage > 0, advantage < 0):
            anyone = everyone.total(side.double()) > 0
            unscaled.append(torch.where(anyone, side.double(), 1.0))  # nobody there: all of the group
    return [share / everyone.total(share).clamp(min=1e-300) for share in unscaled]


def centered_regression(
    beta: float,
    strength: float,
    kind: Literal["mse", "bce"],
    temperature: float | None,
    everyone: Population,
) -> tuple[Tensor, Measures]:
    """The regression of the centered implicit reward onto the centered external one."""
    implicit = (everyone.frozen[OLD] - everyone.now).expand_as(everyone.advantage)
    good = goodness(everyone.advantage, strength)
    losses = []
    for share in shares(good, everyone.advantage, temperature, everyone):
        mine = beta * (implicit - everyone.total(share * implicit.detach()))
        goal = good - everyone.total(share * good)
        if kind == "mse":
            losses.append((mine - goal) ** 2)
        else:
            losses.append(binary_cross_entropy_with_logits(mine, goal.sigmoid(), reduction="none"))
    loss = strength / beta * torch.stack(losses).mean(0)
    measures = {"error": everyone.now.detach(), "implicit": implicit[0].detach()}
    return (loss * everyone.weight).sum((1, 2)), measures
