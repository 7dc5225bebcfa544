"""Whether subjects of a video stay who they are: followed by a tracker, and compared with how they began.

    R = gate * presence * (0.5 identity + 0.3 cycle + 0.2 size)

    presence    share of the frames in which the subject is seen                        vanishing lowers it
    identity    mean cosine of its features with those of its first frame, or of a reference       swaps
    cycle       overlap of its first mask with where it ends that is tracked back from its last frame, without
                searching: one that leaps to another place is not found                           teleports
    size        exp(-std of log area)                                                             flicker
    gate        min(1, mean distance from its first place / least)                                freezing

The terms are ours, on any tracker (such as SAM 2++, arXiv:2510.18822). With several subjects R is their mean,
less how far any of them looks more like another one's beginning than its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.pictures import open_picture
from mmalign.records import Outcome, RewardSignal, Unit
from mmalign.rewardmodels.features import load_features
from mmalign.rewardmodels.inputs import extras, frames, of_frames
from mmalign.rewardmodels.trackers import TemplateTracker, Track, Tracker, box_of, standing_out

CROP = 32  # pixels along a side of a subject's picture
SMALLEST = 0.004  # share of a frame below which what stands out is no subject
WEIGHTS = {"identity": 0.5, "cycle": 0.3, "size": 0.2}
Grain = Literal["sample", "frame"]


@dataclass(frozen=True)
class Terms:
    """What is said of one subject, each in [0, 1].

    likeness: [T], of each frame, NaN where it is not seen. first, later: [D], unit features of how it began
    (or of the reference) and of the mean of the other frames.
    """

    presence: float
    identity: float
    cycle: float
    size: float
    gate: float
    likeness: Tensor
    first: Tensor
    later: Tensor

    @property
    def reward(self) -> float:
        mixed: float = sum(weight * getattr(self, name) for name, weight in WEIGHTS.items())
        return self.gate * self.presence * mixed


@dataclass(eq=False)
class Identity:
    """Whether the subjects of a video stay who they are, from 0 to 1.

    A subject is what a prompt brings along as `box`, [left, top, right, bottom] in shares of the first frame
    (or a list of them); without, the largest things that stand out there.
    """

    features: str = (
        "pixels"  # of a subject's picture; pixels, efficientnet, or an image model of transformers
    )
    tracker: str = "template"  # or the path of a class of your own, my_pkg.my_tracker:MyTracker
    subjects: int = 1  # most subjects that are followed where the prompt brings no boxes
    least: float = 0.02  # mean distance from the first place, in diagonals, that counts as motion; 0: no gate
    grain: Grain = "sample"  # frame: each frame has the likeness of its subjects there, times the rest
    name = "identity"

    def __post_init__(self) -> None:
        if self.subjects < 1 or self.least < 0:
            raise ValueError(
                f"identity: subjects must be at least 1 and least not negative, got {self.subjects}, "
                f"{self.least}"
            )
        if self.grain not in get_args(Grain):
            raise ValueError(f"identity: grain must be sample or frame, got {self.grain!r}")
        self._tracker = load_tracker(self.tracker)
        self._device = torch.device("cpu")
        self._features = self._load()

    def _load(self) -> Callable[[Tensor], Tensor]:
        return pixels if self.features == "pixels" else load_features(self.features, self._device)

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        videos = frames(self.name, outcome)
        if videos.device != self._device and self.features != "pixels":
            self._device = videos.device
            self._features = self._load()
        found = [self.terms(video, extra) for video, extra in zip(videos, extras(outcome), strict=True)]
        confused = [confusion(terms) for terms in found]
        details: list[Mapping[str, object]] = [
            _told(terms, lost) for terms, lost in zip(found, confused, strict=True)
        ]
        if self.grain == "sample":
            values = [
                _mean([one.reward for one in terms]) - lost
                for terms, lost in zip(found, confused, strict=True)
            ]
            return RewardSignal(self.name, torch.tensor(values).clamp(0, 1)[:, None], details=details)
        rows = [
            self._by_frame(terms, videos.shape[1]) - lost for terms, lost in zip(found, confused, strict=True)
        ]
        values_of = torch.stack(rows).clamp(0, 1)
        return RewardSignal(self.name, values_of, Unit.FRAME, where=of_frames(videos), details=details)

    def terms(self, video: Tensor, extra: Mapping[str, object]) -> list[Terms]:
        """What is said of each subject of a video [T, 3, H, W]; nothing where its first frame is empty."""
        starts = boxes(extra, video) or subjects_of(video[0], self.subjects)
        reference = self._reference(extra)
        return [self._of(video, start, reference) for start in starts]

    def _of(self, video: Tensor, start: Tensor, reference: Tensor | None) -> Terms:
        track = followed(self._tracker, video, start)
        if not track.visible.any():
            first = self._features(crop(video[0], start)[None].to(video.device)).cpu()[0]
            unseen = torch.full((len(video),), torch.nan)
            return Terms(0.0, 0.0, 0.0, 0.0, 0.0, unseen, F.normalize(first, dim=0), torch.zeros_like(first))
        seen = track.visible.nonzero().flatten().tolist()
        looks = self._features(
            torch.stack([crop(video[t], track.masks[t]) for t in seen]).to(video.device)
        ).cpu()
        first = looks[:1] if reference is None else reference
        likeness = torch.full((len(video),), torch.nan)
        likeness[seen] = F.cosine_similarity(looks, first).clamp(0, 1)
        areas = track.masks[seen].flatten(1).sum(1).float()
        compared = slice(1, None) if reference is None and len(seen) > 1 else slice(None)
        return Terms(
            presence=float(track.visible.float().mean()),
            identity=float(likeness[seen][compared].mean()),
            cycle=self._cycle(video, track),
            size=float((-areas.log().std(correction=0)).exp()),
            gate=self._gate(track),
            likeness=likeness,
            first=F.normalize(first[0], dim=0),
            later=F.normalize(looks[compared].mean(0), dim=0),
        )

    def _cycle(self, video: Tensor, track: Track) -> float:
        """Overlap of the first mask with where tracking back from the last one ends."""
        last = int(track.visible.nonzero()[-1])
        # Where it was out of sight in between, it may come back elsewhere: that is not held against it.
        run = last
        while run > 0 and track.visible[run - 1]:
            run -= 1
        back = self._tracker.track(video[run : last + 1].flip(0), track.masks[last], search=False)
        if not back.visible[-1]:
            return 0.0
        a, b = back.masks[-1], track.masks[run]
        return float((a & b).sum() / (a | b).sum().clamp(min=1))

    def _gate(self, track: Track) -> float:
        if not self.least:
            return 1.0
        centers = torch.stack([mask.nonzero().float().mean(0) for mask in track.masks[track.visible]])
        diagonal = (track.masks.shape[1] ** 2 + track.masks.shape[2] ** 2) ** 0.5
        away = (centers - centers[0]).norm(dim=1)[1:]
        return min(1.0, float(away.mean()) / diagonal / self.least) if len(away) else 0.0

    def _reference(self, extra: Mapping[str, object]) -> Tensor | None:
        file = extra.get("reference_image")
        if file is None:
            return None
        if not isinstance(file, str):
            raise ValueError(f'identity: it takes one "reference_image" a prompt, got {file!r}')
        import numpy as np

        picture = torch.from_numpy(np.array(open_picture(Path(file)))).permute(2, 0, 1).float() / 255
        mask = standing_out(picture)[0]
        if not mask.any():
            raise ValueError(f"identity: nothing stands out in the reference {file}")
        return self._features(crop(picture, mask)[None].to(self._device)).cpu()

    def _by_frame(self, terms: Sequence[Terms], length: int) -> Tensor:
        """What each frame says of the subjects [T]: 0 where one is not seen; other terms are of the whole."""
        rows = [
            one.gate
            * torch.where(
                one.likeness.isnan(),
                0.0,
                WEIGHTS["identity"] * one.likeness
                + WEIGHTS["cycle"] * one.cycle
                + WEIGHTS["size"] * one.size,
            )
            for one in terms
        ]
        return torch.stack(rows).mean(0) if rows else torch.zeros(length)


def confusion(terms: Sequence[Terms]) -> float:
    """How much more any subject looks like how another one began than like how it began itself; 0 or more."""
    gaps = [
        float(one.later @ other.first - one.later @ one.first)
        for one in terms
        for other in terms
        if other is not one
    ]
    return max([0.0, *gaps])


def pixels(pictures: Tensor) -> Tensor:
    """A picture as its own features, [n, 3 * H * W]."""
    return pictures.flatten(1)


def crop(frame: Tensor, mask: Tensor) -> Tensor:
    """The subject alone, [3, CROP, CROP] less a middle gray, which is also what is around it."""
    box = box_of(mask)
    shown = (frame.float().cpu() - 0.5) * mask.cpu()
    cut = shown[None, :, box.top : box.bottom, box.left : box.right]
    found: Tensor = F.interpolate(cut, (CROP, CROP), mode="bilinear", align_corners=False)[0]
    return found


def boxes(extra: Mapping[str, object], video: Tensor) -> list[Tensor]:
    """The masks [H, W] of the boxes that a prompt brings along."""
    given = extra.get("box")
    if given is None:
        return []
    rows = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    high, wide = video.shape[-2:]
    found = []
    for row in rows:
        if not (
            isinstance(row, list)
            and len(row) == 4
            and 0 <= row[0] < row[2] <= 1
            and 0 <= row[1] < row[3] <= 1
        ):
            raise ValueError(
                f'identity: a "box" is [left, top, right, bottom] in shares of the frame, got {row!r}'
            )
        left, top, right, bottom = (float(v) for v in row)
        mask = torch.zeros(high, wide, dtype=torch.bool)
        mask[
            int(top * high) : max(1, round(bottom * high)), int(left * wide) : max(1, round(right * wide))
        ] = True
        found.append(mask)
    return found


def subjects_of(frame: Tensor, most: int) -> list[Tensor]:
    """The masks [H, W] of the largest things that stand out in a frame [3, H, W], largest first."""
    import numpy as np
    from scipy import ndimage

    salient, _ = standing_out(frame.float().cpu())
    labels, count = ndimage.label(salient.numpy(), np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = [i for i in np.argsort(-areas, kind="stable") if areas[i] >= SMALLEST * salient.numel()]
    return [torch.from_numpy(labels == i + 1) for i in order[:most]]


def followed(tracker: Tracker, video: Tensor, start: Tensor) -> Track:
    """The track of a subject, which is not seen where its mask is empty, whatever a tracker says."""
    track = tracker.track(video, start)
    return Track(track.masks, track.visible & track.masks.flatten(1).any(1))


def load_tracker(name: str) -> Tracker:
    """The tracker of that name, or of that path, made without arguments."""
    if name == "template":
        return TemplateTracker()
    from mmalign.rewardmodels import find

    made = find(name)()
    if not callable(getattr(made, "track", None)):
        raise TypeError(f"{name}: a tracker has a method track(frames, start, search), see Tracker")
    return cast(Tracker, made)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _told(terms: Sequence[Terms], lost: float) -> Mapping[str, object]:
    names = ("presence", "identity", "cycle", "size", "gate")
    said: dict[str, object] = {name: _mean([getattr(one, name) for one in terms]) for name in names}
    return said | {"subjects": len(terms), "confusion": lost}
