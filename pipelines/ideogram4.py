"""Ideogram 4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmalign.pipelines.family import Family, FoldedStatistics, schedule
from mmalign.pipelines.flow import Condition


class Ideogram4(FoldedStatistics, Family):
    """Adapter of `Ideogram4Pipeline`: a second network, which sees no text and is not trained, guides it.

    With w of `policy.guidance`, a step goes by w c + (1 - w) u. The pipeline's own list of w by steps is that
    of its 48; a policy has one. Its schedule begins at a sigma of 0.9999, and here with as much noise.
    Latents are FLUX.2's, four places in one, in an order of its own. Prompts are taken as they are
    (`prompt_upsampling=False`).
    """

    kind = "Ideogram4Pipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    patch = 1

    @property
    def scale(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def default_pixels(self) -> tuple[int, int]:
        return self.default("height"), self.default("width")

    def encode(self, text: str) -> Condition:
        embeds, _, _, indicator = self.pipeline.encode_prompt(
            text, 0, 0, self.max_sequence_length, self.device
        )
        return {"embeds": embeds[0].to(self.network.dtype), "mask": indicator[0] != 0}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        from diffusers.pipelines.ideogram4 import pipeline_ideogram4 as plain

        high, wide = (side * self.scale for side in shape[1:])
        mu = plain._resolution_aware_mu(high, wide, self.default("mu"))
        levels = plain._logit_normal_sigmas(steps, mu, std=self.default("std"))
        return schedule(self.pipeline.scheduler, steps, levels.tolist(), None)

    def rows(self, guidance: float) -> int:
        """Of the network that is trained: what guides is another one."""
        return 1

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        negative: Condition | None,
        guidance: float,
    ) -> Tensor:
        positive = self.predict(network, x, sigma, condition).float()
        if guidance == 1:
            return positive
        unseen = {name: tensor[:, :0] for name, tensor in condition.items()}
        away = self.predict(self.pipeline.unconditional_transformer, x, sigma, unseen).float()
        return guidance * positive + (1 - guidance) * away

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        embeds, tokens = condition["embeds"], x.flatten(2).transpose(1, 2)
        words, squares = embeds.shape[1], tokens.shape[1]
        lengths = condition["mask"].sum(1).tolist()
        places, segments, roles = self.pipeline._prepare_ids(lengths, *x.shape[2:], words, x.device)
        seen = torch.cat([tokens.new_zeros(len(x), words, tokens.shape[2]), tokens], 1)
        features = torch.cat([embeds, embeds.new_zeros(len(x), squares, embeds.shape[2])], 1)
        found: Tensor = network(
            hidden_states=seen.to(embeds.dtype),
            timestep=1 - sigma,
            encoder_hidden_states=features,
            position_ids=places,
            segment_ids=segments,
            indicator=roles,
            return_dict=False,
        )[0]
        return -found[:, words:].transpose(1, 2).reshape(x.shape)

    # ---- media

    def from_vae(self, raw: Tensor) -> Tensor:
        n, channels, high, wide = raw.shape
        cells = raw.reshape(n, channels, high // 2, 2, wide // 2, 2).permute(0, 3, 5, 1, 2, 4)
        mean, std = self._moments()
        return (cells.reshape(n, 4 * channels, high // 2, wide // 2) - mean) / std

    def to_vae(self, latents: Tensor) -> Tensor:
        n, channels, high, wide = latents.shape
        mean, std = self._moments()
        cells = (latents * std + mean).reshape(n, 2, 2, channels // 4, high, wide)
        return cells.permute(0, 3, 4, 1, 5, 2).reshape(n, channels // 4, 2 * high, 2 * wide)
