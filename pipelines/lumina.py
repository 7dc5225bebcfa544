"""Lumina-Next."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.pipelines.family import Family, schedule
from mmalign.pipelines.flow import Condition, guided


class LuminaNext(Family):
    """Adapter of `LuminaPipeline`: time runs upward, and three channels alone are guided.

    Prompts are taken as they are (`clean_caption=False`), up to 256 tokens whatever
    `policy.max_sequence_length` is. diffusers gives its network no adapters, so that its LoRA is written as
    peft reads it.
    """

    kind = "LuminaPipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.config.patch_size)

    def encode(self, text: str) -> Condition:
        embeds, mask, *_ = self.pipeline.encode_prompt([text], False, device=self.device)
        less = self.pipeline.max_sequence_length - embeds.shape[1]
        return {"embeds": F.pad(embeds[0], (0, 0, 0, less)), "mask": F.pad(mask[0], (0, less))}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self.pipeline.scheduler, steps, None, None)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        own = self.pipeline.default_image_size
        high, wide = (side * self.scale for side in x.shape[2:])
        head = self.config.hidden_size // self.config.num_attention_heads
        stretched = math.sqrt(high * wide / own**2)
        found: Tensor = network(
            hidden_states=x.to(condition["embeds"].dtype),
            timestep=1 - sigma,
            encoder_hidden_states=condition["embeds"],
            encoder_mask=condition["mask"],
            image_rotary_emb=get_2d_rotary_pos_embed_lumina(head, 384, 384, linear_factor=stretched),
            cross_attention_kwargs={"base_sequence_length": (own // 16) ** 2},
            return_dict=False,
        )[0]
        return -found[:, : self.channels]

    def combine(self, both: Tensor, guidance: float) -> Tensor:
        positive = both.chunk(2)[1]
        return torch.cat([guided(both, guidance)[:, :3], positive[:, 3:]], 1)
