"""Scores of two towers, one of pictures and one of texts, whose embeddings are compared; all with a gradient.

clip        w max(cos, 0), w = 2.5           CLIPScore (Hessel et al. 2021, arXiv:2104.08718)
siglip      sigmoid(t cos + b)               SigLIP (Zhai et al. 2023, arXiv:2303.15343)
pickscore   exp(s) cos                       PickScore (Kirstain et al. 2023, arXiv:2305.01569)
hpsv2       cos                              HPS v2 and v2.1 (Wu et al. 2023, arXiv:2306.09341)
aesthetic   a small head on the picture      LAION's predictors (github.com/LAION-AI/aesthetic-predictor)

Pictures are prepared as the model's own processor does it, in torch, so that gradients reach them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.formats import clip_names, is_open_clip, read_open_clip
from mmalign.rewardmodels.inputs import pictures, texts
from mmalign.rewardmodels.precisions import Precision, dtype_of


class Prepared:
    """Pictures as an image processor of transformers makes them: resized, cropped, normalized; in torch."""

    def __init__(self, said: Mapping[str, Any], whole: bool = False) -> None:
        """said: settings of an image processor. whole: nothing is cut off, what is not square is padded."""
        self.whole = whole
        size, crop = said.get("size") or {}, said.get("crop_size") or {}
        self.shortest = int(size.get("shortest_edge") or 0)
        self.size = (size["height"], size["width"]) if "height" in size else None
        cropped = said.get("do_center_crop") and "height" in crop
        self.crop = (crop["height"], crop["width"]) if cropped else None
        if self.size is None and not self.shortest:
            raise ValueError(
                f"its image processor tells no size of height and width or shortest_edge: {size}"
            )
        self.mode = {2: "bilinear", 3: "bicubic"}.get(int(said.get("resample", 3)), "bicubic")
        self.mean, self.std = (torch.tensor(said[n]).reshape(3, 1, 1) for n in ("image_mean", "image_std"))

    def __call__(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] to what the network takes."""
        if self.whole:
            images = padded(images)
        height, width = images.shape[-2:]
        size = self.size
        if size is None:
            share = self.shortest / min(height, width)
            size = (max(self.shortest, int(height * share)), max(self.shortest, int(width * share)))
        if size != (height, width):
            images = F.interpolate(images, size, mode=self.mode, antialias=True).clamp(0, 1)
        if self.crop is not None:
            top, left = ((side - part) // 2 for side, part in zip(images.shape[-2:], self.crop, strict=True))
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (images - self.mean.to(images)) / self.std.to(images)


def padded(images: Tensor) -> Tensor:
    """Pictures [n, 3, H, W] in the middle of black squares."""
    height, width = images.shape[-2:]
    high, wide = max(0, width - height), max(0, height - width)
    return F.pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2))


class Towers:
    """A CLIP or SigLIP of transformers: embeddings of length 1 of pictures and of texts."""

    def __init__(self, name: str, model: str, processor: str | None, precision: Precision) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        dtype = dtype_of(name, precision)
        try:
            self.model: Any
            if is_open_clip(model):
                self.model, prepare = read_open_clip(model, dtype)
            else:
                with torch.random.fork_rng(devices=[]):
                    self.model = AutoModel.from_pretrained(model, dtype=dtype)
                prepare = AutoImageProcessor.from_pretrained(processor or model)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(processor or model)
            self.prepare = Prepared(prepare.to_dict())
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{name}: model {model} does not load: {error}") from error
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "logit_scale"):
            raise ValueError(f"{name}: {model} is a {type(self.model).__name__}, not a CLIP or SigLIP")
        self.model.eval().requires_grad_(False)
        self._asked: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found

    def move(self, device: torch.device) -> None:
        if self.device != device:
            self.model.to(device)
            self._asked.clear()

    def pictures(self, images: Tensor, batch: int) -> Tensor:
        """[n, D] in fp32, of length 1; gradients flow."""
        parts = [
            _vector(self.model.get_image_features(pixel_values=self.prepare(part).to(self.model.dtype)))
            for part in torch.split(images, batch)
        ]
        return F.normalize(torch.cat(parts), dim=1)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """[n, D] in fp32, of length 1; each distinct text is embedded once."""
        if new := [text for text in dict.fromkeys(prompts) if text not in self._asked]:
            longest = self.model.config.text_config.max_position_embeddings
            siglip = self.model.config.model_type.startswith("siglip")  # it was trained on full rows
            tokens = self.tokenizer(
                new,
                padding="max_length" if siglip else True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(self.device)
            names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
            found = _vector(self.model.get_text_features(**{name: tokens[name] for name in names}))
            self._asked |= zip(new, F.normalize(found, dim=1), strict=True)
        return torch.stack([self._asked[text] for text in prompts])


def _vector(found: Any) -> Tensor:
    """Embeddings in fp32, however the version of transformers hands them over."""
    vector: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return vector.float()


@dataclass(eq=False)
class TwoTowers:
    """A score of a picture and its prompt by how alike their embeddings are."""

    model: str  # local folder or hub id
    processor: str | None = None  # where the tokenizer and image processor lie; null: beside the model
    precision: Precision = "fp32"  # of the network; bf16 or fp16 are faster on a GPU
    batch: int = 32  # pictures at once; lower it for less memory
    name = "two_towers"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"{self.name}: batch must be at least 1, got {self.batch}")
        self._towers = Towers(self.name, self.model, self.processor, self.precision)

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, self._score(pictures(self.name, outcome), texts(outcome))[:, None])

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The score [B * views]; gradients reach the media."""
        return self._score(pictures(self.name, outcome, graph=True), texts(outcome))

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self._towers.move(images.device)
        return self.scaled((self._towers.pictures(images, self.batch) * self._towers.texts(prompts)).sum(1))

    def scaled(self, cosine: Tensor) -> Tensor:
        """The score of a cosine, [n]."""
        raise NotImplementedError


@dataclass(eq=False)
class ClipScore(TwoTowers):
    """CLIPScore: 2.5 times the cosine of picture and prompt, not below 0."""

    model: str = "openai/clip-vit-large-patch14"  # any CLIP; hub id or local folder, also one of open_clip's
    weight: float = 2.5  # factor of the cosine
    name = "clip_score"

    def scaled(self, cosine: Tensor) -> Tensor:
        return self.weight * cosine.clamp(min=0)


@dataclass(eq=False)
class SigLip(TwoTowers):
    """The probability that SigLIP gives to a picture and its prompt being a pair, 0 to 1."""

    model: str = "google/siglip-so400m-patch14-384"  # any SigLIP or SigLIP 2; local folder or hub id
    name = "siglip"

    def scaled(self, cosine: Tensor) -> Tensor:
        network = self._towers.model
        if not hasattr(network, "logit_bias"):
            raise ValueError(f"siglip: {self.model} has no bias of its logits, so it is no SigLIP")
        logits: Tensor = cosine * network.logit_scale.float().exp() + network.logit_bias.float()
        return logits.sigmoid()


@dataclass(eq=False)
class PickScore(TwoTowers):
    """PickScore: what people preferred, about 18 to 24; the temperature of its CLIP times the cosine."""

    model: str = "yuvalkirstain/PickScore_v1"  # local folder or hub id
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    name = "pickscore"

    def scaled(self, cosine: Tensor) -> Tensor:
        scale: Tensor = self._towers.model.logit_scale.float().exp()
        return scale * cosine


@dataclass(eq=False)
class HPSv2(TwoTowers):
    """What people preferred: the cosine in a CLIP that was taught it, about 0.2 to 0.35."""

    model: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the CLIP whose shape and tokenizer it has
    weights: str | None = None  # HPS_v2.1_compressed.pt as published; null: those of `model`, taught already
    name = "hpsv2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._towers.prepare.whole = True
        if self.weights is None:
            return
        state = read_state(self.name, Path(self.weights))
        network = self._towers.model
        named = {k: v.float() for key, value in state.items() for k, v in clip_names(key, value)}
        try:
            network.load_state_dict({k: v for k, v in named.items() if k in network.state_dict()})
        except RuntimeError as error:
            raise ValueError(f"hpsv2: {self.weights} does not fit {self.model}: {error}") from error

    def scaled(self, cosine: Tensor) -> Tensor:
        return cosine


@dataclass(eq=False)
class Aesthetic:
    """LAION's aesthetic score of a picture, about 1 to 10, whatever the prompt; CLIP ViT-L/14 and a head.

    head: its weights, either the improved predictor (five layers without activations in between,
    sac+logos+ava1-l14-linearMSE.pth) or the first one (one layer, sa_0_4_vit_l_14_linear.pth).
    """

    head: str  # .pth or .safetensors file
    model: str = "openai/clip-vit-large-patch14"  # the CLIP that the head was trained on
    precision: Precision = "fp32"  # of the network; bf16 or fp16 are faster on a GPU
    batch: int = 32  # pictures at once; lower it for less memory
    name = "aesthetic"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"aesthetic: batch must be at least 1, got {self.batch}")
        self._towers = Towers(self.name, self.model, None, self.precision)
        self._head = read_head(Path(self.head), int(self._towers.model.config.projection_dim))

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, self._score(pictures(self.name, outcome))[:, None])

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The score [B * views]; gradients reach the media."""
        return self._score(pictures(self.name, outcome, graph=True))

    def _score(self, images: Tensor) -> Tensor:
        self._towers.move(images.device)
        found: Tensor = self._head.to(images.device)(self._towers.pictures(images, self.batch))
        return found[:, 0]


def read_head(file: Path, width: int) -> nn.Module:
    """A head of linear layers from its file; dropout in between does nothing when scoring."""
    return linear_layers("aesthetic", str(file), read_state("aesthetic", file), width)


def read_state(name: str, file: Path) -> dict[str, Tensor]:
    """The weights in a file, .safetensors or what torch.save wrote, by itself or as its state_dict.

    ValueError where there are none, in the name of the reward.
    """
    if not file.is_file():
        raise ValueError(f"{name}: there is no file {file}; download the published weights and name it")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
        raise ValueError(f"{name}: {file} cannot be read as weights: {error}") from error
    state: dict[str, Tensor] = found.get("state_dict", found)
    return state


def linear_layers(name: str, file: str, state: Mapping[str, Tensor], width: int) -> nn.Module:
    """Linear layers one after the other from `width` numbers to one, in the order of their names."""
    weights = sorted((name for name in state if name.endswith("weight")), key=_number)
    layers = []
    for name in weights:
        high, low = state[name].shape
        if low != width:
            raise ValueError(
                f"{name}: the head {file} takes {low} numbers and is given {width}; other network?"
            )
        layer = nn.Linear(low, high)
        layer.load_state_dict({"weight": state[name], "bias": state[name.replace("weight", "bias")]})
        layers.append(layer)
        width = high
    if width != 1:
        raise ValueError(f"{name}: {file} is no head, it ends in {width} numbers instead of a score")
    return nn.Sequential(*layers).float().eval().requires_grad_(False)


def _number(name: str) -> int:
    """The place of a layer: layers.6.weight -> 6; 0 where there is only one."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)
