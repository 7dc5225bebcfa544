"""The lab's exact verifier as a reward: how much of what the prompt asks for is on the picture.

Follows GenEval (Ghosh et al. 2023, arXiv:2310.11513), but reads the scene off the picture without a learned
detector, grades every claim, and counts what nobody asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mmalign.lab.grammar import parse
from mmalign.lab.scenes import CANVAS
from mmalign.lab.styles import READABLE, as_plain, style_of
from mmalign.lab.tasks import Task
from mmalign.lab.verifier import Verdict, score
from mmalign.records import Outcome, RewardSignal, Unit
from mmalign.rewardmodels.inputs import pictures, texts

Measure = Literal["soft", "strict", "mix"]
Grain = Literal["sample", "criterion"]
Style = Literal["plain", "pastel", "night", "striped", "any"]


@dataclass(frozen=True)
class LabVerifier:
    """Whether a picture of the lab shows what its prompt asks for, from 0 to 1, exactly verified.

    A prompt that is not in the language of the lab gets no verdict; its details say why.
    """

    measure: Measure = "soft"  # soft: share of the claims that hold; strict: 1 or 0; mix: mean of both
    grain: Grain = "sample"  # criterion: one unit a claim, the first of them "nothing else is there"
    style: Style = "plain"  # that pictures are read in; any: in the one that each seems to be in
    name = "lab"

    def __post_init__(self) -> None:
        for setting, known in (("measure", Measure), ("grain", Grain), ("style", Style)):
            if (value := getattr(self, setting)) not in get_args(known):
                raise ValueError(f"lab: {setting} must be one of {', '.join(get_args(known))}, got {value!r}")

    def __call__(self, outcome: Outcome) -> RewardSignal:
        images = squares(self.name, outcome)
        tasks = [task_of(text) for text in texts(outcome)]
        verdicts = [
            score(self.seen(image), task) if isinstance(task, Task) else task
            for image, task in zip(images.numpy(), tasks, strict=True)
        ]
        rows = [[] if isinstance(verdict, str) else self.units(verdict) for verdict in verdicts]
        values = torch.full((len(rows), max(1, *map(len, rows))), torch.nan)
        for row, units in zip(values, rows, strict=True):
            row[: len(units)] = torch.tensor(units)
        return RewardSignal(
            self.name,
            values.to(outcome.media.device) if isinstance(outcome.media, Tensor) else values,
            Unit.SAMPLE if self.grain == "sample" else Unit.CRITERION,
            details=[detail(verdict) for verdict in verdicts],
        )

    def seen(self, image: np.ndarray) -> np.ndarray:
        """The picture [3, H, W] as the verifier reads it, which knows the plain style alone."""
        style = style_of(image) if self.style == "any" else self.style
        if style == "plain" or style not in READABLE:
            return image
        return as_plain(image, style).transpose(2, 0, 1)

    def units(self, verdict: Verdict) -> list[float]:
        """One number, or one a claim of the prompt; equal prompts have the same claims in the same order."""
        if self.grain == "sample":
            return [measured(verdict.soft, self.measure)]
        shares = [verdict.purity, *(check.value for check in verdict.checks)]
        return [measured(share, self.measure) for share in shares]


def squares(name: str, outcome: Outcome) -> Tensor:
    """Pictures [B, 3, S, S] on the CPU, S a multiple of the canvas; ValueError names the reward."""
    images: Tensor = pictures(name, outcome, "cpu")
    height, width = images.shape[-2:]
    if height != width or height % CANVAS:
        raise ValueError(
            f"{name}: pictures must be square with a side that is a multiple of {CANVAS}, got "
            f"{height} x {width}; draw them at {CANVAS} x {CANVAS}"
        )
    return images


def measured(share: float, measure: Measure) -> float:
    """A share in [0, 1] as it is (soft), as 1 only where it is whole (strict), or the mean of both (mix)."""
    whole = float(share == 1)
    return {"soft": share, "strict": whole, "mix": (share + whole) / 2}[measure]


@lru_cache(maxsize=65536)
def task_of(prompt: str) -> Task | str:
    """What a prompt asks for, or why that cannot be said."""
    try:
        return parse(prompt)
    except ValueError as error:
        return str(error)


def detail(verdict: Verdict | str) -> Mapping[str, object]:
    """What the logs and galleries are told about one picture."""
    if isinstance(verdict, str):
        return {"missing": verdict}
    return {
        "strict": verdict.strict,
        "soft": verdict.soft,
        "category": verdict.category,
        "extras": verdict.extras,
        "checks": [(check.claim, check.value) for check in verdict.checks],
    }
