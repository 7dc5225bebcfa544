"""CogVideoX and 1.5, text or image to video: diffusion models of v, sampled as `pipelines/sd.py` says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import VideoFamily
from mmalign.pipelines.flow import Condition
from mmalign.pipelines.sd import Diffusion


class CogVideoX(Diffusion, VideoFamily):
    """Adapter of `CogVideoXPipeline`, equal to it with a `CogVideoXDDIMScheduler` where no noise is drawn.

    The scheduler counts whole steps of its table, so that is where the number of steps divides its length. A
    network that takes several frames of the latent at once (1.5) may need more of them than the video has;
    they come first and are not decoded.
    """

    kind = "CogVideoXPipeline"

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        super().__init__(settings, pipeline)
        longest = self.config.max_text_seq_length
        if not self.config.use_rotary_positional_embeddings and self.max_sequence_length != longest:
            raise ValueError(
                f"policy.max_sequence_length must be {longest} for this model, whose places are counted on "
                f"from those of the text; got {self.max_sequence_length}"
            )

    def read_schedule(self) -> None:
        from diffusers import CogVideoXDDIMScheduler

        self.read_table(CogVideoXDDIMScheduler)

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.config.patch_size)

    def default_pixels(self) -> tuple[int, int]:
        return self.config.sample_height * self.scale, self.config.sample_width * self.scale

    def default(self, name: str) -> Any:
        return self.config.sample_frames if name == "num_frames" else super().default(name)

    @property
    def extra(self) -> int:
        return -self.drawn % (self.config.patch_size_t or 1)

    def predict(self, network: nn.Module, y: Tensor, t: Tensor, condition: Condition) -> Tensor:
        frames, high, wide = y.shape[2:]
        places = None
        if self.config.use_rotary_positional_embeddings:
            places = self.pipeline._prepare_rotary_positional_embeddings(
                high * self.scale, wide * self.scale, frames, y.device
            )
        predicted: Tensor = network(
            hidden_states=self.shown(y, condition).transpose(1, 2).to(condition["embeds"].dtype),
            encoder_hidden_states=condition["embeds"],
            timestep=t,
            image_rotary_emb=places,
            return_dict=False,
            **self.told_besides(y),
        )[0]
        return predicted.transpose(1, 2)

    def shown(self, y: Tensor, condition: Condition) -> Tensor:
        """The channels that the network sees, [n, C, F, h, w]."""
        return y

    def told_besides(self, y: Tensor) -> dict[str, Tensor]:
        """What the network is told beside text and time."""
        return {}

    def from_vae(self, raw: Tensor) -> Tensor:
        """With the first frame as often as the network needs it besides."""
        latents = super().from_vae(raw) / self._end.sqrt().to(raw.device)
        return torch.cat([latents[:, :, :1].expand(-1, -1, self.extra, -1, -1), latents], 2)

    def to_vae(self, latents: Tensor) -> Tensor:
        return super().to_vae(latents[:, :, self.extra :] * self._end.sqrt().to(latents.device))


class CogVideoXImageToVideo(CogVideoX):
    """Adapter of `CogVideoXImageToVideoPipeline`: a video that begins with the prompt's picture.

    The network sees the picture's latent as further channels of the first frame. It is the mean of the
    encoder, where the pipeline draws from its distribution.
    """

    kind = "CogVideoXImageToVideoPipeline"
    needs_pictures = True

    @property
    def channels(self) -> int:
        return int(self.config.in_channels) // 2

    def encode_with(self, text: str, pictures: Tensor) -> Condition:
        if len(pictures) > 1:
            raise ValueError(
                f"a video of CogVideoX begins with one picture, got {len(pictures)} for {text!r}"
            )
        vae = self.pipeline.vae
        raw = vae.encode(pictures[:, :, None] * 2 - 1).latent_dist.mode()[0]
        scale = vae.config.scaling_factor
        picture = raw / scale if vae.config.invert_scale_latents else raw * scale
        later = self.extra + self.drawn - 1
        nothing = picture.new_zeros(len(picture), later, *picture.shape[2:])
        return {**self.encode(text), "first": torch.cat([picture, nothing], 1)}

    def shown(self, y: Tensor, condition: Condition) -> Tensor:
        return torch.cat([y, condition["first"].to(y.dtype)], 1)

    def told_besides(self, y: Tensor) -> dict[str, Tensor]:
        return {} if self.config.ofs_embed_dim is None else {"ofs": y.new_full((1,), 2.0)}
