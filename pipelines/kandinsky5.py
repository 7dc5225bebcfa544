"""Kandinsky 5 of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import Family, padded, schedule
from mmalign.pipelines.flow import Condition


class Kandinsky5(Family):
    """Adapter of `Kandinsky5T2IPipeline`, equal to it where its queries and keys are not rounded.

    Its network rounds them to bfloat16 whatever its precision, so that two forwards that differ in their last
    digit, as those of batches of two sizes do, differ in the fourth one, and samples depend on their batch.
    Here they keep the precision of the network, which changes nothing in bf16 (`Attention`).

    It takes no mask either: texts of a batch are filled up to one length, and nothing sees what they were
    filled with. Sizes are taken as they are, where the pipeline goes to the nearest of seven. Whatever the
    autoencoder's shift is, the pipeline leaves it out.
    """

    kind = "Kandinsky5T2IPipeline"
    lora_targets = (
        "to_query",
        "to_key",
        "to_value",
        "self_attention.out_layer",
        "cross_attention.out_layer",
    )

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        super().__init__(settings, pipeline)
        network: Any = self.network
        network.set_attn_processor(Attention())
        network.text_rope_embeddings.register_forward_hook(_no_place)
        for block in network.text_transformer_blocks:
            block.register_forward_hook(_nothing)

    @property
    def scale(self) -> int:
        return int(self.pipeline.vae_scale_factor_spatial)

    @property
    def channels(self) -> int:
        return int(self.config.in_visual_dim)

    def default_pixels(self) -> tuple[int, int]:
        return self.default("height"), self.default("width")

    def encode(self, text: str) -> Condition:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            [text], max_sequence_length=self.max_sequence_length, device=self.device
        )
        tokens, mask = padded(embeds[0], self.max_sequence_length)
        return {"embeds": tokens, "mask": mask, "pooled": pooled[0]}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self.pipeline.scheduler, steps, None, None)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        embeds, mask = condition["embeds"], condition["mask"]
        sides = (1, x.shape[2] // self.patch, x.shape[3] // self.patch)
        velocity: Tensor = network(
            hidden_states=x.to(embeds.dtype).permute(0, 2, 3, 1)[:, None],
            encoder_hidden_states=embeds,
            pooled_projections=condition["pooled"],
            timestep=sigma * 1000,
            visual_rope_pos=[torch.arange(side, device=x.device) for side in sides],
            text_rope_pos=torch.arange(mask.shape[1], device=x.device).where(mask, -1),
            return_dict=False,
        )
        return velocity[:, 0].permute(0, 3, 1, 2)

    def from_vae(self, raw: Tensor) -> Tensor:
        scaled: Tensor = raw * self.vae.config.scaling_factor
        return scaled

    def to_vae(self, latents: Tensor) -> Tensor:
        scaled: Tensor = latents / self.vae.config.scaling_factor
        return scaled


class Attention:
    """The attention of Kandinsky 5 at the precision of its inputs, without the tokens that are not there.

    Those are tokens of a text without a place, and of a text that was read those that are zeros.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        if sparse_params is not None:
            raise ValueError("policy.model: pictures of Kandinsky 5 are drawn with full attention alone")
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        kept = None if encoder_hidden_states is None else source.any(-1)
        query, key, value = (
            layer(seen).unflatten(-1, (attn.num_heads, -1))
            for layer, seen in (
                (attn.to_query, hidden_states),
                (attn.to_key, source),
                (attn.to_value, source),
            )
        )
        query = attn.query_norm(query.float()).type_as(query)
        key = attn.key_norm(key.float()).type_as(key)
        if rotary_emb is not None:
            if rotary_emb.ndim == 7:  # of texts, each with places of its own
                rotary_emb = rotary_emb[0]
                kept = rotary_emb.flatten(2).any(-1)
            query, key = turned(query, rotary_emb), turned(key, rotary_emb)
        found: Tensor = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=None if kept is None else kept[:, None, None],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out: Tensor = attn.out_layer(found.flatten(-2))
        return out


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Tokens x [n, L, heads, D], each pair of numbers turned by its matrix; turns: [n, L, 1, D / 2, 2, 2]."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (turns * pairs).sum(-1).flatten(-2).type_as(x)


def _no_place(embedder: nn.Module, args: tuple[Tensor], turns: Tensor) -> Tensor:
    """Turns [n, L, 1, D / 2, 2, 2] of places [n, L], zeros where a place is below 0."""
    (places,) = args
    return turns * (places >= 0).reshape(*places.shape, 1, 1, 1, 1)


def _nothing(block: nn.Module, args: tuple[Tensor, Tensor, Tensor], text: Tensor) -> Tensor:
    """Tokens [n, L, D] of a text that was read, zeros where they have no place; args end with their turns."""
    kept = args[2][0].flatten(2).any(-1)
    return text * kept[..., None]
