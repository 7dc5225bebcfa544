"""Qwen-Image 2.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmalign.pipelines.family import Family, Standardized, filled, schedule
from mmalign.pipelines.flow import Condition


class QwenImage21(Standardized, Family):
    """Adapter of `QwenImage21Pipeline`, text to image.

    Its pictures have a fourth channel, how much they cover; here they lie on white. Its texts are not masked:
    places of the picture are counted on from the end of the text, so that texts of unequal length are asked
    about apart.
    """

    kind = "QwenImage21Pipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    default_side = 64

    def encode(self, text: str) -> Condition:
        (embeds,), *_ = self.pipeline.encode_prompt([text], device=self.device)
        kept, mask = filled(embeds, self.max_sequence_length, text)
        return {"embeds": kept, "mask": mask}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        own = self.pipeline.config.sample_sigmas
        if own is None:
            return super().sigmas(steps, shape)
        if len(own) != steps:
            raise ValueError(f"this model is sampled in {len(own)} steps, at sigmas of its own; got {steps}")
        return schedule(self.pipeline.scheduler, steps, own, self.shift(steps, shape))

    def tokens(self, shape: Sequence[int]) -> int:
        """One for each place, although sides are of even length."""
        return int(shape[1] * shape[2])

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        lengths = condition["mask"].sum(1)
        found = torch.empty_like(x)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            found[rows] = self._equal(network, x[rows], sigma[rows], condition["embeds"][rows, :length])
        return found

    def _equal(self, network: nn.Module, x: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        words, squares = embeds.shape[1], self.tokens(x.shape[1:]) // 4
        drawn = torch.arange(words + squares, device=x.device) >= words
        velocity: Tensor = network(
            hidden_states=x.flatten(2).transpose(1, 2).to(embeds.dtype),
            timestep=sigma,
            encoder_hidden_states=embeds,
            img_shapes=[[(1, *x.shape[2:])]] * len(x),
            img_mask=drawn.expand(len(x), -1),
            return_dict=False,
        )[0]
        return torch.unflatten(velocity[:, -4 * squares :].transpose(1, 2), 2, x.shape[2:]).float()

    def decode(self, latents: Tensor) -> Tensor:
        color, cover = super().decode(latents[:, :, None])[:, :, 0].split([3, 1], 1)
        return color * cover + (1 - cover)

    def latents(self, media: Tensor) -> Tensor:
        whole = torch.cat([media, torch.ones_like(media[:, :1])], 1)
        return super().latents(whole[:, :, None])[:, :, 0]
