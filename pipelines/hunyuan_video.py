"""HunyuanVideo and HunyuanVideo 1.5, text or image to video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import VideoFamily, schedule, toward
from mmalign.pipelines.flow import Condition

NOISE = 0.999  # what the first HunyuanVideo begins with from a picture; the rest is the picture's latent


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


class HunyuanVideoImageToVideo(HunyuanVideo):
    """Adapter of `HunyuanVideoImageToVideoPipeline`: a video that begins with the prompt's picture.

    With c = 0.999, the latent p of the picture repeated over the frames, and e the noise, its pipeline begins
    at c e + (1 - c) p, so that its network sees

        y = (1 - sigma) y0 + sigma (c e + (1 - c) p)

    With f = p / c and x = y / c - sigma (1 - c) f that is the flow x = (1 - sigma) x0 + sigma e, its velocity
    is that of y, divided by c, less (1 - c) f, and Euler steps of both are the same.

    A network of the kind `token_replace` takes the picture in place of the first frame of its latent
    (`toward`). One of the kind `latent_concat` sees it as further channels; its latent begins with a frame
    more than the video needs, and the four frames before the video's are not part of it, so that
    `policy.frames` is four less than the pipeline's `num_frames`. The negative prompt stands beside a black
    picture, and where that is told in more tokens than the prompt's own, masked ones make up for it.
    """

    kind = "HunyuanVideoImageToVideoPipeline"
    needs_pictures = True

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        super().__init__(settings, pipeline)
        if self.config.image_condition_type is None:
            raise ValueError(
                "policy.model: its transformer has no image_condition_type; one that begins with a picture "
                "has token_replace or latent_concat"
            )
        self.replaces = self.config.image_condition_type == "token_replace"

    @property
    def channels(self) -> int:
        return super().channels if self.replaces else super().channels // 2

    def default(self, name: str) -> Any:
        found = super().default(name)
        return found - self.extra * self.temporal if name == "num_frames" else found

    @property
    def extra(self) -> int:
        return 0 if self.replaces else 1

    # ---- texts and pictures

    def encode_with(self, text: str, pictures: Tensor) -> Condition:
        if len(pictures) > 1:
            raise ValueError(
                f"a video of HunyuanVideo begins with one picture, got {len(pictures)} for {text!r}"
            )
        return self._told(text, pictures, pictures, 4 if self.replaces else 2)

    def encode_negative(self, text: str, pictures: Tensor) -> Condition:
        return self._told(text, pictures, torch.zeros_like(pictures), 2)

    def _told(self, text: str, first: Tensor, described: Tensor, stride: int) -> Condition:
        """A text beside `described`, told by every `stride`th token, of a video that begins with `first`."""
        from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as plain

        shown = self.pipeline.video_processor.postprocess(described * 2 - 1, output_type="pil")
        embeds, pooled, mask = self.pipeline.encode_prompt(
            shown,
            [text],
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            image_embed_interleave=stride,
        )
        tokens = int(plain.DEFAULT_PROMPT_TEMPLATE["image_emb_len"])
        less = len(range(0, tokens, 2)) - len(range(0, tokens, stride))
        return {
            "embeds": F.pad(embeds[0], (0, 0, 0, less)),
            "pooled": pooled[0],
            "mask": F.pad(mask[0], (0, less)).to(embeds.dtype),
            "first": super().latents(first[:, None])[0],
        }

    # ---- the network

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        first, s = condition["first"], sigma.reshape(-1, 1, 1, 1, 1)
        y, picture = NOISE * (x + s * (1 - NOISE) * first), NOISE * first.to(x.dtype)
        if self.replaces:
            seen = torch.cat([picture, y[:, :, 1:]], 2)
        else:
            given = torch.cat([picture, torch.ones_like(picture[:, :1])], 1)
            seen = torch.cat([y, F.pad(given, (0, 0, 0, 0, 0, y.shape[2] - 1))], 1)
        velocity = super().predict(network, seen, sigma, condition).float() / NOISE - (1 - NOISE) * first
        return toward(first, x, sigma, velocity) if self.replaces else velocity

    # ---- media

    def from_vae(self, raw: Tensor) -> Tensor:
        return super().from_vae(raw) / NOISE

    def to_vae(self, latents: Tensor) -> Tensor:
        return super().to_vae(latents * NOISE)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents)[:, self.extra * self.temporal :]

    def latents(self, media: Tensor) -> Tensor:
        """Of a video whose first frame stood still before it, where the latent begins with more."""
        still = media[:, :1].expand(-1, self.extra * self.temporal, -1, -1, -1)
        return super().latents(torch.cat([still, media], 1))


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
    def idle(self) -> tuple[str, ...]:
        """As of Qwen-Image."""
        last = f"transformer_blocks.{self.config.num_layers - 1}"
        return f"{last}.attn.to_add_out", f"{last}.ff_context"

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
