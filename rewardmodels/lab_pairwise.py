"""A judge of pairs for the lab: it prefers the picture that shows more of what the prompt asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from mmalign.contracts import Media
from mmalign.lab.tasks import Task
from mmalign.lab.verifier import score
from mmalign.records import Outcome, Prompts
from mmalign.rewardmodels.inputs import pictures
from mmalign.rewardmodels.lab import Measure, measured, task_of


@dataclass(frozen=True)
class LabPairwise:
    """Which of two pictures of the lab its verifier scores higher; a small difference may count as a tie."""

    measure: Measure = "soft"  # soft: share of the claims that hold; strict: 1 or 0; mix: mean of both
    margin: float = 0.0  # difference that is still a tie
    both_orders: bool = True  # ask for each pair twice, either picture first
    name = "lab_pairwise"

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise ValueError(
                f"lab_pairwise: measure must be one of {', '.join(get_args(Measure))}, got {self.measure!r}"
            )
        if not 0 <= self.margin < 1:
            raise ValueError(f"lab_pairwise: margin must lie in [0, 1), got {self.margin}")

    def prefer(self, prompts: Prompts, first: Media, second: Media) -> Tensor:
        gap = self._scores(prompts, first) - self._scores(prompts, second)
        tie = gap.abs() <= self.margin
        preferred = torch.where(tie, 0.5, (gap > 0).to(gap.dtype))
        return torch.where(gap.isnan(), torch.nan, preferred)

    def _scores(self, prompts: Prompts, media: Media) -> Tensor:
        """What the verifier says of each picture, [n]; it reads a picture that appears often once."""
        images = pictures(self.name, Outcome(prompts, media), "cpu").numpy()
        known: dict[tuple[str, bytes], float] = {}
        for text, image in zip(prompts.text, images, strict=True):
            if (key := (text, image.tobytes())) not in known:
                task = task_of(text)
                known[key] = torch.nan
                if isinstance(task, Task):
                    known[key] = measured(score(image, task).soft, self.measure)
        rows = zip(prompts.text, images, strict=True)
        return torch.tensor([known[text, image.tobytes()] for text, image in rows])
