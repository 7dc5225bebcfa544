"""HunyuanVideo, text to video."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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
