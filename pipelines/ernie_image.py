"""ERNIE-Image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from mmalign.pipelines.family import Family, FoldedStatistics, filled, schedule
from mmalign.pipelines.flow import Condition

EPSILON = 1e-5  # of the autoencoder's variances, as it was trained, whatever its configuration says


class ErnieImage(FoldedStatistics, Family):
    """Adapter of `ErnieImagePipeline`: latents are FLUX.2's, four places in one.

    Prompts are taken as they are, as with `use_pe=False`: `policy.leave_out: [pe]` does not load what would
    write them anew.
    """

    kind = "ErnieImagePipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    patch = 1
    default_side = 64

    def encode(self, text: str) -> Condition:
        (embeds,) = self.pipeline.encode_prompt([text], self.device)
        kept, mask = filled(embeds, self.max_sequence_length, text)
        return {"embeds": kept, "mask": mask}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self.pipeline.scheduler, steps, np.linspace(1.0, 0.0, steps + 1)[:-1].tolist(), None)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        velocity: Tensor = network(
            hidden_states=x.to(condition["embeds"].dtype),
            timestep=sigma * 1000,
            text_bth=condition["embeds"],
            text_lens=condition["mask"].sum(1),
            return_dict=False,
        )[0]
        return velocity

    def _moments(self) -> tuple[Tensor, Tensor]:
        norm = self.pipeline.vae.bn
        std = (norm.running_var + EPSILON).sqrt()
        return norm.running_mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)
