"""DreamLite: a UNet that predicts a velocity."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import Family, padded
from mmalign.pipelines.flow import Condition


class DreamLite(Family):
    """Adapter of `DreamLitePipeline`, text to image.

    Its network draws on the left of a picture to edit, which is zeros here. Prompts are marked as what is to
    be generated, the negative one is not.
    """

    kind = "DreamLitePipeline"
    component = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def default_pixels(self) -> tuple[int, int]:
        side = int(self.pipeline.default_sample_size) * self.scale
        return side, side

    def encode(self, text: str) -> Condition:
        return self._encode(f"[Generate]: {text}")

    def encode_negative(self, text: str, pictures: Tensor) -> Condition:
        return self._encode(text)

    def _encode(self, text: str) -> Condition:
        (embeds,), _ = self.pipeline.encode_prompt(
            "generate",
            [text],
            self.device,
            self.pipeline.text_encoder.dtype,
            max_sequence_length=self.max_sequence_length,
        )
        kept, mask = padded(embeds, self.max_sequence_length)
        return {"embeds": kept, "mask": mask}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        embeds, wide = condition["embeds"], x.shape[3]
        size = x.new_tensor([wide * self.scale, x.shape[2] * self.scale])
        velocity: Tensor = network(
            F.pad(x, (0, wide)).to(embeds.dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=embeds,
            encoder_attention_mask=condition["mask"],
            added_cond_kwargs={"time_ids": size.expand(len(x), -1)},
            return_dict=False,
        )[0]
        return velocity[..., :wide]

    def latents(self, media: Tensor) -> Tensor:
        return self.from_vae(self.pipeline.vae.encode(media * 2 - 1).latents)


class DreamLiteMobile(DreamLite):
    """Adapter of `DreamLiteMobilePipeline`, which is DreamLite distilled to few steps and to no guidance."""

    kind = "DreamLiteMobilePipeline"

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        super().__init__(settings, pipeline)
        if settings.guidance > 1:
            raise ValueError(
                "policy.guidance must be 1: guidance is distilled into DreamLite-mobile; got "
                f"{settings.guidance}"
            )
