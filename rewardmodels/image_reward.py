"""ImageReward (Xu et al. 2023, arXiv:2304.05977): a BLIP that reads the prompt with the picture, and a head.

    r = (head(f_cls) - 0.1672) / 1.0333,    f_cls: first state of the text encoder that attends to the picture

The published file ImageReward.pt holds the weights under the names of BLIP's own code; they are the same
arithmetic as BlipVisionModel and BlipTextModel of transformers, whose shapes follow from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.clip import Prepared, linear_layers, read_state
from mmalign.rewardmodels.inputs import pictures, texts
from mmalign.rewardmodels.precisions import Precision, dtype_of

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output over the paper's pictures
LONGEST = 35  # tokens of a prompt
HEAD_WIDTH = 64  # of an attention head, in both towers
SEEN, READ, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
PIXELS = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


@dataclass(eq=False)
class ImageReward:
    """What people preferred, about -2 to 2, of a picture and its prompt; standardized as published."""

    weights: str  # ImageReward.pt, as published
    tokenizer: str = "bert-base-uncased"  # local folder or hub id
    precision: Precision = "fp32"  # of the network; bf16 or fp16 are faster on a GPU
    batch: int = 32  # pictures at once; lower it for less memory
    name = "image_reward"

    def __post_init__(self) -> None:
        from transformers import AutoTokenizer

        if self.batch < 1:
            raise ValueError(f"image_reward: batch must be at least 1, got {self.batch}")
        dtype = dtype_of(self.name, self.precision)
        state = read_state(self.name, Path(self.weights))
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(f"image_reward: tokenizer {self.tokenizer} does not load: {error}") from error
        try:
            self._sees, self._reads = (network.to(dtype) for network in (sight(state), reading(state)))
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"image_reward: {self.weights} is no ImageReward: {error}") from error
        head = {key: value for key, value in state.items() if key.startswith(HEAD)}
        self._head = linear_layers(self.name, self.weights, head, self._reads.config.hidden_size)
        side = self._sees.config.image_size
        size = {"shortest_edge": side}, {"height": side, "width": side}
        self._prepare = Prepared({"size": size[0], "crop_size": size[1], "do_center_crop": True} | PIXELS)

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, self._score(pictures(self.name, outcome), texts(outcome))[:, None])

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The score [B * views]; gradients reach the media."""
        return self._score(pictures(self.name, outcome, graph=True), texts(outcome))

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        for part in (self._sees, self._reads, self._head):
            part.to(images.device)
        rows = range(0, len(images), self.batch)
        found = [self._part(images[i : i + self.batch], prompts[i : i + self.batch]) for i in rows]
        return (torch.cat(found) - MEAN) / STD

    def _part(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(images.device)
        seen = self._sees(pixel_values=self._prepare(images).to(self._sees.dtype)).last_hidden_state
        read = self._reads(
            input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        )
        found: Tensor = self._head(read.last_hidden_state[:, 0].float())
        return found[:, 0]


def sight(state: Mapping[str, Tensor]) -> Any:
    """The BlipVisionModel of BLIP's own weights."""
    from transformers import BlipVisionConfig, BlipVisionModel

    own = {key.removeprefix(SEEN): value for key, value in state.items() if key.startswith(SEEN)}
    width, patch = own["patch_embed.proj.weight"].shape[0], own["patch_embed.proj.weight"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=own["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=depth(own, r"blocks\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round((own["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    return filled(BlipVisionModel, config, {seen_name(key): value for key, value in own.items()})


def seen_name(key: str) -> str:
    """The name in BlipVisionModel of a weight of BLIP's picture tower."""
    for old, new in (
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^norm\.", "post_layernorm."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.attn\.proj\.", ".self_attn.projection."),
        (r"\.attn\.", ".self_attn."),
        (r"\.norm(\d)\.", r".layer_norm\1."),
    ):
        key = re.sub(old, new, key)
    return key


def reading(state: Mapping[str, Tensor]) -> Any:
    """The BlipTextModel of BLIP's own weights, which has their names."""
    from transformers import BlipTextConfig, BlipTextModel

    own = {key.removeprefix(READ): value for key, value in state.items() if key.startswith(READ)}
    words, places = (own[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
    config = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=own["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=own["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=depth(own, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=words.shape[1] // HEAD_WIDTH,
        max_position_embeddings=places.shape[0],
        is_decoder=True,  # builds the layers that attend to the picture; each forward says what they do
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
    return filled(BlipTextModel, config, own, add_pooling_layer=False)


def depth(state: Mapping[str, Tensor], pattern: str) -> int:
    """Number of layers, by their names."""
    return 1 + max(int(found[1]) for key in state if (found := re.match(pattern, key)))


def filled(kind: Any, config: Any, weights: Mapping[str, Tensor], **settings: Any) -> Any:
    """The model with these weights; KeyError names what it lacks, and what they have beside is left."""
    with torch.random.fork_rng(devices=[]):
        network = kind(config, **settings)
    needed = {key for key in network.state_dict() if not key.endswith("position_ids")}
    if lacking := sorted(needed - weights.keys()):
        raise KeyError(f"it lacks {', '.join(lacking[:3])}")
    network.load_state_dict({key: weights[key].float() for key in needed}, strict=False)
    return network.eval().requires_grad_(False)
