"""FLUX.2 (dev) and FLUX.2 Klein, with or without reference pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import Family, FoldedStatistics
from mmalign.pipelines.flow import Condition


class Flux2(FoldedStatistics, Family):
    """Adapter of `Flux2Pipeline`: latents are the autoencoder's, four places in one, of its own statistics.

    Pictures that a prompt names as its source are references, as many for every prompt. What dev is told its
    guidance is, is `policy.embedded_guidance`; it has no other.
    """

    kind = "Flux2Pipeline"
    lora_targets = (*Family.lora_targets, "attn.to_qkv_mlp_proj")
    needs_pictures = False
    patch = 1
    default_side = 64
    told_guidance = True

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        super().__init__(settings, pipeline)
        if self.told_guidance and settings.guidance > 1:
            raise ValueError(
                "policy.guidance must be 1: FLUX.2 is told its guidance, which is policy.embedded_guidance"
            )

    @property
    def scale(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def encode(self, text: str) -> Condition:
        embeds, places = self.pipeline.encode_prompt(
            [text], device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds[0], "text_places": places[0]}

    def encode_with(self, text: str, pictures: Tensor) -> Condition:
        seen = self.encode(text)
        return {**seen, "pictures": self.latents(pictures)} if len(pictures) else seen

    def shift(self, steps: int, shape: Sequence[int]) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(self.tokens(shape), steps)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        tokens, places = _row(x), self._places(x, 0)
        pictures = condition.get("pictures")
        if pictures is not None:
            count = pictures.shape[1]
            tokens = torch.cat([tokens, *map(_row, pictures.unbind(1))], 1)
            places = torch.cat([places, *(self._places(x, 10 + 10 * i) for i in range(count))])
        velocity: Tensor = network(
            hidden_states=tokens,
            timestep=sigma,
            guidance=self.told(x) if self.told_guidance else None,
            encoder_hidden_states=condition["embeds"],
            txt_ids=condition["text_places"],
            img_ids=places.expand(len(x), -1, -1),
            return_dict=False,
        )[0]
        return velocity[:, : self.tokens(x.shape[1:])].transpose(1, 2).reshape(x.shape)

    def _places(self, x: Tensor, first: int) -> Tensor:
        """The coordinates of every token, [h w, 4]; first: which picture it belongs to."""
        high, wide = (torch.arange(side, device=x.device) for side in x.shape[2:])
        none = torch.zeros(1, device=x.device, dtype=torch.int64)
        return torch.cartesian_prod(none + first, high, wide, none)


class Flux2Klein(Flux2):
    """Adapter of `Flux2KleinPipeline`: true guidance, and a smaller text encoder."""

    kind = "Flux2KleinPipeline"
    told_guidance = False


def _row(x: Tensor) -> Tensor:
    """[n, C, h, w] as tokens [n, h w, C]."""
    return x.flatten(2).transpose(1, 2)
