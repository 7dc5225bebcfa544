"""Longer steps of the ODE than Euler's: DPM-Solver++ of second order in its multistep form (Lu et al. 2022,
arXiv:2211.01095), for flows.

With the clean estimate D = x - t v and lambda = log((1 - t) / t), the step of first order from t to u is
Euler's, x_u = (u / t) x + (1 - u / t) D. The second order lets D go on as it changed from the step before:

    x_u = (u / t) x + (1 - u / t) (D + (D - D_before) H / (2 H_before)),    H = lambda(u) - lambda(t)

where H_before led from the time of D_before to t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.sde import euler, log_q


@dataclass(frozen=True)
class Estimate:
    """The clean sample as it was estimated at sigma; clean: [n, *latent], sigma: scalar."""

    clean: Tensor
    sigma: Tensor


def multistep(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, before: Estimate | None
) -> tuple[Tensor, Estimate]:
    """Where the step from sigma to sigma_next leads, and the estimate that the next one builds on.

    x, velocity: [n, *latent]; sigma, sigma_next: scalar. Without an estimate from before, and at the last
    step, whose lambda is infinite, it is the Euler step.
    """
    now = Estimate(x - sigma * velocity, sigma)
    straight = euler(x, velocity, sigma, sigma_next)
    if before is None or sigma_next == 0:
        return straight, now
    steps = log_q(sigma, sigma_next) / log_q(before.sigma, sigma)  # H / H_before; 0 after the step from noise
    return straight + (1 - sigma_next / sigma) * steps / 2 * (now.clean - before.clean), now


def compressed(sigmas: Tensor, steps: int) -> Tensor:
    """A schedule of so many steps [steps + 1] with the ends of `sigmas`, spread evenly over its entries."""
    place = torch.linspace(0, len(sigmas) - 1, steps + 1, device=sigmas.device)
    low = place.long().clamp(max=len(sigmas) - 2)
    return torch.lerp(sigmas[low], sigmas[low + 1], place - low)
