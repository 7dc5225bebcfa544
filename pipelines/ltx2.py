"""LTX-2, text or image to video with its sound."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import VideoFamily
from mmalign.pipelines.flow import Condition
from mmalign.pipelines.ltx import LTX, LTXImageToVideo

FRAME_RATE = 24.0  # of a call of the pipeline


class LTX2(LTX):
    """Adapter of `LTX2Pipeline`: the latent of the sound lies in further frames behind those of the video.

    Both are drawn by one network, so that both are parts of an action; rewards see the video. What of those
    frames the sound does not fill has no velocity, and no part in a ratio. Guidance is the classifier-free
    one alone, at one scale for both (`stg_scale=0, modality_scale=1` and no rescaling in a call).
    """

    kind = "LTX2Pipeline"

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        if settings.guidance_rescale:
            raise ValueError(
                "policy.guidance_rescale must be 0: those of LTX-2, one for its sound, are not adapted"
            )
        super().__init__(settings, pipeline)
        if self.pipeline.vae.config.timestep_conditioning:
            raise ValueError("policy.model: decoders of LTX-2 that are conditioned on a time are not known")

    def default(self, name: str) -> Any:
        return 121 if name == "num_frames" else super().default(name)

    # ---- the latent

    @property
    def sound(self) -> tuple[int, int]:
        """Tokens of the sound's latent, and numbers of each."""
        pipe, audio = self.pipeline, self.pipeline.audio_vae.config
        rate = pipe.audio_sampling_rate / pipe.audio_hop_length / pipe.audio_vae_temporal_compression_ratio
        bins = audio.mel_bins // pipe.audio_vae_mel_compression_ratio
        return round(self.frames / FRAME_RATE * rate), audio.latent_channels * bins

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        channels, frames, high, wide = super().latent_shape(height, width)
        length, size = self.sound
        return (channels, frames + ceil(length * size / (channels * high * wide)), high, wide)

    def tokens(self, shape: Sequence[int]) -> int:
        """Of the video, by which the schedule is shifted."""
        return super().tokens((shape[0], self.drawn, *shape[2:]))

    def parted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The video's latent [n, C, F, h, w] and the sound's tokens [n, length, size] in a latent."""
        (length, size), video = self.sound, x[:, :, : self.drawn]
        numbers = x[:, :, self.drawn :].flatten(1)[:, : length * size]
        return video, torch.unflatten(numbers, 1, (length, size))

    def joined(self, video: Tensor, sound: Tensor, like: Tensor) -> Tensor:
        """The inverse of `parted`, with zeros behind the sound."""
        rest = torch.zeros_like(like[:, :, self.drawn :]).flatten(1).to(video.dtype)
        rest[:, : sound[0].numel()] = sound.flatten(1)
        return torch.cat([video, torch.unflatten(rest, 1, like[0, :, self.drawn :].shape)], 2)

    # ---- the network

    def encode(self, text: str) -> Condition:
        embeds, mask, *_ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        side = self.pipeline.tokenizer.padding_side
        seen, heard, mask = self.pipeline.connectors(embeds, mask, padding_side=side)
        return {"embeds": seen[0], "heard": heard[0], "mask": mask[0]}

    def call(
        self, network: nn.Module, x: Tensor, sigma: Tensor, time: Tensor, condition: Condition
    ) -> Tensor:
        video, sound = self.parted(x)
        frames, high, wide = video.shape[2:]
        dtype = condition["embeds"].dtype
        velocity, heard = network(
            hidden_states=video.flatten(2).transpose(1, 2).to(dtype),
            audio_hidden_states=sound.to(dtype),
            encoder_hidden_states=condition["embeds"],
            audio_encoder_hidden_states=condition["heard"],
            timestep=time,
            audio_timestep=sigma * 1000,
            sigma=sigma * 1000,
            encoder_attention_mask=condition["mask"],
            audio_encoder_attention_mask=condition["mask"],
            num_frames=frames,
            height=high,
            width=wide,
            fps=FRAME_RATE,
            audio_num_frames=sound.shape[1],
            use_cross_timestep=True,
            return_dict=False,
        )
        return self.joined(velocity.transpose(1, 2).reshape(video.shape), heard, x)

    # ---- media

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents[:, :, : self.drawn])

    def latents(self, media: Tensor) -> Tensor:
        """Of a video without sound: zeros stand for that, the mean of all sounds."""
        video = VideoFamily.latents(self, media)
        length, size = self.sound
        places = video[0, :, 0].numel()
        silent = video.new_zeros(len(video), ceil(length * size / places) * places)
        return torch.cat([video, torch.unflatten(silent, 1, (video.shape[1], -1, *video.shape[3:]))], 2)


class LTX2ImageToVideo(LTXImageToVideo, LTX2):
    """Adapter of `LTX2ImageToVideoPipeline`: a video that begins with the prompt's picture, and its sound.

    Pictures are compressed as frames of the videos were that the model has seen, after they are fitted to the
    policy's size, where the pipeline does so before.
    """

    kind = "LTX2ImageToVideoPipeline"

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        try:
            importlib.import_module("av")
        except ImportError as error:
            raise ImportError(
                "policy.model: the pictures of LTX-2's image to video are compressed by av: "
                "pip install 'mmalign[video]'"
            ) from error
        super().__init__(settings, pipeline)

    def encode_with(self, text: str, pictures: Tensor) -> Condition:
        from diffusers.pipelines.ltx2 import utils

        strength = utils.resolve_default_image_crf(self.pipeline.text_encoder)
        frames = (pictures * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        seen = [torch.from_numpy(utils.apply_image_conditioning_crf(frame, strength)) for frame in frames]
        return super().encode_with(text, torch.stack(seen).to(pictures).permute(0, 3, 1, 2) / 255)
