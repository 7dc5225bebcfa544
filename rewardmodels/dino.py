"""How alike a picture is to a reference of its prompt, by an image model: DINOv2, DINOv3 or another tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.pictures import open_picture
from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.features import load_features
from mmalign.rewardmodels.inputs import pictures
from mmalign.rewardmodels.precisions import Precision, dtype_of


@dataclass(eq=False)
class DinoSimilarity:
    """Cosine of the features of a picture and of the prompt's `reference_image`, a file; -1 to 1."""

    model: str = "facebook/dinov2-base"  # image model of transformers, or efficientnet, or pixels
    precision: Precision = "fp32"  # of the network; bf16 or fp16 are faster on a GPU
    batch: int = 32  # pictures at once; lower it for less memory
    name = "dino_similarity"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"dino_similarity: batch must be at least 1, got {self.batch}")
        self._dtype = dtype_of(self.name, self.precision)
        try:
            self._load(torch.device("cpu"))
        except OSError as error:
            raise ValueError(f"dino_similarity: model {self.model} does not load: {error}") from error

    def _load(self, device: torch.device) -> None:
        self._features, self._device = load_features(self.model, device, self._dtype), device
        self._known: dict[str, Tensor] = {}  # features of references by file

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, self._score(pictures(self.name, outcome), outcome)[:, None])

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The cosine [B * views]; gradients reach the media."""
        return self._score(pictures(self.name, outcome, graph=True), outcome)

    def _score(self, images: Tensor, outcome: Outcome) -> Tensor:
        if images.device != self._device:  # it runs where the pictures are
            self._load(images.device)
        seen = torch.cat([self._features(part) for part in torch.split(images, self.batch)])
        wanted = torch.stack([self._reference(outcome, row // outcome.views) for row in range(len(images))])
        return F.cosine_similarity(seen, wanted.to(seen), dim=1)

    def _reference(self, outcome: Outcome, sample: int) -> Tensor:
        file = outcome.prompts.extra[sample].get("reference_image")
        if not isinstance(file, str):
            text = outcome.prompts.text[sample]
            raise ValueError(f'dino_similarity: prompt {text!r} names no "reference_image", one file')
        if file not in self._known:
            import numpy as np

            picture = torch.from_numpy(np.array(open_picture(Path(file)))).permute(2, 0, 1).float() / 255
            with torch.no_grad():
                self._known[file] = self._features(picture[None])[0]
        return self._known[file]
