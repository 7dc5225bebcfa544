"""Faces on pictures: where they lie and whose they are, by three networks (`scripts/fetch_assets.py faces`).

BlazeFace   where there may be one (Bazarevsky et al. 2019, arXiv:1907.05047; MediaPipe's for 256 pixels)
FaceMesh    whether there is one (Kartynnik et al. 2019, arXiv:1907.06724; the flag beside its mesh)
FaceRes     whose it is, 1024 numbers of a MobileNet that told the people of VGGFace2 apart (Savchenko 2019,
            arXiv:1807.07718)

BlazeFace tells a score and a box for each of 896 anchors: two in the middle of each cell of a 16 x 16 grid,
six in that of an 8 x 8 grid. With what it tells of the anchor a, (dx, dy, w, h, ...), in its own pixels:

    box = (a + (dx, dy) - (w, h) / 2, a + (dx, dy) + (w, h) / 2)

By itself it takes a cat or a cup for a face; FaceMesh, which is made for what BlazeFace finds, does not.

Ranges, the size of a crop and the second look are those of the library that the graphs come from
(github.com/vladmandic/human, 3.3.6). Differs from it in what FaceRes is given: B, G, R less their means in
ImageNet, as its author trained it (github.com/HSE-asavchenko/HSE_FaceRec_tf), where the library gives R, G, B
as they are, and tells people apart less well by it (docs/rewards.md); and in that a crop is not rounded to
whole pixels and is averaged where it is drawn smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.rewardmodels.clip import padded
from mmalign.rewardmodels.detectors import apart
from mmalign.rewardmodels.tfjs import Graph

FETCH = "python scripts/fetch_assets.py faces"
BLAZEFACE, FACEMESH, FACERES = "blazeface.json", "facemesh.json", "faceres.json"
HEADS = [f"StatefulPartitionedCall/functional_1/conv2d_{number}/BiasAdd" for number in (33, 34, 35, 36)]
FLAG = "StatefulPartitionedCall/model_1/activation_1/Sigmoid"
DESCRIPTOR = "global_pooling/Mean"
GRIDS = ((16, 2), (8, 6))  # cells along a side, anchors in each
MEANS = (103.939, 116.779, 123.68)  # of blue, green and red
MARGIN = 1.4  # side of a crop in the longer sides of its box
OVERLAP = 0.3  # of two boxes that overlap by more the surer counts
MOST = 16  # boxes of a picture that are looked at twice
NOTHING = 1e-6  # weight of what lies off a picture by more than its size


@dataclass(frozen=True)
class Face:
    """box: [4], left, top, right and bottom in pixels, on the CPU. score: that of the less sure network."""

    box: Tensor
    score: float

    @property
    def area(self) -> float:
        return float((self.box[2:] - self.box[:2]).prod())


class Faces:
    """The three networks."""

    def __init__(self, folder: Path, least: float) -> None:
        """least: score from which something is a face, by both networks that look for them.

        ValueError where the folder lacks one of the networks.
        """
        if missing := [name for name in (BLAZEFACE, FACEMESH, FACERES) if not (folder / name).is_file()]:
            raise ValueError(f"{folder} has no {', '.join(missing)}; {FETCH} brings them into data/faces")
        self._finds = Graph(folder / BLAZEFACE, HEADS).eval()
        self._confirms = Graph(folder / FACEMESH, [FLAG]).eval()
        self._knows = Graph(folder / FACERES, [DESCRIPTOR]).eval()
        self._least, self.device = least, torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Look at pictures on another device."""
        for network in (self._finds, self._confirms, self._knows):
            network.to(device)
        self.device = device

    @torch.no_grad()
    def find(self, images: Tensor) -> list[list[Face]]:
        """The faces on each picture of [n, 3, H, W] in [0, 1], largest first."""
        height, width = images.shape[-2:]
        longest, side = max(height, width), self._finds.given[1]
        seen = F.interpolate(padded(images), (side, side), mode="bilinear", antialias=True) * 2 - 1
        told = self._finds(seen.permute(0, 2, 3, 1))
        scores, boxes = decoded([told[name].float().cpu() for name in HEADS], side)
        corner = torch.tensor([(longest - width) // 2, (longest - height) // 2] * 2)  # as `padded` has it
        boxes = boxes * (longest / side) - corner
        return [
            self._confirmed(image, b[s >= self._least], s[s >= self._least])
            for image, b, s in zip(images, boxes, scores, strict=True)
        ]

    def _confirmed(self, image: Tensor, boxes: Tensor, scores: Tensor) -> list[Face]:
        """Of what BlazeFace found on a picture [3, H, W], that which FaceMesh also takes for a face."""
        kept = apart(boxes, scores, OVERLAP)[:MOST]
        if not len(kept):
            return []
        seen = cut(image[None], boxes[kept].to(image.device), MARGIN, self._confirms.given[1])
        sure = self._confirms(seen.permute(0, 2, 3, 1))[FLAG].flatten().float().cpu()
        found = [
            Face(boxes[place], min(float(scores[place]), float(one)))
            for place, one in zip(kept, sure, strict=True)
            if one >= self._least
        ]
        return sorted(found, key=lambda face: -face.area)

    def describe(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Descriptors of the face in the box [n, 4] of each picture [n, 3, H, W] in [0, 1]: [n, 1024].

        Of length 1, and without a negative number. Gradients reach the pictures, not the boxes.
        """
        seen = cut(images, boxes.to(images), MARGIN, self._knows.given[1]).flip(1) * 255
        means = torch.tensor(MEANS, device=images.device).reshape(3, 1, 1)
        return F.normalize(self._knows((seen - means).permute(0, 2, 3, 1))[DESCRIPTOR], dim=1)


def anchors(side: int) -> Tensor:
    """Where BlazeFace looks on a picture of so many pixels a side, [896, 2] in x and y."""
    found = []
    for cells, count in GRIDS:
        middles = (torch.arange(cells) + 0.5) * (side / cells)
        rows, columns = torch.meshgrid(middles, middles, indexing="ij")
        found.append(torch.stack([columns, rows], 2).flatten(0, 1).repeat_interleave(count, 0))
    return torch.cat(found)


def decoded(told: list[Tensor], side: int) -> tuple[Tensor, Tensor]:
    """Scores [n, 896] and boxes [n, 896, 4] of what BlazeFace tells.

    told: of each grid the logits [n, cells, cells, anchors], then of each what it says of boxes,
    [n, cells, cells, 16 anchors].
    """
    fine, coarse, fine_boxes, coarse_boxes = told
    scores = torch.cat([fine.flatten(1), coarse.flatten(1)], 1).sigmoid()
    said = torch.cat([part.reshape(len(part), -1, 16) for part in (fine_boxes, coarse_boxes)], 1)
    middles, sizes = anchors(side) + said[..., :2], said[..., 2:4]
    return scores, torch.cat([middles - sizes / 2, middles + sizes / 2], 2)


def cut(images: Tensor, boxes: Tensor, margin: float, side: int) -> Tensor:
    """The square around the middle of each box, drawn at `side` pixels, [n, 3, side, side].

    images: [n, 3, H, W], or one for all boxes. boxes: [n, 4]. The square is `margin` times as long as the
    longer side of the box, and black beside the picture. Linear between pixels, and averaged where it is
    drawn smaller.
    """
    length = margin * (boxes[:, 2:] - boxes[:, :2]).amax(1)
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    across = shares(middles[:, 0], length, images.shape[3], side)
    down = shares(middles[:, 1], length, images.shape[2], side)
    return down[:, None] @ images @ across[:, None].transpose(2, 3)


def shares(middle: Tensor, length: Tensor, pixels: int, side: int) -> Tensor:
    """What each pixel of a row adds to each of the `side` that a part of it is drawn at, [n, side, pixels].

    middle, length: [n], where the part lies. They add up to 1, less what lies beside the row.
    """
    step = (length / side)[:, None, None]
    offsets = torch.arange(side, device=middle.device) + 0.5 - side / 2
    wanted = middle[:, None, None] + step * offsets[:, None]
    given = torch.arange(-pixels, 2 * pixels, device=middle.device) + 0.5  # with as much on either side
    weight = (1 - (wanted - given).abs() / step.clamp(min=1)).clamp(min=0)
    return weight[..., pixels : 2 * pixels] / weight.sum(2, keepdim=True).clamp(min=NOTHING)
