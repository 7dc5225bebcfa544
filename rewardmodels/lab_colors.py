"""Whether a picture shows the colors that its prompt names: a proxy of the lab's verifier with a gradient.

    shown(c) = 1 - exp(-share(c) / area),   share(c) = mean over pixels of exp(-|pixel - c|^2 / (2 width^2))
    reward   = mean of shown over the colors that the prompt names - mean over those that it does not

Where the prompt names none any color will do: the reward is the most that one of them is shown.

It knows no shapes, counts or places, so a blot of the right color satisfies it: made for methods that
differentiate through their reward, beside `lab` at weight 0 to see what the gain is worth.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.lab.scenes import COLORS
from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.inputs import pictures, texts


@dataclass(frozen=True)
class LabColors:
    """Colors of the prompt less other colors of the lab, from -1 to 1; differentiable."""

    width: float = 0.2  # distance in RGB at which a pixel hardly counts; wider sees further and confuses more
    area: float = 0.05  # share of the picture at which a color counts as shown to 63 %; a thing has 0.07
    name = "lab_colors"

    def __post_init__(self) -> None:
        for setting in ("width", "area"):
            if not getattr(self, setting) > 0:
                raise ValueError(f"lab_colors: {setting} must be positive, got {getattr(self, setting)}")

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, self.differentiate(outcome)[:, None])

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The reward [B * views]; gradients reach the media."""
        images = pictures(self.name, outcome, graph=True)
        wanted = asked(texts(outcome)).to(images)  # [B, colors]
        shown = self.shown(images)
        other = 1 - wanted
        gain = (shown * wanted).sum(1) / wanted.sum(1).clamp(min=1)
        loss = (shown * other).sum(1) / other.sum(1).clamp(min=1)
        return torch.where(wanted.any(1), gain - loss, shown.amax(1))

    def shown(self, images: Tensor) -> Tensor:
        """How far each color of the lab is there, [B, colors], for pictures [B, 3, H, W]."""
        palette = images.new_tensor(list(COLORS.values())) / 255  # [colors, 3]
        gap = (images[:, None] - palette[:, :, None, None]).square().sum(2)  # [B, colors, H, W]
        share = (-gap / (2 * self.width**2)).exp().mean((2, 3))
        return 1 - (-share / self.area).exp()


def asked(prompts: Sequence[str]) -> Tensor:
    """Which colors of the lab each prompt names, [B, colors] bool."""
    words = [set(re.findall(r"[a-z]+", prompt.lower())) for prompt in prompts]
    return torch.tensor([[color in named for color in COLORS] for named in words])
