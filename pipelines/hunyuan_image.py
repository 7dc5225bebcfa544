"""HunyuanImage 2.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import Family, schedule
from mmalign.pipelines.flow import Condition


class HunyuanImage(Family):
    """Adapter of `HunyuanImagePipeline`; `policy.guidance` takes the place of its guiders.

    The published model's are of another kind, adaptive projection with a momentum: under those a step depends
    on the steps before it, and has no density of its own. Texts are of 1000 tokens, and of 128 letters in
    quotes, whatever `policy.max_sequence_length` is.
    """

    kind = "HunyuanImagePipeline"
    default_side = 64

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        super().__init__(settings, pipeline)
        if self.config.use_meanflow or self.config.guidance_embeds:
            raise ValueError(
                "policy.model: distilled models of HunyuanImage 2.1 predict the mean velocity up to a second "
                "time, and stochastic steps are defined on that at one; name a model whose transformer has "
                "use_meanflow and guidance_embeds false"
            )

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.config.patch_size[0])

    def encode(self, text: str) -> Condition:
        embeds, mask, glyphs, glyph_mask = self.pipeline.encode_prompt([text], device=self.device)
        return {"embeds": embeds[0], "mask": mask[0], "glyphs": glyphs[0], "glyph_mask": glyph_mask[0]}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self.pipeline.scheduler, steps, np.linspace(1.0, 0.0, steps + 1)[:-1].tolist(), None)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        embeds = condition["embeds"]
        velocity: Tensor = network(
            hidden_states=x.to(embeds.dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=embeds,
            encoder_attention_mask=condition["mask"],
            encoder_hidden_states_2=condition["glyphs"].to(embeds.dtype),
            encoder_attention_mask_2=condition["glyph_mask"],
            return_dict=False,
        )[0]
        return velocity
