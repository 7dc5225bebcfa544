"""Rewards of single pictures on videos: any of them on each frame, and how alike neighboring frames are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.contracts import ReadsAhead, judges_alone
from mmalign.records import Outcome, Prompts, RewardSignal, Unit
from mmalign.rewardmodels.features import load_features
from mmalign.rewardmodels.inputs import frames, of_frames
from mmalign.rewardmodels.precisions import Precision, dtype_of

Grain = Literal["frame", "sample"]


@dataclass(eq=False)
class Framewise:
    """Any reward of pictures, asked about every frame of a video; it has the other one's name and range."""

    of: str  # the reward, or the path of its class
    settings: Mapping[str, Any] = field(default_factory=dict)  # its own
    every: int = 1  # asks about every so-many-th frame; those between share the verdict of the one before
    grain: Grain = "frame"  # sample: the mean over frames

    def __post_init__(self) -> None:
        from mmalign.rewardmodels import load

        if self.every < 1:
            raise ValueError(f"framewise: every must be at least 1, got {self.every}")
        if self.grain not in get_args(Grain):
            raise ValueError(f"framewise: grain must be frame or sample, got {self.grain!r}")
        inner = load(self.of, **self.settings)
        if not judges_alone(inner):
            raise ValueError(
                f"framewise: {self.of} compares pairs, and so cannot be asked about single frames"
            )
        self._inner = inner

    @property
    def name(self) -> str:
        return str(self._inner.name)

    def read_ahead(self, prompts: Prompts) -> None:
        if isinstance(self._inner, ReadsAhead):
            self._inner.read_ahead(prompts)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        videos = frames(self.name, outcome)
        asked = videos[:, :: self.every]
        count, length = asked.shape[:2]
        rows = torch.arange(count).repeat_interleave(length) // outcome.views
        whole = outcome.prompts.take(rows)
        names = torch.arange(count * length)  # each frame is a sample of its own to the reward
        found = self._inner(
            Outcome(Prompts(whole.text, whole.group, names, whole.extra), asked.flatten(0, 1))
        )
        if found.unit is not Unit.SAMPLE or found.values.shape[1] != 1:
            raise ValueError(
                f"framewise: {self.of} must give one verdict a picture, not one a {found.unit.label}"
            )
        assert found.valid is not None  # filled in by RewardSignal
        values = torch.where(found.valid, found.values, torch.nan).reshape(count, length)
        if self.grain == "sample":
            return RewardSignal(self.name, values.nanmean(1, keepdim=True))
        values = values.repeat_interleave(self.every, 1)[:, : videos.shape[1]]
        return RewardSignal(self.name, values, Unit.FRAME, where=of_frames(videos))


@dataclass(eq=False)
class TemporalConsistency:
    """How alike the frames of a video are, by the features of an image model; -1 to 1.

    Each frame is compared with the first and with the one before it, and the mean is taken of both, as VBench
    (Huang et al. 2023, arXiv:2311.17982) measures the consistency of subject and background. A frozen video
    is perfectly consistent: use it beside `motion`.
    """

    model: str = "facebook/dinov2-base"  # image model of transformers, or efficientnet
    grain: Grain = "sample"  # frame: each has its own verdict, the first that of the second
    precision: Precision = "fp32"  # of the network; bf16 or fp16 are faster on a GPU
    batch: int = 32  # frames at once; lower it for less memory
    name = "temporal_consistency"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"temporal_consistency: batch must be at least 1, got {self.batch}")
        if self.grain not in get_args(Grain):
            raise ValueError(f"temporal_consistency: grain must be frame or sample, got {self.grain!r}")
        self._dtype = dtype_of(self.name, self.precision)
        try:
            self._load(torch.device("cpu"))
        except OSError as error:
            raise ValueError(f"temporal_consistency: model {self.model} does not load: {error}") from error

    def _load(self, device: torch.device) -> None:
        self._features, self._device = load_features(self.model, device, self._dtype), device

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        videos = frames(self.name, outcome)
        if videos.shape[1] < 2:
            raise ValueError("temporal_consistency: one frame has nothing to be consistent with")
        if videos.device != self._device:  # it runs where the videos are
            self._load(videos.device)
        flat = videos.flatten(0, 1)
        seen = torch.cat([self._features(part) for part in torch.split(flat, self.batch)])
        values = consistency(F.normalize(seen, dim=1).reshape(*videos.shape[:2], -1))
        if self.grain == "sample":
            return RewardSignal(self.name, values.mean(1, keepdim=True))
        rows = torch.cat([values[:, :1], values], 1)
        return RewardSignal(self.name, rows, Unit.FRAME, where=of_frames(videos))


def consistency(features: Tensor) -> Tensor:
    """Mean cosine of each frame but the first to the first and to the one before; [N, F, D] to [N, F - 1]."""
    first = (features[:, 1:] * features[:, :1]).sum(2)
    before = (features[:, 1:] * features[:, :-1]).sum(2)
    return (first + before) / 2
