"""CogView3-Plus: a transformer that predicts v, sampled as `pipelines/sd.py` says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmalign.pipelines.flow import Condition
from mmalign.pipelines.pixart import PixArtSigma


class CogView3Plus(PixArtSigma):
    """Adapter of `CogView3PlusPipeline`, equal to it with a `CogVideoXDDIMScheduler` where no noise is drawn.

    That scheduler counts whole steps of its table, so that is where the number of steps divides its length.
    Texts are not masked, and of 224 tokens whatever `policy.max_sequence_length` is.
    """

    kind = "CogView3PlusPipeline"

    def read_schedule(self) -> None:
        from diffusers import CogVideoXDDIMScheduler

        self.read_table(CogVideoXDDIMScheduler)

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.config.patch_size)

    def encode(self, text: str) -> Condition:
        embeds, _ = self.pipeline.encode_prompt([text], do_classifier_free_guidance=False, device=self.device)
        return {"embeds": embeds[0]}

    def predict(self, network: nn.Module, y: Tensor, t: Tensor, condition: Condition) -> Tensor:
        pixels = y.new_tensor([[side * self.scale for side in y.shape[2:]]]).repeat(len(y), 1)
        predicted: Tensor = network(
            hidden_states=y.to(condition["embeds"].dtype),
            encoder_hidden_states=condition["embeds"],
            timestep=t,
            original_size=pixels,
            target_size=pixels,
            crop_coords=torch.zeros_like(pixels),
            return_dict=False,
        )[0]
        return predicted
