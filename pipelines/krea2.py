"""Krea 2."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmalign.pipelines.family import Family, Standardized, pack, unpack
from mmalign.pipelines.flow import Condition


class Krea2(Standardized, Family):
    """Adapter of `Krea2Pipeline`: it sees a text as several layers of its encoder do.

    Its guidance scale g counts from the conditional prediction, c + g (c - u). `policy.guidance` counts as
    everywhere, u + w (c - u), so w = g + 1: 1 is off, and the pipeline's 4.5 is 5.5 here.
    """

    kind = "Krea2Pipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_gate", "to_out.0")

    @property
    def channels(self) -> int:
        return int(self.config.in_channels) // 4

    def encode(self, text: str) -> Condition:
        embeds, mask = self.pipeline.encode_prompt(
            [text], device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds[0], "mask": mask[0]}

    def shift(self, steps: int, shape: Sequence[int]) -> float:
        return 1.15 if self.pipeline.config.is_distilled else super().shift(steps, shape)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        embeds, (high, wide) = condition["embeds"], x.shape[2:]
        places = self.pipeline.prepare_position_ids(embeds.shape[1], high // 2, wide // 2, x.device)
        velocity: Tensor = network(
            hidden_states=pack(x).to(embeds.dtype),
            encoder_hidden_states=embeds,
            timestep=sigma,
            position_ids=places,
            encoder_attention_mask=condition["mask"],
            return_dict=False,
        )[0]
        return unpack(velocity, high, wide)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents[:, :, None])[:, :, 0]

    def latents(self, media: Tensor) -> Tensor:
        return super().latents(media[:, :, None])[:, :, 0]
