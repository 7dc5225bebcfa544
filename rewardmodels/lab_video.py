"""The exact verifier of the lab's clips as a reward: how much of what the prompt asks for happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch

from mmalign.lab.clip_verifier import ClipVerdict, score_clip
from mmalign.lab.clips import ClipTask, parse_clip
from mmalign.records import Outcome, RewardSignal, Unit
from mmalign.rewardmodels.inputs import frames, of_frames, texts

Measure = Literal["soft", "strict", "direction"]
Grain = Literal["sample", "frame"]


@dataclass(frozen=True)
class LabVideo:
    """Whether a clip of the lab shows what its prompt asks for, from 0 to 1, exactly verified.

    A prompt that is not in the language of clips gets no verdict, nor does one that asks for no move where
    `direction` is measured.
    """

    measure: Measure = (
        "soft"  # soft: share that holds; strict: 1 or 0; direction: share of moves led as asked
    )
    grain: Grain = "sample"  # frame: each frame has its own verdict (of soft)
    name = "lab_video"

    def __post_init__(self) -> None:
        for setting, value, known in (("measure", self.measure, Measure), ("grain", self.grain, Grain)):
            if value not in get_args(known):
                raise ValueError(
                    f"lab_video: {setting} must be one of {', '.join(get_args(known))}, got {value!r}"
                )
        if self.grain == "frame" and self.measure != "soft":
            raise ValueError(f"lab_video: grain 'frame' goes with measure 'soft', got {self.measure!r}")

    def __call__(self, outcome: Outcome) -> RewardSignal:
        clips = frames(self.name, outcome, "cpu")
        tasks = [task_of(text) for text in texts(outcome)]
        verdicts = [
            score_clip(clip, task) if isinstance(task, ClipTask) else task
            for clip, task in zip(clips, tasks, strict=True)
        ]
        length = clips.shape[1] if self.grain == "frame" else 1
        values = torch.full((len(verdicts), length), torch.nan)
        for row, verdict in zip(values, verdicts, strict=True):
            if isinstance(verdict, ClipVerdict):
                row[:] = torch.tensor(self.units(verdict))
        details: list[Mapping[str, object]] = [detail(verdict) for verdict in verdicts]
        if self.grain == "frame":
            return RewardSignal(self.name, values, Unit.FRAME, where=of_frames(clips), details=details)
        return RewardSignal(self.name, values, details=details)

    def units(self, verdict: ClipVerdict) -> list[float]:
        """One number, or one a frame."""
        if self.grain == "frame":
            return list(verdict.frames)
        if self.measure == "direction":
            return [torch.nan if verdict.direction is None else verdict.direction]
        return [float(verdict.strict) if self.measure == "strict" else verdict.soft]


@lru_cache(maxsize=65536)
def task_of(prompt: str) -> ClipTask | str:
    """What a prompt asks for, or why that cannot be said."""
    try:
        return parse_clip(prompt)
    except ValueError as error:
        return str(error)


def detail(verdict: ClipVerdict | str) -> dict[str, object]:
    """What the logs and galleries are told about one clip."""
    if isinstance(verdict, str):
        return {"missing": verdict}
    told: dict[str, object] = {
        "strict": verdict.strict,
        "soft": verdict.soft,
        "category": verdict.category,
        "static": verdict.static,
        "extras": sum(verdict.extras),
    }
    return told if verdict.direction is None else told | {"direction": verdict.direction}
