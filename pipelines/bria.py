"""Bria 3.2 and FIBO, whose networks grew out of that of FLUX.1, and Fibo 2.0, whose own did of Z-Image's."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.pipelines.family import Family, FoldedStatistics, Standardized, filled, schedule
from mmalign.pipelines.flow import Condition
from mmalign.pipelines.flux import Flux


class Bria(Flux):
    """Adapter of `BriaPipeline`: guidance leads away from nothing where there is no negative prompt.

    Texts are not masked, and of 128 tokens whatever `policy.max_sequence_length` is.
    """

    kind = "BriaPipeline"
    clock = 1000

    @property
    def scale(self) -> int:
        return int(self.pipeline.vae_scale_factor) // 2

    def encode(self, text: str) -> Condition:
        embeds, *_ = self.pipeline.encode_prompt(
            [text], device=self.device, do_classifier_free_guidance=False
        )
        return {"embeds": embeds[0]}

    def encode_negative(self, text: str, pictures: Tensor) -> Condition:
        seen = self.encode(text)
        return seen if text else {name: torch.zeros_like(tensor) for name, tensor in seen.items()}

    def named(self, x: Tensor, condition: Condition) -> dict[str, Tensor | None]:
        return {}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        from diffusers.pipelines.bria import pipeline_bria as plain

        scheduler = self.pipeline.scheduler
        if scheduler.config.get("use_dynamic_shifting"):
            return super().sigmas(steps, shape)
        own = plain.get_original_sigmas(scheduler.config.num_train_timesteps, steps)
        return schedule(scheduler, steps, own.tolist(), None)


class Fibo(Standardized, Family):
    """Adapter of `BriaFiboPipeline`: every block of its network sees a layer of the text's encoder."""

    kind = "BriaFiboPipeline"
    patch = 1
    default_side = 64

    def encode(self, text: str) -> Condition:
        embeds, _, _, mask, _, layers, _ = self.pipeline.encode_prompt(
            [text], self.device, guidance_scale=1.0, max_sequence_length=self.max_sequence_length
        )
        blocks = self.config.num_layers + self.config.num_single_layers
        seen = torch.stack([*layers, *[layers[-1]] * (blocks - len(layers))][-blocks:], 1)
        less = self.max_sequence_length - embeds.shape[1]
        return {
            "embeds": F.pad(embeds[0], (0, 0, 0, less)),
            "layers": F.pad(seen[0], (0, 0, 0, less)),
            "mask": F.pad(mask[0].bool(), (0, less)),
        }

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        embeds, tokens = condition["embeds"], x.flatten(2).transpose(1, 2)
        sides = (torch.arange(side, device=x.device, dtype=x.dtype) for side in x.shape[2:])
        seen = F.pad(condition["mask"], (0, tokens.shape[1]), value=True)
        velocity: Tensor = network(
            hidden_states=tokens.to(embeds.dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=embeds,
            text_encoder_layers=list(condition["layers"].unbind(1)),
            joint_attention_kwargs={"attention_mask": seen[:, None, None, :]},
            txt_ids=x.new_zeros(embeds.shape[1], 3),
            img_ids=torch.cartesian_prod(x.new_zeros(1), *sides),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).reshape(x.shape)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents[:, :, None])[:, :, 0]

    def latents(self, media: Tensor) -> Tensor:
        return super().latents(media[:, :, None])[:, :, 0]


class Fibo2(FoldedStatistics, Family):
    """Adapter of `BriaFibo2Pipeline`, text to image: some blocks see layers of the text's encoder.

    Captions in JSON lose what is empty in them, as those of its training. The encoder is shown no pictures
    of the texts that a caption asks for (`render_text_images=False`). Where there is no negative prompt,
    guidance leads away from the empty caption that it was trained with.
    """

    kind = "BriaFibo2Pipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def encode(self, text: str) -> Condition:
        caption, _ = self.pipeline._parse_prompt(text)
        if not isinstance(caption, str):
            text = json.dumps(caption or {}, separators=(",", ":"), ensure_ascii=False)
        return self._encode(text)

    def encode_negative(self, text: str, pictures: Tensor) -> Condition:
        from diffusers.pipelines.bria_fibo2.pipeline_bria_fibo2 import DEFAULT_NEGATIVE_PROMPT

        return self._encode(text or DEFAULT_NEGATIVE_PROMPT)

    def _encode(self, text: str) -> Condition:
        (bundles,), _ = self.pipeline.encode_prompt([text], device=self.device)
        tokens = bundles.transpose(0, 1).flatten(1)
        kept, mask = filled(tokens, self.max_sequence_length, text)
        return {"embeds": kept, "mask": mask}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        tokens, seen = condition["embeds"], 1 + len(self.config.injection_layer_ids)
        velocity: Tensor = network(
            hidden_states=x.to(tokens.dtype),
            timestep=sigma,
            encoder_hidden_states=tokens.unflatten(2, (seen, -1)).transpose(1, 2),
            encoder_attention_mask=condition["mask"],
            return_dict=False,
        )[0]
        return velocity

    def from_vae(self, raw: Tensor) -> Tensor:
        return F.pixel_shuffle(super().from_vae(raw), 2)

    def to_vae(self, latents: Tensor) -> Tensor:
        return super().to_vae(F.pixel_unshuffle(latents, 2))
