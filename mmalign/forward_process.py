"""What the methods of the forward process share: how well a velocity fits finished samples.

A finished sample x0 is noised again, x = (1 - t) x0 + t e, and the velocity's error against e - x0 there says
how likely the sample is: weighed by (1 - t) / t and averaged over t and e it is the bound on -log p(x0) (up
to a constant), and other weights are other surrogates of it. A method of this family is a choice of

    timesteps   which noise levels, and whether a group shares them    (`mmalign.records.Renoise`)
    weighting   how errors at different levels and of different size compare          (`Matching`)
    estimator   one ratio for each noised state, or one a sample from the mean of its states
    loss        what becomes of the errors of the live policy and of its frozen copies

(the design space of arXiv:2602.04663). The levels, the weighting and the loss do not know each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.coupling import Population
from mmalign.objectives import OLD, REFERENCE, Anchor, Measures, NormExcess, velocity_of
from mmalign.records import Evaluation, Noised

POWERS = {"elbo": -1, "one": 0, "t": 1, "t2": 2}
SHORTFALL = 1e-10  # keeps the slope of a power of the error finite where there is no error


@dataclass(frozen=True)
class Matching:
    """How far a velocity misses a sample that was noised again; less means that it finds it more likely."""

    # factor on the squared error: one, t, t2 (the error of the clean estimate), or elbo, which is (1 - t) / t
    # and with levels drawn evenly in t estimates the bound on the likelihood
    weight: Literal["elbo", "one", "t", "t2"] = "one"
    adaptive: bool = False  # divide by the absolute error, without its gradient: steps of even size at all t
    power: float = 1.0  # of the squared error, divided by it; below 1 large errors pull less

    def __post_init__(self) -> None:
        if self.weight not in POWERS:
            raise ValueError(f"weight must be one of {', '.join(POWERS)}, got {self.weight!r}")
        if not 0 < self.power <= 1:
            raise ValueError(f"power must lie in (0, 1], got {self.power}")

    def __call__(self, state: Noised, velocity: Tensor, sites: int = 0) -> Tensor:
        """The weighted error of velocities [n, C, *place], [n]; each a mean over the latent.

        sites: how many of its axes are kept apart, so that the error is [n, *site]: 1 for each frame its own.
        """
        miss = state.x - state.sigma * velocity - state.clean  # of the clean estimate: t times the velocity's
        inner = (1, *range(2 + sites, miss.ndim))
        t, error = state.sigma.reshape(-1, *[1] * sites), miss.square().mean(inner)
        inside = 2  # powers of t that the error holds already
        if self.adaptive:
            error, inside = error / miss.detach().abs().mean(inner).clamp(min=1e-5), 1
        power = POWERS[self.weight]
        if self.power < 1:
            error = error * t**-inside
            error = ((error + SHORTFALL) ** self.power - SHORTFALL**self.power) / self.power
            inside = 0
        if power != inside:
            error = error * t ** (power - inside)
        return error * (1 - t) if self.weight == "elbo" else error

    def of(self, found: Evaluation) -> Tensor:
        """The error of what a policy found, [n]."""
        return self(*renoised(found))


@dataclass(frozen=True)
class NormGuard:
    """Holds velocities to the length that those of the base model have, but only from above."""

    weight: float = 0.0  # of the penalty; raise it until norm_ratio stays below 1.01; 0 saves a forward
    power: float = 2.0  # of the relative excess; 1 also holds back small ones
    margin: float = 0.0  # relative excess that is free
    # of the base model; null: the policy's own. Where training without guidance starts from a model that
    # needs it, velocities have to grow: give the guidance that they may grow to.
    guidance: float | None = None

    def __post_init__(self) -> None:
        if self.weight < 0 or self.margin < 0 or not self.power >= 1:
            raise ValueError(
                f"weight and margin must not be negative, power at least 1, got {self.weight}, "
                f"{self.margin}, {self.power}"
            )

    @property
    def anchors(self) -> tuple[Anchor, ...]:
        """The pull that it is, none where it has no weight."""
        away = NormExcess(self.power, self.margin)
        held = Anchor(self.weight, REFERENCE, self.guidance, name="norm_excess", away=away)
        return (held,) if self.weight else ()


def renoised(found: Evaluation) -> tuple[Noised, Tensor]:
    """State and velocity of an evaluation of samples that were noised again."""
    if found.noised is None:
        raise TypeError("this method needs a policy that noises its samples again, as Plan.renoise asks")
    return found.noised, velocity_of(found)


def preference(beta: float, clip: float, reference: str, everyone: Population) -> tuple[Tensor, Measures]:
    """-log sigmoid(-(beta / n) sum_i A_i d_i) of every group at every noise level, weighed by its members.

    d_i is the error of member i less that of the copy `reference`, and n the number of members that count.
    With two members of advantage 1 and -1 this is Diffusion-DPO. clip > 0: a member whose ratio exp(m_old -
    m) has left 1 - clip..1 + clip in the direction of its advantage gives no gradient (needs the old copy).
    """
    advantage, error = everyone.advantage, everyone.now.expand_as(everyone.advantage)
    measures: Measures = {}
    if clip:
        ratio = (everyone.frozen[OLD] - error.detach()).exp()
        done = ((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip))
        error = torch.where(done, error.detach(), error)
        measures |= {"ratio": ratio[0], "clip_share": done[0]}
    change = error - everyone.frozen[reference]
    count = everyone.total(torch.ones_like(everyone.weight))
    margin = -beta * everyone.total(advantage * change) / count.clamp(min=1)
    with torch.no_grad():
        for name, side in (("won", advantage[0] > 0), ("lost", advantage[0] < 0)):
            share = (side * everyone.weight).sum() / everyone.weight.sum().clamp(min=1e-12)
            measures[f"change/{name}"] = change[0] * side / share.clamp(min=1e-12)
        measures["margin"] = margin[0]
        measures["accuracy"] = (torch.sign(margin[0]) + 1) / 2
    return (-logsigmoid(margin) * everyone.weight).sum((1, 2)), measures
