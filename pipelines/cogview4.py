"""CogView4."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.pipelines.family import Family, padded, schedule
from mmalign.pipelines.flow import Condition


class CogView4(Family):
    """Adapter of `CogView4Pipeline`.

    Its texts are not masked: they are as long as they are, in units of 16 tokens, and texts of unequal length
    are asked about apart. Its network is told the time before the schedule was shifted.
    """

    kind = "CogView4Pipeline"

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.config.patch_size)

    def encode(self, text: str) -> Condition:
        embeds, _ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        longest = -(-self.max_sequence_length // 16) * 16
        kept, mask = padded(embeds[0], longest)
        return {"embeds": kept, "mask": mask}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        whole = self.pipeline.scheduler.config.num_train_timesteps
        times = np.linspace(whole, 1.0, steps).astype(np.int64) / whole
        return schedule(self.pipeline.scheduler, steps, times.tolist(), self.shift(steps, shape))

    def shift(self, steps: int, shape: Sequence[int]) -> float:
        """mu grows with the root of the number of tokens."""
        config = self.pipeline.scheduler.config
        base, low, high = (
            config.get(name, usual)
            for name, usual in (("base_image_seq_len", 256), ("base_shift", 0.25), ("max_shift", 0.75))
        )
        return float((self.tokens(shape) / base) ** 0.5 * high + low)

    def unshifted(self, sigma: Tensor, shape: Sequence[int]) -> Tensor:
        """The sigma [n] that the schedule's shift has moved to this one."""
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            strength = self.pipeline.scheduler.shift
        else:
            mu = self.shift(0, shape)
            strength = mu if config.time_shift_type == "linear" else math.exp(mu)
        return sigma / (sigma + strength * (1 - sigma))

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        lengths = condition["mask"].sum(1)
        found = torch.empty_like(x)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            found[rows] = self._equal(network, x[rows], sigma[rows], condition["embeds"][rows, :length])
        return found

    def _equal(self, network: nn.Module, x: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        pixels = embeds.new_tensor([[side * self.scale for side in x.shape[2:]]]).expand(len(x), -1)
        velocity: Tensor = network(
            hidden_states=x.to(embeds.dtype),
            encoder_hidden_states=embeds,
            timestep=self.unshifted(sigma, x.shape[1:]) * self.pipeline.scheduler.config.num_train_timesteps,
            original_size=pixels,
            target_size=pixels,
            crop_coords=torch.zeros_like(pixels),
            return_dict=False,
        )[0]
        return velocity.float()
