"""Trackers: where a subject is in each frame of a video. One is built in; others fit the same contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

GROUND = 0.15  # distance in RGB from the ground from which a pixel is part of something
PLAIN = 0.08  # standard deviation of the pixels along the border up to which a ground is plain


@dataclass(frozen=True)
class Track:
    """masks: [T, H, W] bool, where the subject is; visible: [T] bool, False where it is not seen."""

    masks: Tensor
    visible: Tensor

    def __post_init__(self) -> None:
        if self.masks.ndim != 3 or self.masks.dtype != torch.bool:
            raise ValueError(
                f"a track's masks must be bool [T, H, W], got {self.masks.dtype} {tuple(self.masks.shape)}"
            )
        if self.visible.shape != self.masks.shape[:1] or self.visible.dtype != torch.bool:
            raise ValueError(
                f"a track says of each frame whether it is visible, bool [{len(self.masks)}], got "
                f"{self.visible.dtype} {tuple(self.visible.shape)}"
            )


class Tracker(Protocol):
    """Follows one subject.

    frames: [T, 3, H, W] in [0, 1]; start: bool [H, W], the subject in the first of them. search: whether a
    subject that was lost is looked for in the whole frame; without, only where it can have gone.
    """

    def track(self, frames: Tensor, start: Tensor, search: bool = True) -> Track: ...


@dataclass(frozen=True)
class TemplateTracker:
    """Follows a subject by its looks: normalized cross-correlation with its last picture, near its last
    place; then whatever stands out there, in case it changed its looks; then its first picture anywhere.

    Small and exact on plain grounds, where masks are all that differs from the ground; elsewhere the first
    mask is moved along.
    """

    reach: float = 0.12  # how far a subject gets in a frame, as a share of the longer side
    like: float = 0.6  # correlation from which it is the subject
    found: float = 0.75  # correlation from which a lost one is found again elsewhere

    def track(self, frames: Tensor, start: Tensor, search: bool = True) -> Track:
        length, _, high, wide = frames.shape
        masks = torch.zeros(length, high, wide, dtype=torch.bool)
        visible = torch.zeros(length, dtype=torch.bool)
        if not start.any():
            return Track(masks, visible)
        frames, start = frames.float().cpu(), start.cpu()
        salient, plain = standing_out(frames[0])
        if plain and bool((salient & start).any()):  # a box is more than the subject in it
            start = salient & start
        masks[0], visible[0] = start, True
        box = box_of(start, margin=1)
        first = last = frames[0, :, box.top : box.bottom, box.left : box.right]
        origin = place = torch.tensor([box.top, box.left])
        reach = max(1, round(self.reach * max(high, wide)))
        lost = 0
        for t in range(1, length):
            salient, plain = standing_out(frames[t])
            near = correlation(frames[t], last)
            far = torch.ones_like(near, dtype=torch.bool)
            top, left = place.tolist()
            far[max(0, top - reach) : top + reach + 1, max(0, left - reach) : left + reach + 1] = False
            local = near.masked_fill(far, -1)
            spot = None
            if local.numel() and float(local.max()) >= self.like and not lost:
                spot = _spot(local)
            elif (
                not lost
                and plain
                and (seen := _piece(salient, place, first.shape[1:], reach, int(start.sum()))) is not None
            ):
                spot = seen
            elif search:
                anywhere = correlation(frames[t], first)
                if float(anywhere.max()) >= self.found:
                    spot = _spot(anywhere)
            lost = 0 if spot is not None else lost + 1
            if spot is None:
                continue
            place, visible[t] = spot, True
            top, left = place.tolist()
            last = frames[t, :, top : top + first.shape[1], left : left + first.shape[2]]
            moved = torch.roll(start, (place - origin).tolist(), (0, 1))
            if plain:
                inside = torch.zeros_like(moved)
                inside[
                    max(0, top - 1) : top + first.shape[1] + 1, max(0, left - 1) : left + first.shape[2] + 1
                ] = True
                moved = salient & inside if bool((salient & inside).any()) else moved
            masks[t] = moved
        return Track(masks, visible)


@dataclass(frozen=True)
class Box:
    top: int
    bottom: int
    left: int
    right: int


def box_of(mask: Tensor, margin: int = 0) -> Box:
    """The smallest box around a mask [H, W] that is not empty, wider by a margin where there is room."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    high, wide = mask.shape
    return Box(
        max(0, int(rows[0]) - margin),
        min(high, int(rows[-1]) + 1 + margin),
        max(0, int(columns[0]) - margin),
        min(wide, int(columns[-1]) + 1 + margin),
    )


def standing_out(frame: Tensor) -> tuple[Tensor, bool]:
    """What differs from the ground of a frame [3, H, W], bool [H, W], and whether that ground is plain."""
    border = torch.cat([frame[:, 0], frame[:, -1], frame[:, :, 0], frame[:, :, -1]], 1)
    ground = border.median(1).values
    plain = bool((border - ground[:, None]).abs().median() < PLAIN)
    return (frame - ground[:, None, None]).norm(dim=0) > GROUND, plain


def correlation(frame: Tensor, template: Tensor) -> Tensor:
    """Normalized cross-correlation in [-1, 1] of a frame [3, H, W] with a template at each of its places."""
    size = template.shape[1] * template.shape[2] * 3
    zero = template - template.mean()
    ones = torch.ones_like(template)[None]
    raw = F.conv2d(frame[None], zero[None])[0, 0]
    mean = F.conv2d(frame[None], ones)[0, 0] / size
    square = F.conv2d(frame[None].square(), ones)[0, 0] / size
    spread = (square - mean.square()).clamp(min=0).sqrt() * size**0.5
    scale = spread * zero.norm()
    found: Tensor = torch.where(scale > 1e-4, raw / scale.clamp(min=1e-4), 0.0)
    return found


def _spot(scores: Tensor) -> Tensor:
    at = int(scores.argmax())
    return torch.tensor([at // scores.shape[1], at % scores.shape[1]])


def _piece(salient: Tensor, place: Tensor, size: torch.Size, reach: int, area: int) -> Tensor | None:
    """The place of what stands out near a place, if it is about as large as the subject and within reach."""
    high, wide = salient.shape
    top, left = place.tolist()
    window = torch.zeros_like(salient)
    window[max(0, top - reach) : top + size[0] + reach, max(0, left - reach) : left + size[1] + reach] = True
    seen = salient & window
    if int(seen.sum()) < area / 2:
        return None
    middle = seen.nonzero().float().mean(0)
    corner = (middle - torch.tensor([size[0] / 2 - 0.5, size[1] / 2 - 0.5])).round().long()
    if int((corner - place).abs().max()) > reach:  # the edge of what leapt further than it can have gone
        return None
    return torch.stack([corner[0].clamp(0, high - size[0]), corner[1].clamp(0, wide - size[1])])
