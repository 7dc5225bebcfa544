"""HunyuanVideo and HunyuanVideo 1.5, text to video."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.pipelines.family import VideoFamily, schedule
from mmalign.pipelines.flow import Condition


class HunyuanVideo(VideoFamily):
    """Adapter of `HunyuanVideoPipeline`; what it is told its guidance is, is `policy.embedded_guidance`."""

    kind = "HunyuanVideoPipeline"

    def encode(self, text: str) -> Condition:
        embeds, pooled, mask = self.pipeline.encode_prompt(
            [text], device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds[0], "pooled": pooled[0], "mask": mask[0].to(embeds.dtype)}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self.pipeline.scheduler, steps, np.linspace(1.0, 0.0, steps + 1)[:-1].tolist(), None)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        velocity: Tensor = network(
            hidden_states=x,
            timestep=sigma * 1000,
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            pooled_projections=condition["pooled"],
            guidance=self.told(x) * 1000,
            return_dict=False,
        )[0]
        return velocity


class HunyuanVideo15(VideoFamily):
    """Adapter of `HunyuanVideo15Pipeline`, text to video.

    The network is made for text and image to video: where no picture is given, the channels for one and its
    features are 0. `policy.guidance` takes the place of the pipeline's guider, which is left alone.
    """

    kind = "HunyuanVideo15Pipeline"

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.config.patch_size)

    @property
    def channels(self) -> int:
        return int(self.pipeline.num_channels_latents)

    def default_pixels(self) -> tuple[int, int]:
        wide, high = self.pipeline.default_aspect_ratio
        found: tuple[int, int] = self.pipeline.video_processor.calculate_default_height_width(
            high, wide, self.pipeline.target_size
        )
        return found

    def encode(self, text: str) -> Condition:
        embeds, mask, glyphs, glyph_mask = self.pipeline.encode_prompt([text], device=self.device)
        return {"embeds": embeds[0], "mask": mask[0], "glyphs": glyphs[0], "glyph_mask": glyph_mask[0]}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self.pipeline.scheduler, steps, np.linspace(1.0, 0.0, steps + 1)[:-1].tolist(), None)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        embeds = condition["embeds"]
        tokens, width = self.pipeline.vision_num_semantic_tokens, self.pipeline.vision_states_dim
        absent = torch.zeros_like(torch.cat([x, x[:, :1]], 1))  # a picture's latent, and where it is given
        velocity: Tensor = network(
            hidden_states=torch.cat([x, absent], 1).to(embeds.dtype),
            image_embeds=embeds.new_zeros(len(x), tokens, width),
            timestep=sigma * 1000,
            encoder_hidden_states=embeds,
            encoder_attention_mask=condition["mask"],
            encoder_hidden_states_2=condition["glyphs"],
            encoder_attention_mask_2=condition["glyph_mask"],
            return_dict=False,
        )[0]
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        """One by one: its autoencoder's mask is made for one video."""
        return torch.cat([super(HunyuanVideo15, self).decode(one) for one in torch.split(latents, 1)])

    def latents(self, media: Tensor) -> Tensor:
        return torch.cat([super(HunyuanVideo15, self).latents(one) for one in torch.split(media, 1)])
