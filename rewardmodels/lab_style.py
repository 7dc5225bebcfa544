"""Whether a picture of the lab is in a style: what a transfer of style is measured by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.lab.render import STYLES
from mmalign.lab.styles import style_of
from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.lab import squares


@dataclass(frozen=True)
class LabStyle:
    """1 where a picture is in the style and 0 where it is in another; blind to the prompt.

    Exact on renders of all styles, also with noise; `mmalign/lab/styles.py`.
    """

    style: str = "pastel"  # plain, pastel, outlined, night or striped
    name = "lab_style"

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"lab_style: style must be one of {', '.join(STYLES)}, got {self.style!r}")

    def __call__(self, outcome: Outcome) -> RewardSignal:
        styles = [style_of(image) for image in squares(self.name, outcome).numpy()]
        values = torch.tensor([[float(style == self.style)] for style in styles])
        where = outcome.media.device if isinstance(outcome.media, Tensor) else "cpu"
        return RewardSignal(self.name, values.to(where), details=[{"style": style} for style in styles])
