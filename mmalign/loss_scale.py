"""Losses scaled up where their gradient is computed in fp16, in which what is below 6e-8 is zero.

Micikevicius et al. 2018 (arXiv:1710.03740, 3.2): the gradient of s times the loss is computed and divided by
s in fp32; where it left the range of fp16, no step is made. A sample of many numbers gives each a small part
of a gradient that is already shared out to all samples of an update, so that without s most of it is lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from mmalign.copies import local

FLOOR = 1.0  # of the scale: what is not finite without any is no matter of scale
CEILING = 2.0**32  # nor is what is zero even so


@dataclass
class LossScale:
    """The factor of the loss: halved by a gradient that is not finite, doubled after `patience` good steps.

    Until its first overflow it doubles after every step: how small the parts of a gradient are depends on
    samples, steps and their size, and there are few updates to find out. From then on it moves as that of
    torch.amp.GradScaler does, but between floor and ceiling, and by what all ranks have found, where that one
    looks at what a rank holds. Powers of 2 change nothing but what lies outside of fp16's range.
    """

    value: float = 2.0**16
    patience: int = 2000
    good: int = 0  # steps since it last changed
    overflows: int = 0  # updates that were left out for it, so far

    def rise(self) -> None:
        """Take in a step that was made."""
        self.good += 1
        if self.good >= (self.patience if self.overflows else 1):
            self.value, self.good = min(2 * self.value, CEILING), 0

    def fall(self) -> bool:
        """Take in a gradient that is not finite; False where no smaller scale could mend it."""
        self.good = 0
        if self.value <= FLOOR:
            return False
        self.value, self.overflows = self.value / 2, self.overflows + 1
        return True

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "good": self.good, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self.good = float(state["value"]), int(state["good"])
        self.overflows = int(state["overflows"])


@torch.no_grad()
def unscale(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Divide the gradient by what the loss was multiplied with; on each rank the part that it holds."""
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).div_(factor)
