"""Nucleus-Image, a mixture of experts whose experts choose tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.pipelines.family import pack, unpack
from mmalign.pipelines.flow import Condition
from mmalign.pipelines.qwen_image import QwenImage


class NucleusImage(QwenImage):
    """Adapter of `NucleusMoEImagePipeline`: latents and guidance are Qwen-Image's, the prediction points on.

    Every expert chooses among the tokens of one picture, so that no picture depends on its neighbors.
    """

    kind = "NucleusMoEImagePipeline"

    def encode(self, text: str) -> Condition:
        embeds, mask = self.pipeline.encode_prompt(
            [text], device=self.device, max_sequence_length=self.max_sequence_length
        )
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        less = -(-self.max_sequence_length // 8) * 8 - embeds.shape[1]
        return {"embeds": F.pad(embeds[0], (0, 0, 0, less)), "mask": F.pad(mask[0].bool(), (0, less))}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        ahead: Tensor = network(
            hidden_states=pack(x),
            timestep=sigma,
            encoder_hidden_states=condition["embeds"],
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=[(1, x.shape[2] // 2, x.shape[3] // 2)] * len(x),
            return_dict=False,
        )[0]
        return -unpack(ahead, *x.shape[2:])
