"""One step of a flow model with noise: its mean, its standard deviation, and how likely an outcome was.

Notation: `sigma` runs from 1 (noise) to 0 (clean), x = (1 - sigma) x0 + sigma e, the model gives v = e - x0.
A step goes from sigma to sigma_next and covers d = sigma - sigma_next > 0. With the noise estimate
e = x + (1 - sigma) v every kind of step is the Euler step of the ODE, pulled along e, plus noise:

    x' ~ N(x - d v - pull e, std^2)

    flow   pull = g^2 d / (2 sigma)                    std = g sqrt(d), g = level sqrt(sigma / (1 - sigma))
    dance  pull = g^2 d / (2 sigma)                    std = g sqrt(d), g = level
    cps    pull = sigma_next (1 - cos(level pi/2))     std = sigma_next sin(level pi/2)
    ddim   pull = sigma_next - sqrt(sigma_next^2 - std^2)   std = level sigma_next sqrt(1 - q^2),
           q = sigma_next (1 - sigma) / (sigma (1 - sigma_next))

flow is the step of Flow-GRPO (arXiv:2505.05470), dance of DanceGRPO (arXiv:2505.07818), cps of Flow-CPS
(arXiv:2509.05952), ddim of DDIM (arXiv:2010.02502) with eta = level. flow, dance and ddim follow the data law
as the steps grow. cps keeps the schedule's coefficients of signal and noise instead; its law does not
converge to the data's: a Gaussian's variance ends at (1 + cos(level pi/2)) / 2 of what it should be.

Models that predict noise live in y = sqrt(a) x0 + sqrt(1 - a) e. With c = sqrt(a) + sqrt(1 - a), y / c is x
at sigma = sqrt(1 - a) / c, and the DDIM step from y to y' is the step ddim from x to x', for every eta: one
kernel serves both. Densities differ by the constant c', which no ratio sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmalign.records import Renoise

AT_NOISE = 1 - 1e-6  # from here on sigma counts as 1, where flow's g is infinite


@dataclass(frozen=True)
class Noise:
    """How a stochastic step draws its noise and how its log-probability is written."""

    kind: Literal["flow", "dance", "cps", "ddim"] = "flow"  # all follow the data law, but cps the schedule
    # raise to explore more, lower when images break; usual: flow 0.7, dance 0.3, cps 0.8, ddim 1.0 (its eta)
    level: float = 0.7
    # gaussian is the true density. unscaled is -(x' - mean)^2 as in the public code of CPS, with no constants
    # and no 1 / (2 std^2); it weighs steps differently and needs another clip range. For cps only.
    density: Literal["gaussian", "unscaled"] = "gaussian"
    # mean over the latent's n numbers, as all public code does and all published clip ranges assume: the
    # ratio is the n-th root of the true one. sum is the log-probability proper, with n times the clip range.
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        for field, value, known in (
            ("kind", self.kind, ("flow", "dance", "cps", "ddim")),
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

    mean: [n, *latent]. std, g, step: [n, 1, ...] or scalar. step is d = sigma - sigma_next. At least fp32.
    """

    mean: Tensor
    std: Tensor
    g: Tensor
    step: Tensor


def euler(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The ODE step x - d v, in fp32 or better; sigma, sigma_next: [n] or scalar."""
    x, velocity = _precise(x), _precise(velocity)
    return x + velocity * (_along(sigma_next, x) - _along(sigma, x))


def transition(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Noise, sigma_guard: Tensor | float
) -> Transition:
    """Mean and standard deviation of the step from sigma to sigma_next, in fp32 or better.

    x, velocity: [n, *latent]; sigma, sigma_next, sigma_guard: [n] or scalar. sigma_guard stands in for sigma
    = 1 in the 1 - sigma under flow's square root, which is 0 there, and nowhere else; it is the second entry
    of the schedule. With noise.level = 0 the mean is `euler` bit for bit.
    """
    x, velocity = _precise(x), _precise(velocity)
    s, s_next = _along(sigma, x), _along(sigma_next, x)
    d = s - s_next
    if noise.kind == "cps":
        angle = noise.level * math.pi / 2
        std = s_next * math.sin(angle)
        pull = s_next * (2 * math.sin(angle / 2) ** 2)  # 1 - cos
        g = std / d.sqrt()
    elif noise.kind == "ddim":
        redrawn = 1 - (s_next * (1 - s) / (s * (1 - s_next))) ** 2  # share of the noise that is drawn anew
        std = noise.level * s_next * redrawn.sqrt()
        pull = s_next * (noise.level**2 * redrawn / (1 + (1 - noise.level**2 * redrawn).sqrt()))
        g = std / d.sqrt()
    else:
        g = torch.full_like(s, noise.level)
        if noise.kind == "flow":
            g = g * (s / (1 - torch.where(s >= AT_NOISE, _along(sigma_guard, x), s))).sqrt()
        std = g * d.sqrt()
        pull = g**2 * d / (2 * s)
    mean = x + velocity * (s_next - s) - pull * (x + (1 - s) * velocity)
    return Transition(mean, std, g, d)


def log_prob(x_next: Tensor, transition: Transition, noise: Noise, dims: tuple[int, ...] = ()) -> Tensor:
    """Log-density of x_next [n, *latent], per element, or over `dims` by noise.reduction.

    The last step of a schedule has std = 0 under cps and ddim and no density: it must not be an action.
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
