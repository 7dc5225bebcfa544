"""GenEval (Ghosh et al. 2023, arXiv:2310.11513), on any zero-shot detector of transformers.

A prompt brings what it asks for, as the files of GenEval have it:

    {"prompt": "...", "include": [{"class": "dog", "count": 2, "color": "red", "position": ["left of", 0]}],
     "exclude": [{"class": "dog", "count": 3}]}

Of the boxes of a class the best `count` are looked at. Their color is what a CLIP says of each crop. One lies
left of another where the offset of their middles, less a tenth of the sum of their sizes along each axis, has
a direction whose part along that axis exceeds a half. More of a class than `exclude` allows is wrong. As in
GenEval, boxes count from `threshold` on, and from `counting` on where the prompt asks for a number (its
category is `counting`).

Differs from the public code in the detector (any zero-shot one, asked for the classes of the prompt alone,
where there a Mask2Former of COCO's classes looks) and in that colors are judged on whole crops, not under a
mask. So its figures are comparable with each other, not with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.clip import DTYPES, Precision, Towers
from mmalign.rewardmodels.inputs import extras, pictures

Measure = Literal["strict", "soft"]
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, direction
COUNTING = "counting"  # the category whose boxes must be surer
MOST = 16  # boxes of a class


@dataclass(frozen=True)
class Found:
    """Boxes [n, 4] (left, top, right, bottom, in pixels) and scores [n] of one class, best first."""

    boxes: Tensor
    scores: Tensor

    def best(self, least: float, count: int = MOST) -> Tensor:
        """The boxes with at least that score, at most so many."""
        return self.boxes[self.scores >= least][:count]


class Detects(Protocol):
    """Finds things by the names of their classes."""

    def __call__(self, image: Tensor, classes: Sequence[str]) -> dict[str, Found]:
        """What is found on a picture [3, H, W] in [0, 1] of each class."""
        ...


class ZeroShot:
    """A zero-shot detector of transformers: OWL-ViT, OWLv2, Grounding DINO and their like."""

    def __init__(self, model: str, precision: Precision, least: float, overlap: float) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        try:
            self._processor: Any = AutoProcessor.from_pretrained(model)
            self._model: Any = AutoModelForZeroShotObjectDetection.from_pretrained(
                model, dtype=DTYPES[precision]
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"geneval: model {model} does not load as a detector: {error}") from error
        self._model.eval().requires_grad_(False)
        self._least, self._overlap = least, overlap
        # Models of the DINO kind read one sentence; a class at a time, none can be taken for another.
        self._sentence = "dino" in self._model.config.model_type

    @torch.no_grad()
    def __call__(self, image: Tensor, classes: Sequence[str]) -> dict[str, Found]:
        self._model.to(image.device)
        return {name: self._one(image, name) for name in classes}

    def _one(self, image: Tensor, name: str) -> Found:
        asked = f"{name}." if self._sentence else f"a photo of a {name}"
        pixels = (image.clamp(0, 1) * 255).round().byte().cpu()
        inputs = self._processor(
            text=[asked if self._sentence else [asked]], images=[pixels], return_tensors="pt"
        ).to(image.device)
        out = self._model(
            **{k: v.to(self._model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        )
        settings: dict[str, Any] = {"threshold": self._least, "target_sizes": [tuple(image.shape[-2:])]}
        if self._sentence:
            settings |= {"input_ids": inputs["input_ids"], "text_threshold": 0.0}
        (told,) = self._processor.post_process_grounded_object_detection(out, **settings)
        boxes, scores = told["boxes"].float().cpu(), told["scores"].float().cpu()
        kept = apart(boxes, scores, self._overlap)[:MOST]
        return Found(boxes[kept], scores[kept])


@dataclass(eq=False)
class GenEval:
    """Whether a picture holds what its prompt asks for, by a detector: 1 or 0, or how much of it does.

    soft: the mean over what is asked of the share that is there: of each class by number, of its colors, of
    its places; 0 for what `exclude` forbids and is there. Details tell `strict`, `soft`, the category and
    what is wrong. A prompt without `include` has no verdict.
    """

    model: str = "google/owlv2-base-patch16-ensemble"  # any zero-shot detector; local folder or hub id
    clip: str = "openai/clip-vit-large-patch14"  # that names colors
    measure: Measure = "strict"  # strict: 1 where all holds, else 0; soft: the mean share of what is asked
    threshold: float = 0.3  # score from which a box counts
    counting: float = 0.9  # where a number is asked for; lower it for detectors that are never so sure
    overlap: float = 0.7  # of two boxes of a class that overlap by more, the surer counts
    precision: Precision = "fp32"  # of both networks; bf16 or fp16 are faster on a GPU
    name = "geneval"

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise ValueError(f"geneval: measure must be one of strict, soft, got {self.measure!r}")
        for setting in ("threshold", "counting", "overlap"):
            if not 0 <= getattr(self, setting) <= 1:
                raise ValueError(f"geneval: {setting} must lie in [0, 1], got {getattr(self, setting)}")
        if self.precision not in DTYPES:
            raise ValueError(f"geneval: precision must be one of {', '.join(DTYPES)}, got {self.precision!r}")
        least = min(self.threshold, self.counting)
        self.detects: Detects = ZeroShot(self.model, self.precision, least, self.overlap)
        self._towers = Towers(self.name, self.clip, None, self.precision)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        images = pictures(self.name, outcome)
        values: list[float] = []
        details: list[Mapping[str, object]] = []
        for image, extra in zip(images, extras(outcome), strict=True):
            asked = extra.get("include")
            if not isinstance(asked, list) or not asked:
                values.append(torch.nan)
                details.append({"missing": "the prompt line has no include, what is asked for"})
                continue
            soft, wrong = self._judge(image, asked, extra)
            found = {"strict": float(not wrong), "soft": soft}
            values.append(found[self.measure])
            details.append({**found, "category": str(extra.get("category") or ""), "wrong": wrong})
        return RewardSignal(self.name, torch.tensor(values, device=images.device)[:, None], details=details)

    def _judge(
        self, image: Tensor, include: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]
    ) -> tuple[float, list[str]]:
        """The soft score of a picture, and what is wrong with it."""
        exclude: Sequence[Mapping[str, Any]] = extra.get("exclude") or []
        classes = list(dict.fromkeys(str(one["class"]) for one in (*include, *exclude)))
        found = self.detects(image, classes)
        least = self.counting if extra.get("category") == COUNTING else self.threshold
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
        for one in exclude:
            there = len(found[str(one["class"])].best(least))
            if there >= int(one.get("count", 1)):
                claim(0.0, f"{one['class']}: {there}, too many")
        return sum(shares) / len(shares), wrong

    @torch.no_grad()
    def _color(self, image: Tensor, box: Tensor, name: str) -> str:
        """What CLIP calls the color of what lies in a box."""
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


def apart(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Places of the boxes that overlap no surer one by more, best first (non-maximum suppression)."""
    order = scores.argsort(descending=True, stable=True)
    kept: list[int] = []
    for place in order.tolist():
        if all(overlapping(boxes[place], boxes[other]) <= overlap for other in kept):
            kept.append(place)
    return torch.tensor(kept, dtype=torch.int64)


def overlapping(one: Tensor, other: Tensor) -> float:
    """Area that two boxes share over that of both (intersection over union)."""
    shared = (torch.minimum(one[2:], other[2:]) - torch.maximum(one[:2], other[:2])).clamp(min=0).prod()
    both = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared
    return float(shared / both) if both > 0 else 0.0


def relations(one: Tensor, other: Tensor, slack: float = 0.1) -> set[str]:
    """How the first box lies to the second, as GenEval has it: none, one or two of `RELATIONS`."""
    middles = (one[:2] + one[2:]) / 2 - (other[:2] + other[2:]) / 2
    sizes = (one[2:] - one[:2]) + (other[2:] - other[:2])
    beyond = (middles.abs() - slack * sizes).clamp(min=0) * middles.sign()
    if not beyond.any():
        return set()
    direction = beyond / middles.norm()
    return {name for name, (axis, side) in RELATIONS.items() if side * float(direction[axis]) > 0.5}
