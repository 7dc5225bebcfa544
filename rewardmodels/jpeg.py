"""File size as a reward, from DDPO (Black et al. 2023, arXiv:2305.13301).

A real JPEG file is written, as in the paper: quality 95, size in kilobytes of 1000 bytes. It needs no weights
and does not read the prompt: good for the first run of a new model, and the easiest of all to hack.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.inputs import frames


@dataclass(frozen=True)
class JpegIncompressibility:
    """Size of a picture as a JPEG file in kilobytes, so that details and noise are rewarded."""

    quality: int = 95  # 95 is the paper's; lower it to be blind to faint noise
    name = "jpeg_incompressibility"

    def __post_init__(self) -> None:
        check_quality(self.name, self.quality)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, kilobytes(frames(self.name, outcome), self.quality)[:, None])


@dataclass(frozen=True)
class JpegCompressibility:
    """Minus the size of a picture as a JPEG file in kilobytes, so that empty pictures are rewarded."""

    quality: int = 95  # 95 is the paper's; lower it to be blind to faint noise
    name = "jpeg_compressibility"

    def __post_init__(self) -> None:
        check_quality(self.name, self.quality)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, -kilobytes(frames(self.name, outcome), self.quality)[:, None])


def kilobytes(videos: Tensor, quality: int) -> Tensor:
    """Mean size of the frames [B, F, 3, H, W] as JPEG files, in thousands of bytes: [B], where they are."""
    pixels = (videos * 255).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()
    sizes = [sum(_size(Image.fromarray(frame), quality) for frame in video) / len(video) for video in pixels]
    return torch.tensor(sizes, device=videos.device) / 1000


def _size(picture: Image.Image, quality: int) -> int:
    file = BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.tell()


def check_quality(name: str, quality: int) -> None:
    if not 1 <= quality <= 95:
        raise ValueError(f"{name}: quality must lie in 1..95, got {quality}")
