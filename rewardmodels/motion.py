"""How things move in a video, without weights: how much, how smoothly, which way, and whether at all.

Dense optical flow by Lucas and Kanade (1981) on an image pyramid, weighed by where there is anything to see,
stands for what moves. A frozen video is the usual way to please judges of single frames: `static` says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.records import Outcome, RewardSignal, Unit
from mmalign.rewardmodels.inputs import extras, frames, of_frames, texts
from mmalign.rewardmodels.statistics import LUMA

Measure = Literal["amount", "smoothness", "direction"]
Grain = Literal["sample", "frame"]
WAYS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "upward": (0.0, -1.0),
    "upwards": (0.0, -1.0),
    "down": (0.0, 1.0),
    "downward": (0.0, 1.0),
    "downwards": (0.0, 1.0),
}
SMALLEST = 8  # pixels along the shorter side of the coarsest picture of the pyramid
WINDOW, ROUNDS = 5, 4  # pixels along a side of the window that moves as one; improvements at each size
FLAT = 1e-5  # gradient energy below which a place says nothing of motion
SUBPIXEL = 0.02  # pixels a frame below which nothing is seen to move


@dataclass(frozen=True)
class Motion:
    """Motion between the frames of a video, from 0 to 1; its direction from -1 to 1."""

    # amount: `enough` motion or more is 1; smoothness: 1 where the speed never changes; direction: cosine to
    # the way that the prompt names (left, right, up, down), or to the `direction` [x, y] that it brings along
    measure: Measure = "amount"
    grain: Grain = "sample"  # frame: each has its own verdict, on the step that leads to it
    enough: float = 0.02  # motion of what moves in a frame, as a share of the diagonal, that is enough
    static: float = 0.002  # below it a video counts as static
    side: int = 64  # pixels along the shorter side in which motion is measured; larger sees smaller things
    name = "motion"

    def __post_init__(self) -> None:
        for setting, value, known in (("measure", self.measure, Measure), ("grain", self.grain, Grain)):
            if value not in get_args(known):
                raise ValueError(
                    f"motion: {setting} must be one of {', '.join(get_args(known))}, got {value!r}"
                )
        if not 0 < self.static < self.enough:
            raise ValueError(f"motion: 0 < static < enough is needed, got {self.static}, {self.enough}")
        if self.side < 2 * SMALLEST:
            raise ValueError(f"motion: side must be at least {2 * SMALLEST}, got {self.side}")

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        videos = frames(self.name, outcome)
        if videos.shape[1] < 2:
            raise ValueError("motion: one frame does not move; this reward is of videos")
        mean, speed = self.between(videos)
        values = self._values(mean, speed, outcome)
        still = speed.mean(1)
        details: list[Mapping[str, object]] = [
            {"motion": float(amount), "static": bool(amount < self.static)} for amount in still
        ]
        if self.grain == "sample":
            return RewardSignal(self.name, values.nanmean(1, keepdim=True), details=details)
        first = torch.cat([values[:, :1], values], 1)  # the first frame has the verdict of the step from it
        return RewardSignal(self.name, first, Unit.FRAME, where=of_frames(videos), details=details)

    def between(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """Mean motion [N, F - 1, 2] and mean speed [N, F - 1] of what moves, in diagonals a frame."""
        count, length, _, high, wide = videos.shape
        gray = (videos * videos.new_tensor(LUMA)[:, None, None]).sum(2, keepdim=True).flatten(0, 1)
        zoom = min(1.0, self.side / min(high, wide))
        if zoom < 1:
            size = (round(high * zoom), round(wide * zoom))
            gray = F.interpolate(gray, size, mode="bilinear", antialias=True)
        clip = gray.reshape(count, length, *gray.shape[1:])
        flow, sure = optical_flow(clip[:, :-1].flatten(0, 1), clip[:, 1:].flatten(0, 1))
        length_of = flow.norm(dim=1)
        # What stands still is not what the prompt is about: only places count that move.
        weight = sure * (length_of > SUBPIXEL)
        total = weight.flatten(1).sum(1).clamp(min=1e-9)
        seen = (weight.flatten(1).sum(1) > 0).float()
        diagonal = (gray.shape[-1] ** 2 + gray.shape[-2] ** 2) ** 0.5
        mean = (flow * weight[:, None]).flatten(2).sum(2) / total[:, None] * seen[:, None] / diagonal
        speed = (length_of * weight).flatten(1).sum(1) / total * seen / diagonal
        return mean.reshape(count, length - 1, 2), speed.reshape(count, length - 1)

    def _values(self, mean: Tensor, speed: Tensor, outcome: Outcome) -> Tensor:
        """A number for each step, [N, F - 1]."""
        moving = speed >= self.static
        if self.measure == "amount":
            return (speed / self.enough).clamp(max=1)
        if self.measure == "smoothness":
            change = (mean[:, 1:] - mean[:, :-1]).norm(dim=2)
            scale = (mean[:, 1:].norm(dim=2) + mean[:, :-1].norm(dim=2)).clamp(min=1e-9)
            smooth = 1 - (change / scale).clamp(max=1)
            smooth = torch.cat([smooth[:, :1], smooth], 1) if smooth.shape[1] else torch.ones_like(speed)
            return torch.where(moving, smooth, 0.0)  # what does not move is not smooth either
        wanted = torch.stack([way_of(*told) for told in zip(texts(outcome), extras(outcome), strict=True)])
        cosine = F.cosine_similarity(mean, wanted.to(mean)[:, None].expand_as(mean), dim=2)
        return torch.where(moving | wanted.to(mean).isnan().any(1, keepdim=True), cosine, 0.0)


def way_of(text: str, extra: Mapping[str, object]) -> Tensor:
    """The way [x, y] that a prompt asks for, y downward; NaN where it names none or several."""
    given = extra.get("direction")
    if isinstance(given, list | tuple) and len(given) == 2:
        return torch.tensor([float(given[0]), float(given[1])])
    named = {WAYS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in WAYS}
    return torch.tensor(next(iter(named)) if len(named) == 1 else (torch.nan, torch.nan))


def optical_flow(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Flow [n, 2, H, W] in pixels (x, y) from one gray picture [n, 1, H, W] to the next, and how sure it is.

    Lucas-Kanade from coarse to fine; how sure, [n, H, W], is the smaller eigenvalue of the gradients' second
    moments, by which Shi and Tomasi (1994) choose what can be tracked, with 0 where a place is flat.
    """
    levels = [(first, second)]
    while min(levels[-1][0].shape[-2:]) >= 2 * SMALLEST:
        levels.append(tuple(F.avg_pool2d(picture, 2) for picture in levels[-1]))  # type: ignore[arg-type]
    flow = first.new_zeros(len(first), 2, *levels[-1][0].shape[-2:])
    sure = first.new_zeros(len(first), *levels[-1][0].shape[-2:])
    for a, b in reversed(levels):
        if flow.shape[-2:] != a.shape[-2:]:
            flow = 2 * F.interpolate(flow, a.shape[-2:], mode="bilinear", align_corners=False)
        flow, sure = _refine(a, b, flow)
    return flow, sure


def _refine(first: Tensor, second: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    dx, dy = _slopes(first)
    xx, xy, yy = (_window(p) for p in (dx * dx, dx * dy, dy * dy))
    half, gap = (xx + yy) / 2, (((xx - yy) / 2).square() + xy.square()).sqrt()
    # An edge tells only of motion across it: a small ridge keeps the rest at what coarser pictures found.
    ridge = 0.01 * half + FLAT
    det = (xx + ridge) * (yy + ridge) - xy.square()
    for _ in range(ROUNDS):
        rest = _warped(second, flow) - first
        bx, by = _window(dx * rest), _window(dy * rest)
        step_x = -((yy + ridge) * bx - xy * by) / det
        step_y = -((xx + ridge) * by - xy * bx) / det
        flow = flow + torch.cat([step_x, step_y], 1).clamp(-1, 1)
    sure = (half - gap)[:, 0]
    return flow, torch.where(sure > FLAT, sure, 0.0)


def _slopes(picture: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return dx, dy


def _window(values: Tensor) -> Tensor:
    return F.avg_pool2d(values, WINDOW, 1, WINDOW // 2, count_include_pad=False)


def _warped(picture: Tensor, flow: Tensor) -> Tensor:
    """The picture as seen from where the flow begins: its value at each place plus flow."""
    high, wide = picture.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(high, device=picture.device), torch.arange(wide, device=picture.device), indexing="ij"
    )
    at = torch.stack([(x + flow[:, 0] + 0.5) * 2 / wide - 1, (y + flow[:, 1] + 0.5) * 2 / high - 1], -1)
    return F.grid_sample(picture, at, mode="bilinear", padding_mode="border", align_corners=False)
