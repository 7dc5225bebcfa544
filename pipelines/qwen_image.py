"""Qwen-Image, and its editors Qwen-Image-Edit and Edit-Plus."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.pipelines.family import Family, Standardized, pack, padded, renormalized, unpack
from mmalign.pipelines.flow import Condition, guided


class QwenImage(Standardized, Family):
    """Adapter of `QwenImagePipeline`: guidance keeps the norm that each token's prediction has without it."""

    kind = "QwenImagePipeline"

    @property
    def idle(self) -> tuple[str, ...]:
        """What the last block makes of the text is not read."""
        last = f"transformer_blocks.{self.config.num_layers - 1}"
        return f"{last}.attn.to_add_out", f"{last}.txt_mlp"

    @property
    def channels(self) -> int:
        return int(self.config.in_channels) // 4

    def encode(self, text: str) -> Condition:
        embeds, _ = self.pipeline.encode_prompt(
            [text], device=self.device, max_sequence_length=self.max_sequence_length
        )
        return self._filled(embeds[0], self.max_sequence_length)

    def _filled(self, embeds: Tensor, length: int) -> Condition:
        kept, mask = padded(embeds, length)
        return {"embeds": kept, "mask": mask}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        tokens, pictures = pack(x), condition.get("pictures")
        shapes = [(1, x.shape[2] // 2, x.shape[3] // 2)]
        if pictures is not None:
            tokens = torch.cat([tokens, *(pack(picture) for picture in pictures.unbind(1))], 1)
            shapes *= 1 + pictures.shape[1]
        velocity: Tensor = network(
            hidden_states=tokens,
            timestep=sigma,
            guidance=self._told(x),
            encoder_hidden_states=condition["embeds"],
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=[shapes] * len(x),
            return_dict=False,
        )[0]
        return unpack(velocity[:, : self.tokens(x.shape[1:])], *x.shape[2:])

    def _told(self, x: Tensor) -> Tensor | None:
        if not self.config.guidance_embeds:
            return None
        if self.settings.embedded_guidance is None:
            raise ValueError("policy.embedded_guidance must be given: this Qwen-Image is guidance-distilled")
        return self.told(x)

    def combine(self, both: Tensor, guidance: float) -> Tensor:
        tokens = pack(both)
        found = renormalized(guided(tokens, guidance), tokens.chunk(2)[1], -1)
        return unpack(found, *both.shape[2:])

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents[:, :, None])[:, :, 0]

    def latents(self, media: Tensor) -> Tensor:
        return super().latents(media[:, :, None])[:, :, 0]


class QwenImageEdit(QwenImage):
    """Adapter of `QwenImageEditPipeline`: the text encoder and the network both see the picture.

    The pipeline brings the picture to a megapixel; here it has the policy's size, as what comes out.
    """

    kind = "QwenImageEditPipeline"
    needs_pictures = True

    def encode_with(self, text: str, pictures: Tensor) -> Condition:
        if len(pictures) > 1:
            raise ValueError(f"Qwen-Image-Edit edits one picture, got {len(pictures)} as source of {text!r}")
        return self._seen(text, pictures, self.shown(pictures[0]))

    def _seen(self, text: str, pictures: Tensor, shown: Any) -> Condition:
        embeds, _ = self.pipeline.encode_prompt([text], image=shown, device=self.device)
        # The text's own tokens, and a fixed number for the pictures and the template.
        around = self._around((*pictures.shape,), shown)
        return {
            **self._filled(embeds[0], around + self.max_sequence_length),
            "pictures": self.latents(pictures),
        }

    def _around(self, shape: tuple[int, ...], shown: Any) -> int:
        if shape not in self._lengths:
            embeds, _ = self.pipeline.encode_prompt([""], image=shown, device=self.device)
            self._lengths[shape] = embeds.shape[1]
        return self._lengths[shape]

    @cached_property
    def _lengths(self) -> dict[tuple[int, ...], int]:
        return {}

    def shown(self, picture: Tensor) -> Any:
        """A picture [3, H, W] as the processor takes it."""
        return self.pipeline.image_processor.postprocess(picture[None], "pil", [False])[0]


class QwenImageEditPlus(QwenImageEdit):
    """Adapter of `QwenImageEditPlusPipeline`: several pictures, which the text encoder sees smaller."""

    kind = "QwenImageEditPlusPipeline"

    def encode_with(self, text: str, pictures: Tensor) -> Condition:
        return self._seen(text, pictures, [self.shown(picture) for picture in pictures])

    def shown(self, picture: Tensor) -> Any:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        wide, high = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, picture.shape[2] / picture.shape[1])
        return self.pipeline.image_processor.resize(super().shown(picture), high, wide)
