"""Z-Image (base and turbo) and Z-Image-Omni."""

from __future__ import annotations

from collections.abc import Sequence

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
        latents = x.to(condition["embeds"].dtype)[:, :, None].unbind()
        return -torch.stack(self.ahead(network, latents, 1 - sigma, texts)).float()[:, :, 0]

    def ahead(
        self, network: nn.Module, latents: Sequence[Tensor], time: Tensor, texts: Sequence[Tensor]
    ) -> list[Tensor]:
        """What the network says of latents [C, 1, h, w] and embeddings [L, D] of as many texts."""
        return list(network(list(latents), time, list(texts), return_dict=False)[0])


class ZImageOmni(ZImage):
    """Adapter of `ZImageOmniPipeline`, text to image; its guidance scale counts as Z-Image's.

    It is shown no pictures, and the layers that would see some get no adapters: `policy.leave_out: [siglip,
    siglip_processor]` does not load their encoder.
    """

    kind = "ZImageOmniPipeline"
    idle = ("siglip_",)  # type: ignore[assignment]

    def encode(self, text: str) -> Condition:
        ((embeds,),), _ = self.pipeline.encode_prompt(
            [text],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        kept, mask = padded(embeds, self.max_sequence_length)
        return {"embeds": kept, "mask": mask}

    def ahead(
        self, network: nn.Module, latents: Sequence[Tensor], time: Tensor, texts: Sequence[Tensor]
    ) -> list[Tensor]:
        count = len(latents)
        found = network(
            [[one] for one in latents],
            time,
            [[text] for text in texts],
            siglip_feats=[None] * count,
            image_noise_mask=[[1]] * count,
            return_dict=False,
        )[0]
        return list(found)
