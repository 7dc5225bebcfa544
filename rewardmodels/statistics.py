"""Statistics of pixels as rewards: contrast, colorfulness, sharpness. They read no prompt, need no weights,
and pull against file size and fidelity: made to try how rewards that conflict are balanced, and as probes of
hacking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.inputs import pictures

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in the brightness (ITU-R BT.601)


@dataclass(frozen=True)
class Contrast:
    """Standard deviation of the brightness over a picture, from 0 to 0.5; differentiable."""

    name = "contrast"

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, self.differentiate(outcome)[:, None])

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The reward [B * views]; gradients reach the media."""
        images = pictures(self.name, outcome, graph=True)
        brightness = (images * images.new_tensor(LUMA)[:, None, None]).sum(1)
        return spread(brightness)


@dataclass(frozen=True)
class Colorfulness:
    """Colorfulness of a picture, 0 for gray, about 0.1 muted and 0.4 vivid; differentiable.

    Of Hasler and Suesstrunk, "Measuring colourfulness in natural images" (2003), for pixels in [0, 1]: with
    rg = R - G and yb = (R + G) / 2 - B it is sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2).
    """

    name = "colorfulness"

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, self.differentiate(outcome)[:, None])

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The reward [B * views]; gradients reach the media."""
        red, green, blue = pictures(self.name, outcome, graph=True).unbind(1)
        opposed = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)  # [B, 2, H * W]
        variance = opposed.var(2, correction=0).sum(1)
        mean = opposed.mean(2).square().sum(1)
        return root(variance) + 0.3 * root(mean)


@dataclass(frozen=True)
class Sharpness:
    """Mean square of the Laplacian of the brightness, 0 for a flat picture; differentiable.

    A focus measure: blur lowers it, noise and over-sharpening raise it, so it is a probe rather than a goal.
    """

    name = "sharpness"

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, self.differentiate(outcome)[:, None])

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The reward [B * views]; gradients reach the media."""
        images = pictures(self.name, outcome, graph=True)
        y = (images * images.new_tensor(LUMA)[:, None, None]).sum(1)
        around = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
        found: Tensor = (around - 4 * y[:, 1:-1, 1:-1]).square().mean((1, 2))
        return found


def spread(values: Tensor) -> Tensor:
    """Standard deviation over the places of [B, H, W], [B]."""
    return root(values.flatten(1).var(1, correction=0))


def root(x: Tensor) -> Tensor:
    """Square root with a finite slope at 0."""
    return (x + 1e-12).sqrt() - 1e-6
