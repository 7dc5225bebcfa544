"""The exact verifier of the lab's edits as a reward: did the asked change, and did the rest stay?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mmalign.lab.captions import from_json
from mmalign.lab.edit_verifier import EditVerdict, score_edit
from mmalign.lab.edits import parse_edit
from mmalign.lab.scenes import Scene
from mmalign.records import Outcome, RewardSignal, Unit
from mmalign.rewardmodels.inputs import extras, texts
from mmalign.rewardmodels.lab import squares

Measure = Literal["soft", "strict", "change", "stay"]
Grain = Literal["sample", "criterion"]


@dataclass(frozen=True)
class LabEdit:
    """Whether an edited picture of the lab shows the asked change and keeps the rest, from 0 to 1.

    Each prompt needs the scene of its source under "scene", as mmalign/lab/edit_data.py writes it. One that
    is no instruction of the lab, or whose scene lacks what it speaks of, gets no verdict; its details say
    why.
    """

    # soft: geometric mean of change and stay, 0 for the source itself; strict: 1 or 0; change, stay: one half
    measure: Measure = "soft"
    grain: Grain = "sample"  # criterion: two units, what changed and what stayed
    name = "lab_edit"

    def __post_init__(self) -> None:
        for setting, value, known in (("measure", self.measure, Measure), ("grain", self.grain, Grain)):
            if value not in get_args(known):
                raise ValueError(
                    f"lab_edit: {setting} must be one of {', '.join(get_args(known))}, got {value!r}"
                )
        if self.grain == "criterion" and self.measure != "soft":
            raise ValueError(f"lab_edit: grain 'criterion' goes with measure 'soft', got {self.measure!r}")

    def __call__(self, outcome: Outcome) -> RewardSignal:
        images = squares(self.name, outcome)
        verdicts = [
            verdict_on(image, text, extra)
            for image, text, extra in zip(images.numpy(), texts(outcome), extras(outcome), strict=True)
        ]
        values = torch.full((len(verdicts), 2 if self.grain == "criterion" else 1), torch.nan)
        for row, verdict in zip(values, verdicts, strict=True):
            if isinstance(verdict, EditVerdict):
                row[:] = torch.tensor(self.units(verdict))
        return RewardSignal(
            self.name,
            values.to(outcome.media.device) if isinstance(outcome.media, Tensor) else values,
            Unit.SAMPLE if self.grain == "sample" else Unit.CRITERION,
            details=[detail(verdict) for verdict in verdicts],
        )

    def units(self, verdict: EditVerdict) -> list[float]:
        if self.grain == "criterion":
            return [verdict.change, verdict.stay]
        return [float(getattr(verdict, self.measure))]


def verdict_on(image: np.ndarray, instruction: str, extra: Mapping[str, object]) -> EditVerdict | str:
    """The verdict on one picture [3, H, W], or why there is none."""
    known = source_of(extra)
    if isinstance(known, str):
        return known
    try:
        return score_edit(image, known, parse_edit(instruction))
    except ValueError as error:
        return str(error)


def source_of(extra: Mapping[str, object]) -> Scene | str:
    """The scene of the source that a prompt names, or why there is none."""
    found = extra.get("scene")
    if found is None:
        return 'the prompt has no "scene" of its source; put it into its line of the prompt file'
    try:
        known = json.loads(found) if isinstance(found, str) else found
        return from_json(known)  # type: ignore[arg-type]  # what is no mapping is refused there
    except ValueError as error:
        return str(error)


def detail(verdict: EditVerdict | str) -> Mapping[str, object]:
    """What the logs and galleries are told about one picture."""
    if isinstance(verdict, str):
        return {"missing": verdict}
    return {
        "strict": verdict.strict,
        "soft": verdict.soft,
        "change": verdict.change,
        "stay": verdict.stay,
        "category": verdict.kind,
        "extras": verdict.extras,
        "checks": [(check.claim, check.value) for check in (*verdict.asked, *verdict.kept)],
    }
