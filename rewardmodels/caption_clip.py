"""CLIPScore and RefCLIPScore of captions (Hessel et al. 2021, arXiv:2104.08718, sections 3 and 3.1).

    CLIP-S     w max(cos(caption, picture), 0),   w = 2.5
    RefCLIP-S  harmonic mean of CLIP-S and of the largest max(cos(caption, reference), 0)

A caption is read behind "A photo depicts ", as the authors have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.pictures import open_picture
from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.caption_judges import captions
from mmalign.rewardmodels.caption_overlap import references_of
from mmalign.rewardmodels.clip import Towers
from mmalign.rewardmodels.inputs import extras
from mmalign.rewardmodels.precisions import Precision

WEIGHT = 2.5


@dataclass(eq=False)
class CaptionClipScore:
    """How well a caption fits its picture, 0 to 2.5; with `references` its references too, to about 1.4.

    Needs `image`, and `reference` or `references`, in the prompt line. Details hold both scores where both
    are known.
    """

    model: str = "openai/clip-vit-base-patch32"  # the authors' own; local folder or hub id
    references: bool = False  # the reward is RefCLIPScore
    before: str = "A photo depicts "  # each caption and reference
    precision: Precision = "fp32"  # of the network; bf16 or fp16 are faster on a GPU
    batch: int = 32  # pictures at once; lower it for less memory
    device: str | None = None  # where it runs; null: the accelerator, if there is one
    name = "caption_clip_score"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"caption_clip_score: batch must be at least 1, got {self.batch}")
        self._towers = Towers(self.name, self.model, None, self.precision)
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self._towers.move(torch.device(self.device or found or "cpu"))

    def __call__(self, outcome: Outcome) -> RewardSignal:
        values: list[float] = []
        details: list[Mapping[str, object]] = []
        seen: dict[str, Tensor | str] = {}  # a group shares its picture
        for caption, extra in zip(captions(self.name, outcome), extras(outcome), strict=True):
            file, known = extra.get("image"), references_of(extra)
            if isinstance(file, str) and file not in seen:
                seen[file] = self._picture(file)
            look = seen[file] if isinstance(file, str) else "the prompt line has no image"
            if isinstance(look, str) or (self.references and not known):
                values.append(torch.nan)
                reason = look if isinstance(look, str) else "the prompt line has no reference"
                details.append({"missing": reason})
                continue
            found = self._scores(caption, known, look)
            values.append(found["ref_clip_score" if self.references else "clip_score"])
            details.append(dict(found))
        return RewardSignal(self.name, torch.tensor(values)[:, None], details=details)

    @torch.no_grad()
    def _picture(self, file: str) -> Tensor | str:
        """The embedding of a picture [D], or why there is none."""
        try:
            picture = open_picture(file)
        except ValueError as error:
            return str(error)
        flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = flat.reshape(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 255
        found: Tensor = self._towers.pictures(pixels.to(self._towers.device), self.batch)[0]
        return found

    def _scores(self, caption: str, known: list[str], picture: Tensor) -> dict[str, float]:
        said, *read = self._towers.texts([f"{self.before}{text}" for text in (caption, *known)])
        found = {"clip_score": WEIGHT * max(0.0, float(said @ picture))}
        if read:
            nearest = max(0.0, float((torch.stack(read) @ said).max()))
            total = found["clip_score"] + nearest
            found["ref_clip_score"] = 2 * found["clip_score"] * nearest / total if total else 0.0
        return found
