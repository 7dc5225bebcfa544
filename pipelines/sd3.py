"""Stable Diffusion 3 and 3.5 (medium, large, turbo), with or without the T5 encoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmalign.pipelines.family import Family, schedule
from mmalign.pipelines.flow import Condition


class SD3(Family):
    """Adapter of `StableDiffusion3Pipeline`, equal to it in texts, schedule, guidance and decoding."""

    kind = "StableDiffusion3Pipeline"
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        shape = super().latent_shape(height, width)
        most = self.config.pos_embed_max_size * self.patch * self.scale
        for name, places in zip(("height", "width"), shape[1:], strict=True):
            if (pixels := places * self.scale) > most:
                raise ValueError(f"policy.{name} can be at most {most} for this model, got {pixels}")
        return shape

    def encode(self, text: str) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            [text],
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        scheduler = self.pipeline.scheduler
        mu = self.shift(steps, shape) if scheduler.config.get("use_dynamic_shifting") else None
        return schedule(scheduler, steps, None, mu)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        velocity: Tensor = network(
            hidden_states=x,
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,  # exact, never rounded
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return velocity
