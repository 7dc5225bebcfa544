"""Stable Diffusion 3 and 3.5 (medium, large, turbo), with or without the T5 encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.flow import DTYPES, Condition, guided


class SD3:
    """Adapter of `StableDiffusion3Pipeline`, equal to it in texts, schedule, guidance and decoding."""

    component = "transformer"
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

    def __init__(self, settings: PolicySettings) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        frozen = DTYPES[settings.precision]
        dtypes = {
            "transformer": frozen if settings.lora.rank else torch.float32,
            "vae": torch.float32,  # its half-precision errors are visible, and it is a small part of the cost
            "default": frozen,
        }
        index = StableDiffusion3Pipeline.load_config(settings.model)
        absent = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None]
        for name in settings.leave_out:
            if name not in index:
                raise ValueError(f"policy.leave_out: {name} is no component of {settings.model}")
            absent.append(name)
        if "text_encoder_3" in absent:
            absent.append("tokenizer_3")
        nothing = dict.fromkeys(absent)
        self.pipeline: Any = StableDiffusion3Pipeline.from_pretrained(settings.model, dtype=dtypes, **nothing)
        self.network: nn.Module = self.pipeline.transformer
        self.max_sequence_length = settings.max_sequence_length
        scheduler = self.pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"its scheduler is {type(scheduler).__name__}, but stochastic steps are defined on the "
                "schedule of FlowMatchEulerDiscreteScheduler"
            )

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        scale, config = self.pipeline.vae_scale_factor, self.pipeline.transformer.config
        cell = scale * config.patch_size
        shape = [config.in_channels]
        for name, pixels in (("height", height), ("width", width)):
            pixels = config.sample_size * scale if pixels is None else pixels
            if pixels < cell or pixels % cell:
                raise ValueError(f"policy.{name} must be a multiple of {cell} for this model, got {pixels}")
            if pixels > (most := config.pos_embed_max_size * cell):
                raise ValueError(f"policy.{name} can be at most {most} for this model, got {pixels}")
            shape.append(pixels // scale)
        return tuple(shape)

    def encode(self, text: str) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            [text],
            None,
            None,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        scheduler = copy.deepcopy(self.pipeline.scheduler)
        config, patch = scheduler.config, self.pipeline.transformer.config.patch_size
        mu = None
        if config.get("use_dynamic_shifting"):
            mu = calculate_shift(
                (shape[1] // patch) * (shape[2] // patch),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        scheduler.set_timesteps(steps, mu=mu)
        return torch.as_tensor(scheduler.sigmas)

    def rows(self, guidance: float) -> int:
        return 2 if guidance > 1 else 1

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        negative: Condition | None,
        guidance: float,
    ) -> Tensor:
        if negative is not None:
            x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
            condition = {name: torch.cat([negative[name], condition[name]]) for name in condition}
        velocity: Tensor = network(
            hidden_states=x,
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,  # exact, never rounded
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return velocity.float() if negative is None else guided(velocity, guidance)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)

    def latents(self, media: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean = vae.encode(media * 2 - 1).latent_dist.mean
        latents: Tensor = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        return latents
