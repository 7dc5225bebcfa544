"""Kolors: the network of Stable Diffusion XL, with ChatGLM to read its texts."""

from __future__ import annotations

from typing import Any

from mmalign.contracts import PolicySettings
from mmalign.pipelines.flow import Condition
from mmalign.pipelines.sd import StableDiffusionXL


class Kolors(StableDiffusionXL):
    """Adapter of `KolorsPipeline`, equal to it with a `DDIMScheduler` where no noise is drawn.

    Texts are of 256 tokens, whatever `policy.max_sequence_length` is.
    """

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        from diffusers import KolorsPipeline

        if settings.guidance_rescale:
            raise ValueError("policy.guidance_rescale must be 0: a KolorsPipeline has none")
        absent = {"feature_extractor": None, "image_encoder": None}
        self._read(KolorsPipeline, settings, absent, pipeline)

    def encode(self, text: str) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            [text], device=self.pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"embeds": embeds[0], "pooled": pooled[0]}
