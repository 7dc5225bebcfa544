"""Kandinsky 3: a UNet that predicts noise, sampled as `pipelines/sd.py` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.flow import Condition
from mmalign.pipelines.pixart import PixArtSigma

CUT, PADDING = -20000.0, -10000.0  # what attention adds where a place is cut away, and where it is not seen


class Kandinsky3(PixArtSigma):
    """Adapter of `Kandinsky3Pipeline`, equal to it for one prompt at a time.

    Its scheduler is DDPM, which clips the clean estimate, and so do the velocities here: `Noise("ddim", 1)`
    is that scheduler, and where no noise is drawn it is a `DDIMScheduler` that clips and keeps to what it has
    clipped (`use_clipped_model_output`). The pipeline guides at scales above 1, that is at guidances above 2.

    Texts are of 128 tokens, whatever `policy.max_sequence_length` is. Its network sees them cut one token
    behind their end, and what guidance leads away from cut to that length; the pipeline cuts all texts of a
    batch where the longest ends, which no sample here depends on. An empty negative prompt is zeros, of which
    nothing is seen.
    """

    kind = "Kandinsky3Pipeline"
    component = "unet"
    autoencoder = "movq"
    scale = patch = 8  # type: ignore[assignment]  # its levels halve a latent three times

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        super().__init__(settings, pipeline)
        pooling: Any = self.network.add_time_condition
        pooling.attention.register_forward_pre_hook(_mean_of_seen)

    def read_schedule(self) -> None:
        from diffusers import DDIMScheduler

        self.read_table(DDIMScheduler)
        self.scheduler.final_alpha_cumprod = torch.ones(())  # DDPM ends at the clean estimate itself

    def read_clip(self, config: Mapping[str, Any]) -> None:
        super().read_clip({**config, "clip_sample": False})
        clips = config.get("clip_sample")
        self.limit: float | None = config.get("clip_sample_range", 1.0) if clips else None

    def encode(self, text: str) -> Condition:
        embeds, _, mask, _ = self.pipeline.encode_prompt([text], False, device=self.device)
        return {"embeds": embeds[0], "mask": mask[0]}

    def encode_negative(self, text: str, pictures: Tensor) -> Condition:
        seen = self.encode(text)
        return seen if text else {name: torch.zeros_like(part) for name, part in seen.items()}

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        negative: Condition | None,
        guidance: float,
    ) -> Tensor:
        mask = condition["mask"]
        kept = {"kept": torch.arange(mask.shape[1], device=mask.device) <= mask.sum(1, keepdim=True)}
        condition = {**condition, **kept}
        negative = negative and {**negative, **kept}
        velocity = super().velocity(network, x, sigma, condition, negative, guidance)
        if self.limit is None:
            return velocity
        s = sigma.reshape(-1, 1, 1, 1)
        return (x - (x - s * velocity).clamp(-self.limit, self.limit)) / s

    def predict(self, network: nn.Module, y: Tensor, t: Tensor, condition: Condition) -> Tensor:
        # The network adds PADDING where this is 0.
        told = condition["mask"].to(y.dtype).where(condition["kept"], 1 - CUT / PADDING)
        predicted: Tensor = network(
            y.to(condition["embeds"].dtype),
            t,
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=told,
            return_dict=False,
        )[0]
        return predicted

    def decode(self, latents: Tensor) -> Tensor:
        media: Tensor = self.vae.decode(latents, force_not_quantize=True).sample
        return (media / 2 + 0.5).clamp(0, 1)

    def latents(self, media: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(media * 2 - 1).latents
        return latents


def _mean_of_seen(pooling: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a text is asked with is the mean of its tokens, padding among them, but not what is cut away."""
    _, context, added = args
    kept = (added > (CUT + PADDING) / 2).to(context.dtype)
    return (kept @ context) / kept.sum(2, keepdim=True), context, added
