"""Stable Diffusion 1.x, 2.x and XL: models that predict the noise, or v, of a variance-preserving process.

Such a model lives in y = sqrt(a) x0 + sqrt(1 - a) e, with a from a table over its training steps t. With

    c = sqrt(a) + sqrt(1 - a)       sigma = sqrt(1 - a) / c       x = y / c = (1 - sigma) x0 + sigma e

it is a flow model at other times, and everything that holds for those holds for it: the Euler step in x is
the deterministic DDIM step in y, and `Noise("ddim", eta)` is DDIM with eta. Its velocity e - x0 is

    (e - x) / (1 - sigma)                        where it predicts e
    c v + (2 sigma - 1) c^2 x                    where it predicts v = sqrt(a) e - sqrt(1 - a) x0

Whatever scheduler the model comes with, it is sampled by DDIM on that scheduler's table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import other_vae, rescaled
from mmalign.pipelines.flow import DTYPES, Condition, guided

PREDICTIONS = ("epsilon", "v_prediction")


class Diffusion:
    """What adapters of models that predict noise, or v, have in common, whatever they draw.

    rescale: how far guided predictions are brought back to the standard deviation of the positive ones.
    """

    pipeline: Any
    scheduler: Any
    rescale = 0.0

    def read_table(self, kind: Any) -> None:
        """Sample by the DDIM scheduler `kind` on the model's table; ValueError where none fits."""
        config = self.pipeline.scheduler.config
        if "beta_schedule" not in config:
            raise ValueError(
                f"its scheduler is {type(self.pipeline.scheduler).__name__}, but a model that predicts noise "
                "needs the table of a diffusion scheduler (DDIM, PNDM, Euler, DPM-Solver, ...)"
            )
        if config.prediction_type not in PREDICTIONS:
            raise ValueError(
                f"it predicts {config.prediction_type}, and can predict {' or '.join(PREDICTIONS)}"
            )
        self.read_clip(config)
        self.scheduler = kind.from_config(config, clip_sample=False)
        self.predicts_noise = config.prediction_type == "epsilon"
        self.levels = sigma_of(self.scheduler.alphas_cumprod)
        if self.predicts_noise and self.levels[-1] >= 1:
            raise ValueError("its table ends in pure noise, of which a prediction of the noise says nothing")

    def read_clip(self, config: Mapping[str, Any]) -> None:
        """ValueError where the scheduler of this configuration clips its clean estimates."""
        if config.get("clip_sample") or config.get("thresholding"):
            raise ValueError("its scheduler clips the clean estimate, and steps with a clip have no density")

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The levels of the scheduler's timesteps, and the one that it takes for clean."""
        self.scheduler.set_timesteps(steps)
        return torch.cat([self.levels[self.scheduler.timesteps], sigma_of(self._end)])

    @property
    def _end(self) -> Tensor:
        return torch.as_tensor(self.scheduler.final_alpha_cumprod).reshape(1)

    def time(self, sigma: Tensor) -> Tensor:
        """The training step t, possibly between two, at which the noise is sigma [n]."""
        levels = self.levels.to(sigma.device)
        above = torch.searchsorted(levels, sigma.contiguous()).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return above - 1 + ((sigma - low) / (high - low)).clamp(0, 1)

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
        s = sigma.reshape(-1, *[1] * (x.ndim - 1))
        c = 1 / torch.hypot(s, 1 - s)
        y, t = x * c, self.time(sigma)
        if negative is not None:
            y, t = torch.cat([y, y]), torch.cat([t, t])
            condition = {name: torch.cat([negative[name], condition[name]]) for name in condition}
        predicted = self.predict(network, y, t, condition).float()
        if negative is not None:
            positive = predicted.chunk(2)[1]
            predicted = rescaled(guided(predicted, guidance), positive, self.rescale)
        if self.predicts_noise:
            return (predicted - x) / (1 - s)
        return c * predicted + (2 * s - 1) * c**2 * x

    def predict(self, network: nn.Module, y: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The noise, or v, that the network sees in y [n, C, *place] at the training steps t [n]."""
        raise NotImplementedError


class StableDiffusion(Diffusion):
    """Adapter of `StableDiffusionPipeline` with a `DDIMScheduler`, equal to it where no noise is drawn."""

    component = "unet"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        from diffusers import StableDiffusionPipeline

        # Neither filters of finished pictures nor image prompts take part in training.
        absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        self._read(StableDiffusionPipeline, settings, absent | {"requires_safety_checker": False}, pipeline)

    @property
    def config(self) -> Any:
        """Of the denoiser."""
        return self.pipeline.unet.config

    def _read(self, kind: Any, settings: PolicySettings, parts: dict[str, Any], pipeline: Any) -> None:
        from diffusers import DDIMScheduler

        if settings.leave_out:
            raise ValueError(f"policy.leave_out: nothing of a {kind.__name__} can be left out")
        if settings.shift is not None:
            raise ValueError(f"policy.shift must be null: the schedule of a {kind.__name__} has none")
        frozen = DTYPES[settings.precision]
        dtypes = {
            "unet": frozen if settings.lora.rank else torch.float32,
            "vae": torch.float32,  # its half-precision errors are visible, and it is a small part of the cost
            "default": frozen,
        }
        self.rescale = settings.guidance_rescale
        if pipeline is None:
            parts |= other_vae(settings, kind.load_config(settings.model))
        self.pipeline: Any = pipeline or kind.from_pretrained(settings.model, dtype=dtypes, **parts)
        self.network: nn.Module = self.pipeline.unet
        self.read_table(DDIMScheduler)

    @property
    def scale(self) -> int:
        return int(self.pipeline.vae_scale_factor)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        scale, config = self.scale, self.config
        cell, own = math.lcm(scale, 8), config.sample_size
        sides = [own, own] if isinstance(own, int) else list(own)
        shape = [config.in_channels]
        for name, pixels, side in zip(("height", "width"), (height, width), sides, strict=True):
            pixels = side * scale if pixels is None else pixels
            if pixels < cell or pixels % cell:
                raise ValueError(f"policy.{name} must be a multiple of {cell} for this model, got {pixels}")
            shape.append(pixels // scale)
        return tuple(shape)

    def encode(self, text: str) -> Condition:
        embeds, _ = self.pipeline.encode_prompt([text], self.pipeline.text_encoder.device, 1, False)
        return {"embeds": embeds[0]}

    def predict(self, network: nn.Module, y: Tensor, t: Tensor, condition: Condition) -> Tensor:
        named = self.conditioning(condition, y)
        predicted: Tensor = network(sample=y, timestep=t, return_dict=False, **named)[0]
        return predicted

    def conditioning(self, condition: Condition, y: Tensor) -> dict[str, Any]:
        """What the network is told besides y [n, C, h, w] and the time."""
        return {"encoder_hidden_states": condition["embeds"]}

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        scale = self._end.sqrt().to(latents.device) / vae.config.scaling_factor
        images: Tensor = vae.decode(latents * scale, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1)

    def latents(self, media: Tensor) -> Tensor:
        vae = self.pipeline.vae
        scale = self._end.sqrt().to(media.device) / vae.config.scaling_factor
        latents: Tensor = vae.encode(media * 2 - 1).latent_dist.mean / scale
        return latents


class StableDiffusionXL(StableDiffusion):
    """Adapter of `StableDiffusionXLPipeline`; an empty text is zeros where the model wants it so."""

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        from diffusers import StableDiffusionXLPipeline

        absent = {"feature_extractor": None, "image_encoder": None}
        self._read(StableDiffusionXLPipeline, settings, absent, pipeline)

    def encode(self, text: str) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            [text], device=self.pipeline.text_encoder_2.device, do_classifier_free_guidance=False
        )
        empty = not text and self.pipeline.config.force_zeros_for_empty_prompt
        return {"embeds": embeds[0] * (not empty), "pooled": pooled[0] * (not empty)}

    def conditioning(self, condition: Condition, y: Tensor) -> dict[str, Any]:
        height, width = (side * self.pipeline.vae_scale_factor for side in y.shape[2:])
        sizes = y.new_tensor([height, width, 0, 0, height, width])  # original, corner of the crop, target
        added = {"text_embeds": condition["pooled"], "time_ids": sizes.expand(len(y), -1)}
        return super().conditioning(condition, y) | {"added_cond_kwargs": added}


def sigma_of(alpha: Tensor) -> Tensor:
    """sigma = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)), computed in fp64."""
    signal, noise = alpha.double().sqrt(), (1 - alpha.double()).sqrt()
    return (noise / (signal + noise)).float()
