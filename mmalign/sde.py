"""One step of a flow model with noise: its mean, its standard deviation, and how likely an outcome was.

Notation: `sigma` runs from 1 (noise) to 0 (clean), x = (1 - sigma) x0 + sigma e, the model gives v = e - x0.
A step goes from sigma = t to sigma_next = u and covers d = t - u > 0. With the noise estimate e = x +
(1 - t) v every kind of step is the Euler step of the ODE, pulled along e, plus noise:

    x' ~ N(x - d v - pull e, std^2)

Four kinds follow a stochastic differential equation with noise rate g by small steps:

    flow           pull = std^2 / (2 t)    std^2 = g^2 d, g = level sqrt(t / (1 - t))
    dance          pull = std^2 / (2 t)    std^2 = g^2 d, g = level
    linear         pull = std^2 / (2 t)    std^2 = g^2 d, g = level t
    sage           pull = std^2 / (2 t)    std^2 = level^2 (log((1 - u) / (1 - t)) - d), flow's g^2 integrated

Four keep the coefficients of the schedule, and of its noise the share k, x' = (1 - u) x0 + u (k e +
sqrt(1 - k^2) z):

    cps            k = cos(level pi/2)                  pull = u (1 - k)    std = u sqrt(1 - k^2)
    precise        k = q^(level^2 / 2), q = u (1 - t) / (t (1 - u))
    dance_precise  k = exp(level^2 / 2 (1/t - 1/u))
    ddim           k = sqrt(1 - level^2 (1 - q^2))

flow is the step of Flow-GRPO (arXiv:2505.05470), linear that of its public code for Wan (level there: the
second sigma of the schedule), dance of DanceGRPO (arXiv:2505.07818), cps of Flow-CPS (arXiv:2509.05952),
precise and dance_precise, the exact integrals of flow's and dance's equations while the clean estimate stands
still, of Precise (arXiv:2605.23522), sage of SAGE-GRPO (arXiv:2603.21872), ddim of DDIM (arXiv:2010.02502)
with eta = level. All but cps follow the data law as the steps grow. cps redraws as much in a small step as in
a large one, and its law does not converge to the data's: a Gaussian's variance ends at
(1 + cos(level pi/2)) / 2 of what it should be.

Models that predict noise live in y = sqrt(a) x0 + sqrt(1 - a) e. With c = sqrt(a) + sqrt(1 - a), y / c is x
at sigma = sqrt(1 - a) / c, and the DDIM step from y to y' is the step ddim from x to x', for every eta: one
kernel serves both. Densities differ by the constant c', which no ratio sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mmalign.records import Renoise

AT_NOISE = 1 - 1e-6  # from here on sigma counts as 1, where flow's g is infinite
Kind = Literal["flow", "dance", "linear", "cps", "precise", "dance_precise", "sage", "ddim"]


@dataclass(frozen=True)
class Noise:
    """How a stochastic step draws its noise and how its log-probability is written."""

    kind: Kind = "flow"  # cps, precise and dance_precise leave the least noise behind in few steps
    # Raise it to explore more, lower it when images break; usual: flow and sage 0.7, dance and dance_precise
    # 0.3, linear 1.0, cps 0.8, precise 0.7 to 1.5, ddim 1.0 (its eta).
    level: float = 0.7
    # gaussian is the true density. unscaled is -(x' - mean)^2 as in the public code of CPS, with no constants
    # and no 1 / (2 std^2); it weighs steps differently and needs another clip range. For cps only.
    density: Literal["gaussian", "unscaled"] = "gaussian"
    # mean over the latent's n numbers, as all public code does and all published clip ranges assume: the
    # ratio is the n-th root of the true one. sum is the log-probability proper, with n times the clip range.
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        for field, value, known in (
            ("kind", self.kind, get_args(Kind)),
            ("density", self.density, ("gaussian", "unscaled")),
            ("reduction", self.reduction, ("mean", "sum")),
        ):
            if value not in known:
                raise ValueError(f"noise.{field} must be one of {', '.join(known)}, got {value!r}")
        if not (math.isfinite(self.level) and self.level >= 0):
            raise ValueError(f"noise.level must be 0 or more, got {self.level}")
        if self.kind in ("cps", "ddim") and self.level > 1:
            raise ValueError(f"noise.level of {self.kind} must lie in [0, 1], got {self.level}")
        if self.density == "unscaled" and self.kind != "cps":
            raise ValueError(f"noise.density 'unscaled' is the form of cps only, got kind {self.kind!r}")


@dataclass(frozen=True)
class Transition:
    """Where a step leads: x' ~ N(mean, std^2), with std = g sqrt(step).

    mean: [n, *latent]. std, g, step, slope: [n, 1, ...] or scalar. step is d = sigma - sigma_next, slope how
    far the mean moves against the velocity, d mean / d v = -slope. At least fp32.
    """

    mean: Tensor
    std: Tensor
    g: Tensor
    step: Tensor
    slope: Tensor


def euler(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The ODE step x - d v, in fp32 or better; sigma, sigma_next: [n] or scalar."""
    x, velocity = _precise(x), _precise(velocity)
    return x + velocity * (_along(sigma_next, x) - _along(sigma, x))


def transition(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Noise, sigma_guard: Tensor | float
) -> Transition:
    """Mean and standard deviation of the step from sigma to sigma_next, in fp32 or better.

    x, velocity: [n, *latent]; sigma, sigma_next, sigma_guard: [n] or scalar. sigma_guard stands in for sigma
    = 1 where flow and sage divide by 1 - sigma, which is 0 there, and nowhere else; it is the second entry of
    the schedule. With noise.level = 0 the mean is `euler` bit for bit.
    """
    x, velocity = _precise(x), _precise(velocity)
    s, s_next = _along(sigma, x), _along(sigma_next, x)
    d = s - s_next
    if noise.kind in ("cps", "precise", "dance_precise", "ddim"):
        drawn, lost = _replaced(noise, s, s_next)
        std, pull = s_next * drawn, s_next * lost
    elif noise.kind == "sage":
        std = noise.level * _integral(s, s_next, _along(sigma_guard, x)).sqrt()
        pull = std**2 / (2 * s)
    else:
        g = torch.full_like(s, noise.level)
        if noise.kind == "linear":
            g = g * s
        elif noise.kind == "flow":
            g = g * (s / (1 - torch.where(s >= AT_NOISE, _along(sigma_guard, x), s))).sqrt()
        std = g * d.sqrt()
        pull = g**2 * d / (2 * s)
    mean = x + velocity * (s_next - s) - pull * (x + (1 - s) * velocity)
    return Transition(mean, std, std / d.sqrt(), d, d + pull * (1 - s))


def schedule(sigmas: Tensor, noise: Noise) -> Transition:
    """Every step of a schedule [T + 1] from nowhere: std, slope and the like are [T, 1], on the CPU."""
    sigmas = sigmas.cpu()
    nowhere = torch.zeros(len(sigmas) - 1, 1)
    return transition(nowhere, nowhere, sigmas[:-1], sigmas[1:], noise, sigmas[1])


def log_q(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Logarithm of q = u (1 - t) / (t (1 - u)), to which a step from t to u shrinks noise against signal."""
    d = sigma - sigma_next
    return torch.log1p(-d / sigma) + torch.log1p(-d / (1 - sigma_next))


def _integral(s: Tensor, s_next: Tensor, guard: Tensor) -> Tensor:
    """Of sigma / (1 - sigma) over a step; in the one that starts at noise, 1 - sigma is 1 - guard or more."""
    top = torch.where(s >= AT_NOISE, guard, s)
    below = top - s_next
    return torch.log1p(below / (1 - top)) - below + (s**2 - top**2) / (2 * (1 - top))


def _replaced(noise: Noise, s: Tensor, s_next: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """sqrt(1 - k^2), the share of the noise that is drawn afresh, and 1 - k, for the share k that is kept."""
    if noise.kind == "cps":
        angle = noise.level * math.pi / 2
        return math.sin(angle), 2 * math.sin(angle / 2) ** 2
    if noise.kind == "ddim":
        redrawn = noise.level**2 * (1 - (s_next * (1 - s) / (s * (1 - s_next))) ** 2)
        return redrawn.sqrt(), redrawn / (1 + (1 - redrawn).sqrt())
    rate = log_q(s, s_next) if noise.kind == "precise" else -(s - s_next) / (s * s_next)
    # Finite, so that without noise k is 1 even where q is 0.
    log_k = noise.level**2 / 2 * rate.clamp(min=torch.finfo(rate.dtype).min)
    return (-torch.expm1(2 * log_k)).sqrt(), -torch.expm1(log_k)


def log_prob(x_next: Tensor, transition: Transition, noise: Noise, dims: tuple[int, ...] = ()) -> Tensor:
    """Log-density of x_next [n, *latent], per element, or over `dims` by noise.reduction.

    The last step of a schedule has std = 0 under the kinds that keep its coefficients, and no density: it
    must not be an action.
    """
    x_next = _precise(x_next)
    squared = (x_next - transition.mean) ** 2
    if noise.density == "unscaled":
        density = -squared
    else:
        density = -squared / (2 * transition.std**2) - transition.std.log() - 0.5 * math.log(2 * math.pi)
    if not dims:
        return density
    return density.mean(dims) if noise.reduction == "mean" else density.sum(dims)


def levels(renoise: Renoise, sigmas: Tensor, drawn: Tensor) -> Tensor:
    """Noise levels [n, times], falling along each row; one in each of `times` equal parts of the span.

    sigmas: schedule [steps + 1] that falls to 0. drawn: [n, times] in [0, 1), the place in each part.
    """
    low, high = renoise.span
    parts = (torch.arange(renoise.times, device=drawn.device) + drawn) / renoise.times
    share = (low + (high - low) * parts).clamp(max=1 - 1e-6)  # rounding must not reach sigma = 0
    if renoise.law == "uniform":
        return sigmas[0] * (1 - share)
    place = share * (len(sigmas) - 1)
    point = place.long().clamp(max=len(sigmas) - 2)
    if renoise.law == "grid":
        return sigmas[point]
    return torch.lerp(sigmas[point], sigmas[point + 1], place - point)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _along(value: Tensor | float, x: Tensor) -> Tensor:
    """`value` [n] or scalar as a tensor that broadcasts along the first dimension of x."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim == 1 else value
