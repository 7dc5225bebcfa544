"""HiDream-I1, text to image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import Family, schedule
from mmalign.pipelines.flow import Condition


class HiDream(Family):
    """Adapter of `HiDreamImagePipeline`, whose network is a mixture of experts and predicts data less noise.

    Any size that the network has places for is drawn as it is; the pipeline brings sizes to a megapixel. In
    diffusers a network that is not in training has experts without gradients, so that its experts, and they
    alone, are held in training; they give the same then.
    """

    kind = "HiDreamImagePipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t")

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

        super().__init__(settings, pipeline)
        self.mixtures = [part for part in self.network.modules() if isinstance(part, MOEFeedForwardSwiGLU)]

    def sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        high, wide = super().sides(height, width)
        tokens, most = high * wide // self.patch**2, self.pipeline.transformer.max_seq
        if tokens > most:
            raise ValueError(
                f"policy.height and policy.width: this model has {most} places, and a picture of {high} x "
                f"{wide} latents takes {tokens}"
            )
        return high, wide

    def encode(self, text: str) -> Condition:
        t5, _, llama, _, pooled, _ = self.pipeline.encode_prompt(
            [text],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"t5": t5[0], "llama": llama[:, 0], "pooled": pooled[0]}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self.pipeline.scheduler, steps, None, self.shift(steps, shape))

    def shift(self, steps: int, shape: Sequence[int]) -> float:
        """That of as many tokens as the network has places for, whatever the size."""
        return (self.pipeline.transformer.max_seq - 256) * (1.15 - 0.5) / (4096 - 256) + 0.5

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        for mixture in self.mixtures:
            mixture.training = True
        ahead: Tensor = network(
            hidden_states=x.to(condition["t5"].dtype),
            timesteps=sigma * 1000,
            encoder_hidden_states_t5=condition["t5"],
            encoder_hidden_states_llama3=condition["llama"].transpose(0, 1),
            pooled_embeds=condition["pooled"],
            return_dict=False,
        )[0]
        return -ahead
