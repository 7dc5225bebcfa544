"""Ovis-Image and LongCat-Image, whose networks are those of FLUX.1 with words in a row."""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.pipelines.family import pack, unpack
from mmalign.pipelines.flow import Condition, guided
from mmalign.pipelines.flux import Flux


class OvisImage(Flux):
    """Adapter of `OvisImagePipeline`; embeddings behind the end of a text are 0."""

    kind = "OvisImagePipeline"

    def encode(self, text: str) -> Condition:
        embeds, *_ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds[0]}

    def named(self, x: Tensor, condition: Condition) -> dict[str, Tensor | None]:
        return {}

    def text_places(self, x: Tensor, length: int) -> Tensor:
        order = torch.arange(length, device=x.device, dtype=x.dtype)
        return torch.stack([torch.zeros_like(order), order, order], 1)


class LongCatImage(OvisImage):
    """Adapter of `LongCatImagePipeline`: guidance leaves no token a larger norm than it has without.

    Prompts are taken as they are, as with `enable_prompt_rewrite=False`; texts are of 512 tokens whatever
    `policy.max_sequence_length` is.
    """

    kind = "LongCatImagePipeline"

    def encode(self, text: str) -> Condition:
        return {"embeds": self.pipeline.encode_prompt([text])[0][0]}

    def places(self, x: Tensor, first: float = 1.0) -> Tensor:
        places = super().places(x, first)
        return places + places.new_tensor([0, *[self.pipeline.tokenizer_max_length] * 2])

    def combine(self, both: Tensor, guidance: float) -> Tensor:
        tokens = pack(both)
        found, positive = guided(tokens, guidance), tokens.chunk(2)[1]
        norms = positive.norm(dim=-1, keepdim=True) / (found.norm(dim=-1, keepdim=True) + 1e-8)
        return unpack(found * norms.clamp(max=1), *both.shape[2:])
