"""LTX-Video, text or image to video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import Standardized, VideoFamily, rescaled, toward
from mmalign.pipelines.flow import Condition, guided

FRAME_RATE = 25  # of a call of the pipeline; places in time are counted in seconds


class LTX(Standardized, VideoFamily):
    """Adapter of `LTXPipeline`: latents are tokens, one a place, and masked texts.

    A decoder that is conditioned on a time (0.9.1 and later) is given clean latents at time 0.
    """

    kind = "LTXPipeline"
    patch = 1
    rescales = True

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        super().__init__(settings, pipeline)
        if (self.config.patch_size, self.config.patch_size_t) != (1, 1):
            raise ValueError("an LTXPipeline is known with patches of one place, as its models have them")

    @property
    def scale(self) -> int:
        return int(self.pipeline.vae_spatial_compression_ratio)

    @property
    def temporal(self) -> int:
        return int(self.pipeline.vae_temporal_compression_ratio)

    def encode(self, text: str) -> Condition:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return {"embeds": embeds[0], "mask": mask[0]}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.call(network, x, sigma, sigma * 1000, condition)

    def call(
        self, network: nn.Module, x: Tensor, sigma: Tensor, time: Tensor, condition: Condition
    ) -> Tensor:
        """time: [n], or [n, tokens] where places of the video differ."""
        frames, high, wide = x.shape[2:]
        velocity: Tensor = network(
            hidden_states=x.flatten(2).transpose(1, 2).to(condition["embeds"].dtype),
            encoder_hidden_states=condition["embeds"],
            timestep=time,
            encoder_attention_mask=condition["mask"],
            num_frames=frames,
            height=high,
            width=wide,
            rope_interpolation_scale=(self.temporal / FRAME_RATE, self.scale, self.scale),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).reshape(x.shape)

    def combine(self, both: Tensor, guidance: float) -> Tensor:
        return rescaled(guided(both, guidance), both.chunk(2)[1], self.settings.guidance_rescale)

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        mean, std = (m.to(like).reshape(1, -1, 1, 1, 1) for m in (vae.latents_mean, vae.latents_std))
        return mean, std / vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        time = torch.zeros(len(latents), device=latents.device) if vae.config.timestep_conditioning else None
        media: Tensor = vae.decode(self.to_vae(latents), time, return_dict=False)[0]
        return (media / 2 + 0.5).clamp(0, 1).transpose(1, 2)


class LTXImageToVideo(LTX):
    """Adapter of `LTXImageToVideoPipeline`: a video that begins with the prompt's picture.

    The picture takes the place of the first frame of the latent, at time 0 (`toward`). It is the mean of the
    encoder, where the pipeline draws from its distribution.
    """

    kind = "LTXImageToVideoPipeline"
    needs_pictures = True

    def encode_with(self, text: str, pictures: Tensor) -> Condition:
        if len(pictures) > 1:
            raise ValueError(f"a video of LTX begins with one picture, got {len(pictures)} for {text!r}")
        return {**self.encode(text), "first": self.latents(pictures[:, None])[0][:, :1]}

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        negative: Condition | None,
        guidance: float,
    ) -> Tensor:
        # Guidance is rescaled by what the network says of all frames, the picture's as well.
        found = super().velocity(network, x, sigma, condition, negative, guidance)
        return toward(condition["first"], x, sigma, found)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        time = (sigma * 1000).reshape(-1, 1, 1, 1).repeat(1, self.drawn, *x.shape[3:])
        time[:, 0] = 0
        seen = torch.cat([condition["first"].to(x.dtype), x[:, :, 1:]], 2)
        return self.call(network, seen, sigma, time.flatten(1), condition)
