"""HunyuanVideo, text to video, and HunyuanVideo 1.5, text or image to video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
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
    aspect = 16, 9  # width to height, where the settings name no size

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        super().__init__(settings, pipeline)
        if self.config.use_meanflow:
            raise ValueError(
                "policy.model: step-distilled models of HunyuanVideo 1.5 predict the mean velocity up to a "
                "second time, and stochastic steps are defined on that at one; name a model whose "
                "transformer has use_meanflow false"
            )

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.config.patch_size)

    @property
    def channels(self) -> int:
        return int(self.pipeline.num_channels_latents)

    def default_pixels(self) -> tuple[int, int]:
        wide, high = self.aspect
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
        given, features = self.pictured(x, condition)
        velocity: Tensor = network(
            hidden_states=torch.cat([x, given.to(x.dtype)], 1).to(embeds.dtype),
            image_embeds=features,
            timestep=sigma * 1000,
            encoder_hidden_states=embeds,
            encoder_attention_mask=condition["mask"],
            encoder_hidden_states_2=condition["glyphs"],
            encoder_attention_mask_2=condition["glyph_mask"],
            return_dict=False,
        )[0]
        return velocity

    def pictured(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """A picture's latent and where it is given, [n, C + 1, F, h, w], and its features [n, tokens, D]."""
        tokens, width = self.pipeline.vision_num_semantic_tokens, self.pipeline.vision_states_dim
        absent = torch.zeros_like(torch.cat([x, x[:, :1]], 1))
        return absent, condition["embeds"].new_zeros(len(x), tokens, width)

    def decode(self, latents: Tensor) -> Tensor:
        """One by one: its autoencoder's mask is made for one video."""
        return torch.cat([super(HunyuanVideo15, self).decode(one) for one in torch.split(latents, 1)])

    def latents(self, media: Tensor) -> Tensor:
        return torch.cat([super(HunyuanVideo15, self).latents(one) for one in torch.split(media, 1)])


class HunyuanVideo15ImageToVideo(HunyuanVideo15):
    """Adapter of `HunyuanVideo15ImageToVideoPipeline`: a video that begins with the prompt's picture.

    The pipeline takes the size of a video from its picture; here `policy.height` and `policy.width` give it.
    """

    kind = "HunyuanVideo15ImageToVideoPipeline"
    needs_pictures = True

    def encode_with(self, text: str, pictures: Tensor) -> Condition:
        if len(pictures) > 1:
            raise ValueError(
                f"a video of HunyuanVideo begins with one picture, got {len(pictures)} for {text!r}"
            )
        seen = dict(self.encode(text))
        shown = self.pipeline.video_processor.postprocess(pictures * 2 - 1, output_type="pil")[0]
        features = self.pipeline.encode_image(shown, 1, self.device, seen["embeds"].dtype)[0]
        return seen | {"first": self.latents(pictures[:, None])[0], "features": features}

    def pictured(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        given = x.new_zeros(len(x), x.shape[1] + 1, *x.shape[2:])
        given[:, :-1, :1] = condition["first"].to(x.dtype)
        given[:, -1, 0] = 1
        return given, condition["features"]
