"""PixArt-alpha and PixArt-Sigma: transformers that predict noise, sampled as `pipelines/sd.py` says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmalign.pipelines.family import Family
from mmalign.pipelines.flow import Condition
from mmalign.pipelines.sd import Diffusion


class PixArtSigma(Diffusion, Family):
    """Adapter of `PixArtSigmaPipeline`, equal to it with a `DDIMScheduler` where no noise is drawn.

    That is where the scheduler counts whole steps of its table (leading or trailing). On a table of even
    places (linspace, as the published models have it) that scheduler steps past them; here they are kept to.

    The variance that its network learned beside the noise has no part in it. diffusers gives its network no
    adapters, so that its LoRA is written as peft reads it. Pictures are drawn at the policy's size, without
    the pipeline's list of sizes (`use_resolution_binning=False`).
    """

    kind = "PixArtSigmaPipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def read_schedule(self) -> None:
        from diffusers import DDIMScheduler

        self.read_table(DDIMScheduler)

    def encode(self, text: str) -> Condition:
        embeds, mask, *_ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds[0], "mask": mask[0]}

    def predict(self, network: nn.Module, y: Tensor, t: Tensor, condition: Condition) -> Tensor:
        predicted: Tensor = network(
            hidden_states=y.to(condition["embeds"].dtype),
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            timestep=t,
            added_cond_kwargs=self.sizes(y),
            return_dict=False,
        )[0]
        return predicted[:, : self.channels]

    def sizes(self, y: Tensor) -> dict[str, Tensor | None]:
        """What the network is told of the picture that it draws."""
        return {"resolution": None, "aspect_ratio": None}

    def from_vae(self, raw: Tensor) -> Tensor:
        return super().from_vae(raw) / self._end.sqrt().to(raw.device)

    def to_vae(self, latents: Tensor) -> Tensor:
        return super().to_vae(latents * self._end.sqrt().to(latents.device))


class PixArtAlpha(PixArtSigma):
    """Adapter of `PixArtAlphaPipeline`: that of 1024 pixels is told the size of the picture."""

    kind = "PixArtAlphaPipeline"

    def sizes(self, y: Tensor) -> dict[str, Tensor | None]:
        if self.config.sample_size != self.default_side:
            return super().sizes(y)
        high, wide = (side * self.scale for side in y.shape[2:])
        told = torch.tensor([[high, wide]], dtype=y.dtype, device=y.device).expand(len(y), -1)
        return {"resolution": told, "aspect_ratio": told[:, :1] / told[:, 1:]}
