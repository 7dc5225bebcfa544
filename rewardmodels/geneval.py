"""GenEval (Ghosh et al. 2023, arXiv:2310.11513), on any zero-shot detector of transformers or one of COCO.

A prompt brings what it asks for, as the files of GenEval have it:

    {"prompt": "...", "include": [{"class": "dog", "count": 2, "color": "red", "position": ["left of", 0]}],
     "exclude": [{"class": "dog", "count": 3}]}

Of the boxes of a class the best `count` are looked at. Their color is what a CLIP says of each crop. One lies
left of another where the offset of their middles, less a tenth of the sum of their sizes along each axis, has
a direction whose part along that axis exceeds a half. More of a class than `exclude` allows is wrong. As in
GenEval, boxes count from `threshold` on, and from `counting` on where the prompt asks for a number (its
`tag`, as GenEval's files call it, or its `category` is `counting`).

Differs from the public code in the detector (one of detectors.py, asked for the classes of the prompt alone,
where there a Mask2Former of COCO's classes looks) and in that colors are judged on whole crops, not under a
mask. So its figures are comparable with each other, not with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.clip import Towers
from mmalign.rewardmodels.detectors import Detects, load_detector
from mmalign.rewardmodels.inputs import extras, pictures
from mmalign.rewardmodels.precisions import Precision, dtype_of

Measure = Literal["strict", "soft"]
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, direction
COUNTING = "counting"  # the category whose boxes must be surer


@dataclass(eq=False)
class GenEval:
    """Whether a picture holds what its prompt asks for, by a detector: 1 or 0, or how much of it does.

    soft: the mean over what is asked of the share that is there: of each class by number, of its colors, of
    its places; 0 for what `exclude` forbids and is there. Details tell `strict`, `soft`, the category and
    what is wrong. A prompt without `include` has no verdict, nor has one that names a class which the
    detector does not know.
    """

    # Any zero-shot detector, local folder or hub id; or the folder of the COCO detector that
    # scripts/fetch_assets.py brings, which knows 80 classes and needs no hub.
    model: str = "google/owlv2-base-patch16-ensemble"
    clip: str | None = "openai/clip-vit-large-patch14"  # that names colors; null: asked for one, no verdict
    measure: Measure = "strict"  # strict: 1 where all holds, else 0; soft: the mean share of what is asked
    threshold: float = 0.3  # score from which a box counts
    # Where a number is asked for; null: 0.9 for zero-shot detectors (lower it for those that are never so
    # sure), 0.3 for the COCO detector, and never less than `threshold`.
    counting: float | None = None
    # Of two boxes of a class that overlap by more, the surer counts; null: 0.7, 0.5 for the COCO detector.
    overlap: float | None = None
    precision: Precision = "fp32"  # of both networks; bf16 or fp16 are faster on a GPU
    name = "geneval"

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise ValueError(f"geneval: measure must be one of strict, soft, got {self.measure!r}")
        for setting in ("threshold", "counting", "overlap"):
            if (value := getattr(self, setting)) is not None and not 0 <= value <= 1:
                raise ValueError(f"geneval: {setting} must lie in [0, 1], got {value}")
        dtype_of(self.name, self.precision)
        least = self.threshold if self.counting is None else min(self.threshold, self.counting)
        self.detects: Detects = load_detector(self.model, self.precision, least, self.overlap)
        self._counting = max(self.threshold, self.detects.sure) if self.counting is None else self.counting
        self._towers = Towers(self.name, self.clip, None, self.precision) if self.clip else None

    def __call__(self, outcome: Outcome) -> RewardSignal:
        images = pictures(self.name, outcome)
        values: list[float] = []
        details: list[Mapping[str, object]] = []
        for image, extra in zip(images, extras(outcome), strict=True):
            asked: Any = extra.get("include")
            if reason := self._objection(asked, extra):
                values.append(torch.nan)
                details.append({"missing": reason})
                continue
            soft, wrong = self._judge(image, asked, extra)
            found = {"strict": float(not wrong), "soft": soft}
            values.append(found[self.measure])
            details.append({**found, "category": category(extra), "wrong": wrong})
        return RewardSignal(self.name, torch.tensor(values, device=images.device)[:, None], details=details)

    def _objection(self, include: Any, extra: Mapping[str, Any]) -> str | None:
        """Why there can be no verdict; None where there can."""
        if not isinstance(include, list) or not include:
            return "the prompt line has no include, what is asked for"
        if fault := malformed(include, extra.get("exclude") or []):
            return fault
        if self._towers is None and any(one.get("color") for one in include):
            return "the prompt asks for a color, and no CLIP is there to name one: set clip"
        strange: str | None = self.detects.objection(classes(include, extra))
        return strange

    def _judge(
        self, image: Tensor, include: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]
    ) -> tuple[float, list[str]]:
        """The soft score of a picture, and what is wrong with it."""
        found = self.detects(image, classes(include, extra))
        least = self._counting if category(extra) == COUNTING else self.threshold
        groups = [found[str(one["class"])].best(least, int(one.get("count", 1))) for one in include]
        shares: list[float] = []
        wrong: list[str] = []

        def claim(share: float, said: str) -> None:
            shares.append(share)
            if share < 1:
                wrong.append(said)

        for one, boxes in zip(include, groups, strict=True):
            count, name = int(one.get("count", 1)), str(one["class"])
            claim(len(boxes) / count, f"{name}: {len(boxes)} of {count}")
            if color := one.get("color"):
                right = sum(self._color(image, box, name) == color for box in boxes)
                claim(right / count, f"{name}: {right} of {count} {color}")
            if place := one.get("position"):
                relation, other = str(place[0]), groups[int(place[1])]
                holds = [relation in relations(a, b) for a in boxes for b in other]
                claim(
                    sum(holds) / max(1, len(holds)),
                    f"{name}: not {relation} {include[int(place[1])]['class']}",
                )
        for one in extra.get("exclude") or []:
            there = len(found[str(one["class"])].best(least))
            if there >= int(one.get("count", 1)):
                claim(0.0, f"{one['class']}: {there}, too many")
        return sum(shares) / len(shares), wrong

    @torch.no_grad()
    def _color(self, image: Tensor, box: Tensor, name: str) -> str:
        """What CLIP calls the color of what lies in a box."""
        assert self._towers is not None  # without it a prompt that asks for a color has no verdict
        height, width = image.shape[-2:]
        left, top = (int(side.floor().clamp(min=0)) for side in box[:2])
        right = max(left + 1, min(width, int(box[2].ceil())))
        bottom = max(top + 1, min(height, int(box[3].ceil())))
        self._towers.move(image.device)
        seen = self._towers.pictures(
            image[None, :, min(top, height - 1) : bottom, min(left, width - 1) : right], 1
        )
        read = self._towers.texts([f"a photo of a {color} {name}" for color in COLORS])
        return COLORS[int((read @ seen[0]).argmax())]


def malformed(include: Sequence[Any], exclude: Sequence[Any]) -> str | None:
    """What of a prompt line cannot be judged; None where all can."""
    for one in (*include, *exclude):
        if not isinstance(one, Mapping) or not one.get("class"):
            return f"what is asked for needs a class, got {one}"
        if int(one.get("count", 1)) < 1:
            return f"{one['class']}: count must be at least 1, got {one['count']}; or exclude it"
        relation, other = one.get("position") or (next(iter(RELATIONS)), 0)
        if relation not in RELATIONS or not 0 <= int(other) < len(include):
            return (
                f"{one['class']}: position must be one of {', '.join(RELATIONS)} and the place of another in "
                f"include, got {one['position']}"
            )
    return None


def classes(include: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> list[str]:
    """Names of what is asked for or forbidden, each once."""
    return list(dict.fromkeys(str(one["class"]) for one in (*include, *(extra.get("exclude") or []))))


def category(extra: Mapping[str, Any]) -> str:
    """What kind of prompt it is."""
    return str(extra.get("category") or extra.get("tag") or "")


def relations(one: Tensor, other: Tensor, slack: float = 0.1) -> set[str]:
    """How the first box lies to the second, as GenEval has it: none, one or two of `RELATIONS`."""
    middles = (one[:2] + one[2:]) / 2 - (other[:2] + other[2:]) / 2
    sizes = (one[2:] - one[:2]) + (other[2:] - other[:2])
    beyond = (middles.abs() - slack * sizes).clamp(min=0) * middles.sign()
    if not beyond.any():
        return set()
    direction = beyond / middles.norm()
    return {name for name, (axis, side) in RELATIONS.items() if side * float(direction[axis]) > 0.5}
