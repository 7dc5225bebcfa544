"""FLUX.1 (dev, schnell, Krea), FLUX.1-Kontext, and Chroma, which grew out of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmalign.pipelines.family import Family, pack, unpack
from mmalign.pipelines.flow import Condition


class Flux(Family):
    """Adapter of `FluxPipeline`; what dev is told its guidance is, is `policy.embedded_guidance`.

    clock: what its network calls the time at the noise.
    """

    kind = "FluxPipeline"
    clock = 1

    @property
    def channels(self) -> int:
        return int(self.config.in_channels) // 4

    def encode(self, text: str) -> Condition:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            [text], device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        tokens, places = pack(x), self.places(x)
        if (pictures := condition.get("pictures")) is not None:
            tokens = torch.cat([tokens, *(pack(picture) for picture in pictures.unbind(1))], 1)
            places = torch.cat([places, *[self.places(x, 1.0)] * pictures.shape[1]])
        velocity: Tensor = network(
            hidden_states=tokens,
            timestep=sigma * self.clock,
            encoder_hidden_states=condition["embeds"],
            txt_ids=self.text_places(x, condition["embeds"].shape[1]),
            img_ids=places,
            return_dict=False,
            **self.named(x, condition),
        )[0]
        return unpack(velocity[:, : self.tokens(x.shape[1:])], *x.shape[2:])

    def named(self, x: Tensor, condition: Condition) -> dict[str, Tensor | None]:
        """What the network is told besides."""
        guidance = self.told(x) if self.config.guidance_embeds else None
        return {"pooled_projections": condition["pooled"], "guidance": guidance}

    def text_places(self, x: Tensor, length: int) -> Tensor:
        """The coordinates of every token of a text, [length, 3]."""
        return x.new_zeros(length, 3)

    def places(self, x: Tensor, first: float = 0.0) -> Tensor:
        """The coordinates of every token, [h/2 w/2, 3]; first: which picture it belongs to."""
        high, wide = (torch.arange(side // 2, device=x.device, dtype=x.dtype) for side in x.shape[2:])
        return torch.cartesian_prod(x.new_tensor([first]), high, wide)


class FluxKontext(Flux):
    """Adapter of `FluxKontextPipeline`: the picture to edit is one more row of tokens.

    The pipeline brings both pictures to its own list of sizes; here both have the policy's size.
    """

    kind = "FluxKontextPipeline"
    needs_pictures = True

    def encode_with(self, text: str, pictures: Tensor) -> Condition:
        if len(pictures) > 1:
            raise ValueError(f"FLUX.1-Kontext edits one picture, got {len(pictures)} as source of {text!r}")
        return {**self.encode(text), "pictures": self.latents(pictures)}


class Chroma(Flux):
    """Adapter of `ChromaPipeline`: no pooled text, no embedded guidance, and a mask over the text."""

    kind = "ChromaPipeline"

    def encode(self, text: str) -> Condition:
        embeds, _, mask, *_ = self.pipeline.encode_prompt(
            [text],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds[0], "mask": mask[0]}

    def named(self, x: Tensor, condition: Condition) -> dict[str, Tensor | None]:
        seen = x.new_ones(len(x), self.tokens(x.shape[1:]))
        return {"attention_mask": torch.cat([condition["mask"].to(x.dtype), seen], 1)}
