"""Z-Image (base and turbo)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmalign.pipelines.family import Family, padded
from mmalign.pipelines.flow import Condition


class ZImage(Family):
    """Adapter of `ZImagePipeline`: time runs upward and the prediction points to the data.

    Its guidance scale g counts from the conditional prediction, c + g (c - u). `policy.guidance` counts as
    everywhere, u + w (c - u), so w = g + 1: 1 is off, and the pipeline's 5 is 6 here.
    """

    kind = "ZImagePipeline"

    def encode(self, text: str) -> Condition:
        embeds, _ = self.pipeline.encode_prompt(
            [text],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        kept, mask = padded(embeds[0], self.max_sequence_length)
        return {"embeds": kept, "mask": mask}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        lengths = condition["mask"].sum(1).tolist()
        texts = [embeds[:length] for embeds, length in zip(condition["embeds"], lengths, strict=True)]
        dtype = condition["embeds"].dtype
        found = network(list(x.to(dtype)[:, :, None].unbind()), 1 - sigma, texts, return_dict=False)[0]
        return -torch.stack(list(found)).float()[:, :, 0]
