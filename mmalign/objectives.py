"""What an update should make more likely: one class per family, each a few lines around its formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from mmalign.contracts import Policy
from mmalign.records import Evaluation, Minibatch

KLForm = Literal["gaussian", "velocity", "per_step"]
Measures = dict[str, Tensor]  # [n, *site] each, without gradient; the trainer takes means and maxima
# What picked actions gain for each objective under the present parameters, [K, n, *site].
Gain = Callable[[Evaluation], tuple[Tensor, Measures]]

REFERENCE = "reference"  # the copy of the parameters that the KL pulls towards
OLD = "old"  # a copy that follows the live parameters slowly
LAST = "last"  # the copy of the parameters that the iteration began with
CEILING = 30.0  # log-ratios above it push no further: exp(30) fits into fp32 with room for its products


class Objective(Protocol):
    """Losses of the picked actions, one per objective kept apart, and what was seen on the way.

    Where several are kept apart and there is a pull to a reference, it is a further loss (`summed`).

    clip_range: the smallest deviation of the ratio from 1 that matters, None where there is none.
    idle_at_zero: an action with advantage 0 has gradient 0.
    """

    @property
    def clip_range(self) -> float | None: ...

    @property
    def idle_at_zero(self) -> bool: ...

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]: ...


def clipped_gain(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log_ratio), and no r that could overflow.

    The minimum only ever bounds r from above where A > 0 and from below where A < 0, so one clamp of the
    logarithm gives both its value and its gradient.
    """
    above = log_ratio.clamp(max=min(math.log1p(high), CEILING))
    below = log_ratio.clamp(min=math.log1p(-low) if low < 1 else -math.inf, max=CEILING)
    return torch.where(advantage > 0, above, below).exp() * advantage


def frozen(policy: Policy, batch: Minibatch, copy: str, guidance: float | None = None) -> Evaluation:
    """What a copy of the parameters finds, without gradient.

    Ask before the live parameters: there must be no graph yet that looks at them while they are swapped.
    """
    with torch.no_grad(), policy.copies.use(copy):
        return policy.evaluate(batch.trajectory, batch.pick, guidance)


def velocity_of(found: Evaluation) -> Tensor:
    """The velocity of an evaluation, [n, *latent]."""
    if found.velocity is None:
        raise TypeError("this method needs a policy that reports its velocity")
    return found.velocity


def divergence(new: Evaluation, reference: Evaluation, form: KLForm = "gaussian") -> Tensor:
    """KL from the reference at each action, [n, *site] or broadcastable: exact where actions are Gaussian.

    gaussian    |mean - mean_ref|^2 / (2 std^2)       the KL of the two steps
    per_step    |mean - mean_ref|^2 / (2 g^2)         early public Flow-GRPO, without the d of std^2 = g^2 d
    velocity    |v - v_ref|^2                         the same weight for every step

    Each is a mean over the latent, as the log-probability of the public codes is. `conversion` gives the
    factors between them. Where actions are not Gaussian (tokens) it is the estimate exp(l) - l - 1 with l =
    log p_ref - log p, which is positive and unbiased under the sampling policy.
    """
    if new.mean is None or reference.mean is None:
        if form != "gaussian":
            raise TypeError(f"kl_form {form!r} needs Gaussian actions; these have only a log-probability")
        delta = (reference.log_prob - new.log_prob).clamp(max=CEILING)
        return delta.expm1() - delta
    if form == "velocity":
        if new.velocity is None or reference.velocity is None:
            raise TypeError("kl_form 'velocity' needs a policy that reports its velocity")
        gap = (new.velocity - reference.velocity) ** 2
    else:
        if new.std is None or (form == "per_step" and new.step is None):
            raise TypeError(
                f"kl_form {form!r} needs a policy that reports the std and the length of its steps"
            )
        gap = (new.mean - reference.mean) ** 2 / (2 * new.std**2)
        if form == "per_step" and new.step is not None:
            gap = gap * new.step
    kl = gap.flatten(1).mean(1)
    return kl.reshape(-1, *[1] * (new.log_prob.ndim - 1))


def conversion(form: KLForm, g: float, sigma: float, step: float) -> float:
    """What a form of the KL gives at one step of Flow-SDE or Dance-SDE, per unit of the exact Gaussian KL.

    g: noise rate at sigma, so that std^2 = g^2 step. The mean moves with the velocity by
    -step (1 + g^2 (1 - sigma) / (2 sigma)). To keep the pull of a published beta, multiply it by the factor
    of its own form and divide by the factor of yours.
    """
    if form == "gaussian":
        return 1.0
    if form == "per_step":
        return step
    slope = step * (1 + g**2 * (1 - sigma) / (2 * sigma))
    return 2 * g**2 * step / slope**2


@dataclass(frozen=True)
class ClippedRatio:
    """Raise the odds of good actions, but no further than the clip allows (PPO, GRPO, Flow-GRPO)."""

    low: float = 0.2
    high: float = 0.2
    kl: float = 0.0
    kl_form: KLForm = "gaussian"

    def __post_init__(self) -> None:
        if not (self.low > 0 and self.high > 0):
            raise ValueError(f"clip must be positive, got low={self.low}, high={self.high}")
        if not self.kl >= 0:
            raise ValueError(f"kl must be 0 or more, got {self.kl}")

    @property
    def clip_range(self) -> float | None:
        return min(self.low, self.high)

    @property
    def idle_at_zero(self) -> bool:
        return self.kl == 0

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        def gain(new: Evaluation) -> tuple[Tensor, Measures]:
            log_ratio = new.log_prob - batch.log_prob
            gained = clipped_gain(log_ratio, batch.advantage, self.low, self.high)  # [K, n, *site]
            return gained, ratio_measures(log_ratio, self.low, self.high)

        return penalized(policy, batch, gain, self.kl, self.kl_form)


def ratio_measures(log_ratio: Tensor, low: float, high: float) -> Measures:
    """How far the ratio is from 1, and how often it is outside of the clip range."""
    now = log_ratio.detach()
    return {
        "log_ratio": now,
        "ratio": now.clamp(max=CEILING).exp(),
        "clip_share": (now > math.log1p(high)) | (now < (math.log1p(-low) if low < 1 else -math.inf)),
    }


def penalized(
    policy: Policy, batch: Minibatch, gain: Gain, kl: float, kl_form: KLForm
) -> tuple[Tensor, Measures]:
    """Losses [K]: minus what the actions gain now, plus kl times their divergence from the reference."""
    if kl:
        reference = frozen(policy, batch, REFERENCE)
    new = policy.evaluate(batch.trajectory, batch.pick)
    gained, measures = gain(new)
    penalty: Tensor | float = 0.0
    if kl:
        away = divergence(new, reference, kl_form).expand_as(new.log_prob)
        measures["kl"] = away.detach()
        penalty = kl * (away if batch.pull is None else batch.pull * away)
    return summed(-gained, penalty, batch.weight), measures


def summed(loss: Tensor, penalty: Tensor | float, weight: Tensor) -> Tensor:
    """Losses [K] of a minibatch from those of its actions [K, n, *site] and a pull on each [n, *site].

    Objectives kept apart share one pull, which no balance between them may touch: then it is the last of
    [K + 1] losses.
    """
    if len(loss) == 1 or not isinstance(penalty, Tensor):
        return ((loss + penalty) * weight).flatten(1).sum(1)
    return (torch.cat([loss, penalty[None]]) * weight).flatten(1).sum(1)


def square_gap(velocity: Tensor, there: Tensor) -> Tensor:
    """mean |v - v_copy|^2, [n] of [n, *latent]."""
    return (velocity - there).square().flatten(1).mean(1)


@dataclass(frozen=True)
class NormExcess:
    """max(0, |v| / |v_copy| - 1 - margin)^power (NormGuard, arXiv:2606.27771); [n] of [n, *latent].

    The paper says hinge on the excess of the norm; that it is relative, and its power, are our choice.
    """

    power: float = 2.0
    margin: float = 0.0

    def __call__(self, velocity: Tensor, there: Tensor) -> Tensor:
        excess = norm_ratio(velocity, there) - 1 - self.margin
        return excess.relu() ** self.power


def norm_ratio(velocity: Tensor, there: Tensor) -> Tensor:
    """|v| / |v_copy|, [n] of [n, *latent]."""
    ratio: Tensor = velocity.flatten(1).norm(dim=1) / there.flatten(1).norm(dim=1).clamp(min=1e-12)
    return ratio


@dataclass(frozen=True)
class Anchor:
    """A pull of the velocity towards that of a frozen copy: weight times `away`, mean |v - v_copy|^2.

    guidance: of the copy's forward; None is the policy's own. scale: of the weight, from the advantage [n].
    name: under which the distance is logged.
    """

    weight: float
    copy: str = REFERENCE
    guidance: float | None = None
    scale: Callable[[Tensor], Tensor] | None = None
    name: str = "kl"
    away: Callable[[Tensor, Tensor], Tensor] = square_gap

    def velocity(self, policy: Policy, batch: Minibatch) -> Tensor:
        """Where it pulls to; to be asked before there is a graph of the live parameters."""
        return velocity_of(frozen(policy, batch, self.copy, self.guidance))


def anchored(anchors: Sequence[Anchor], policy: Policy, batch: Minibatch) -> list[Tensor]:
    """Where each anchor pulls to; a copy is asked once for all that pull to it."""
    asked: dict[tuple[str, float | None], Tensor] = {}
    for anchor in anchors:
        if (anchor.copy, anchor.guidance) not in asked:
            asked[anchor.copy, anchor.guidance] = anchor.velocity(policy, batch)
    return [asked[anchor.copy, anchor.guidance] for anchor in anchors]


def pulled(
    anchors: Sequence[Anchor], held: Sequence[Tensor], velocity: Tensor, advantage: Tensor
) -> tuple[Tensor | float, Measures]:
    """The penalty of all anchors [n], 0 if there is none; held: their velocities, advantage: [K, n]."""
    penalty: Tensor | float = 0.0
    measures: Measures = {}
    for anchor, there in zip(anchors, held, strict=True):
        away = anchor.away(velocity, there)
        measures[anchor.name] = away.detach()
        if anchor.copy == REFERENCE:
            measures["norm_ratio"] = norm_ratio(velocity.detach(), there)
        scale = anchor.scale(advantage.mean(0)) if anchor.scale else 1.0
        penalty = penalty + anchor.weight * scale * away
    return penalty, measures
