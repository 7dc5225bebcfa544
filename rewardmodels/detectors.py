"""What finds things on pictures by the names of their classes.

ZeroShot    any words: OWL-ViT, OWLv2, Grounding DINO, by transformers
CenterNet   the 80 classes of COCO on photographs: Objects as Points (Zhou et al. 2019, arXiv:1904.07850) on a
            MobileNetV3, 4 MB (`scripts/fetch_assets.py detector`; 0.251 mAP on COCO's val2017, as its author
            measured, github.com/610265158/mobilenetv3_centernet)

CenterNet's peaks of a class are its things: a place (x, y) of the heat map Y of the class that no neighbor
exceeds, of score Y, with the distances (l, t, r, b) to the sides that the network tells there:

    box = (4x - l, 4y - t, 4x + r, 4y + b)

The paper tells a size, and how far the middle lies off its place; this network tells four distances. The
paper suppresses no boxes that overlap; this network finds large things at several peaks, and needs it. Where
its own graph keeps the best 100 peaks over all classes, here each class keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.rewardmodels.clip import padded
from mmalign.rewardmodels.precisions import DTYPES, Precision
from mmalign.rewardmodels.tfjs import Graph

MOST = 16  # boxes of a class
PEAKS = 100  # of a class that are looked at, as many as the network's graph keeps
CENTERNET = "centernet.json"
HEAT, SIDES = "tower_0/keypoints", "tower_0/wh"
NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush
"""  # in the order of the channels
COCO = tuple(" ".join(name.split()) for name in NAMES.split(","))
RENAMED = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}  # by GenEval
CHANNEL = {name: COCO.index(RENAMED.get(name, name)) for name in (*COCO, *RENAMED)}


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

    sure: float  # score from which a box counts where things are counted, unless a setting says another

    def objection(self, classes: Sequence[str]) -> str | None:
        """Why it cannot look for these classes; None where it can."""
        ...

    def __call__(self, image: Tensor, classes: Sequence[str]) -> dict[str, Found]:
        """What is found on a picture [3, H, W] in [0, 1] of each class."""
        ...


class ZeroShot:
    """A zero-shot detector of transformers: OWL-ViT, OWLv2, Grounding DINO and their like."""

    sure = 0.9

    def __init__(self, model: str, precision: Precision, least: float, overlap: float | None) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        try:
            self._processor: Any = AutoProcessor.from_pretrained(model)
            self._model: Any = AutoModelForZeroShotObjectDetection.from_pretrained(
                model, dtype=DTYPES[precision]
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"geneval: model {model} does not load as a detector: {error}") from error
        self._model.eval().requires_grad_(False)
        self._least, self._overlap = least, 0.7 if overlap is None else overlap
        # Models of the DINO kind read one sentence; a class at a time, none can be taken for another.
        self._sentence = "dino" in self._model.config.model_type

    def objection(self, classes: Sequence[str]) -> str | None:
        return None

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


class CenterNet:
    """The CenterNet of COCO's classes, by their names or by those that GenEval gives three of them.

    Pictures lie in the middle of a black square, as where its mAP was measured.
    """

    sure = 0.3

    def __init__(self, folder: Path, precision: Precision, least: float, overlap: float | None) -> None:
        self._graph = Graph(folder / CENTERNET, (HEAT, SIDES)).to(DTYPES[precision]).eval()
        self._side = self._graph.given[1]
        self._least, self._dtype = least, DTYPES[precision]
        self._overlap = 0.5 if overlap is None else overlap

    def objection(self, classes: Sequence[str]) -> str | None:
        strange = [name for name in classes if name not in CHANNEL]
        if not strange:
            return None
        said = ", ".join(repr(name) + nearest(name) for name in strange)
        return f"the detector knows the 80 classes of COCO alone, and not {said}"

    @torch.no_grad()
    def __call__(self, image: Tensor, classes: Sequence[str]) -> dict[str, Found]:
        heat, sides, scale = self._look(image)
        height, width = image.shape[-2:]
        longest = max(height, width)
        # Where `padded` puts the picture.
        corner = torch.tensor([(longest - width) // 2, (longest - height) // 2] * 2)
        limit = torch.tensor([width, height] * 2)
        found: dict[str, Found] = {}
        for name in classes:
            scores, boxes = peaks(heat[CHANNEL[name]], sides, self._side / heat.shape[-1], self._least)
            boxes = (boxes * scale - corner).clamp(min=0).minimum(limit)
            kept = apart(boxes, scores, self._overlap)[:MOST]
            found[name] = Found(boxes[kept], scores[kept])
        return found

    def _look(self, image: Tensor) -> tuple[Tensor, Tensor, float]:
        """Heat maps [80, h, w], distances to the sides [h, w, 4] and the pixels of the picture that one of
        the network's is."""
        self._graph.to(image.device)
        square = padded(image[None])
        seen = F.interpolate(square, (self._side, self._side), mode="bilinear", antialias=True) * 255
        told = self._graph(seen.permute(0, 2, 3, 1).to(self._dtype))
        heat, sides = (told[name][0].float().cpu() for name in (HEAT, SIDES))
        return heat.permute(2, 0, 1), sides, square.shape[-1] / self._side


def load_detector(model: str, precision: Precision, least: float, overlap: float | None) -> Detects:
    """The detector of a folder or hub id; boxes of a lower score than `least` are left out, and of two of a
    class that overlap by more than `overlap` (None: the detector's own) the less sure one."""
    if (Path(model) / CENTERNET).is_file():
        return CenterNet(Path(model), precision, least, overlap)
    return ZeroShot(model, precision, least, overlap)


def nearest(name: str) -> str:
    """What was meant, perhaps."""
    close = get_close_matches(name, CHANNEL, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def peaks(heat: Tensor, sides: Tensor, stride: float, least: float) -> tuple[Tensor, Tensor]:
    """Scores [n] and boxes [n, 4] of the peaks of one class, best first, in the network's pixels.

    heat: [h, w], 0 to 1. sides: [h, w, 4], distances to left, top, right and bottom. stride: pixels between
    places.
    """
    highest = F.max_pool2d(heat[None], 3, 1, 1)[0]
    rows, columns = ((heat == highest) & (heat >= least)).nonzero(as_tuple=True)
    scores = heat[rows, columns]
    order = scores.argsort(descending=True, stable=True)[:PEAKS]
    rows, columns = rows[order], columns[order]
    middle = stride * torch.stack([columns, rows], 1)
    distance = sides[rows, columns]
    return scores[order], torch.cat([middle - distance[:, :2], middle + distance[:, 2:]], 1)


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
