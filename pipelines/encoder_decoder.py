"""Captioners of transformers that have no token for a picture, an adapter for each way of reading one.

`PicturePrefix`    features of the picture stand before the words of the decoder (GIT)
`PictureEncoder`   the decoder looks at the picture by cross-attention and goes on from the prompt (BLIP)
`EncoderDecoder`   an encoder reads picture and prompt, and the decoder looks at what it read (Florence-2)

Whatever looks at a picture runs once for a group: what it found, and the keys and values that cross-attention
makes of it, are repeated for the members with their gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.contracts import PolicySettings
from mmalign.pipelines.captioner import Inputs, Prefix, kept
from mmalign.pipelines.videos import Video
from mmalign.pipelines.vlm import (
    VisionLanguage,
    banned,
    bare,
    chosen,
    closing,
    ends,
    linears,
    past_name,
    places,
)

BERT = ("query", "key", "value", "dense")  # layers of BERT's kind of decoder
BART = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class PicturePrefix(VisionLanguage):
    """Feeds a decoder that has the features of a picture before its words; texts go on from the prompt."""

    def __init__(self, settings: PolicySettings) -> None:
        super().__init__(settings)
        self.lora_targets = linears(self.model, BERT, ".layer.")
        attention: Any = self.model.git.encoder.layer[0].attention.self
        self.picture_tokens: int = attention.image_patch_tokens

    def encode(self, prompt: str, picture: Any) -> Inputs:
        config: Any = self.model.config
        count = config.num_image_with_embedding
        if isinstance(picture, Video) != (count is not None):
            wanted = "pictures, not videos" if count is None else f"a video of policy.frames={count}"
            raise ValueError(f"policy.model: it reads {wanted}")
        shown = picture.frames if isinstance(picture, Video) else picture
        pixels: Tensor = self.processor.image_processor(shown, return_tensors="pt")["pixel_values"]
        pixels = pixels[None] if isinstance(picture, Video) else pixels  # [1, F, C, H, W]
        begin = self.tokenizer.cls_token_id
        words = _asked(self.tokenizer, prompt, config.bos_token_id if begin is None else begin)
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "pixel_values": pixels}

    def prefix(self, network: nn.Module, inputs: Sequence[Inputs]) -> Prefix:
        read = super().prefix(network, inputs)
        found = read.cache.get_seq_length() - read.mask.shape[1]
        if found != self.picture_tokens:
            raise ValueError(
                f"policy.model: a picture came to {found} places before the text, and this model was made "
                f"for {self.picture_tokens}; its image processor must give the size of vision_config, and a "
                "video must have as many frames as num_image_with_embedding (policy.frames)"
            )
        return read


@dataclass(frozen=True)
class _Seen:
    """What a decoder looks at: keys and values of both attentions, states [p, L, D] and their mask [p, L]."""

    cache: Any
    states: Tensor
    mask: Tensor

    def take(self, rows: Tensor) -> _Seen:
        """A copy for the rows [n], which others may go on from as well."""
        from transformers import EncoderDecoderCache

        both = EncoderDecoderCache(
            chosen(self.cache.self_attention_cache, rows), chosen(self.cache.cross_attention_cache, rows)
        )
        return _Seen(both, self.states[rows], self.mask[rows])


class PictureEncoder:
    """Feeds a decoder that looks at a picture by cross-attention; texts go on from the prompt."""

    def __init__(self, settings: PolicySettings) -> None:
        self.processor, self.model = _loaded(settings)
        self.tokenizer: Any = self.processor.tokenizer
        text: Any = self.model.config.text_config
        self.begin: int = text.bos_token_id
        self.ends = ends([text.sep_token_id])  # what `generate` of this kind ends at
        self.banned = banned(self.tokenizer, self.ends, self.begin)
        self.lora_targets = linears(self.model, BERT, ".layer.")
        self._past = past_name(self.model.text_decoder)  # type: ignore[arg-type]

    @property
    def end(self) -> int:
        return closing(self.tokenizer, self.ends)

    def encode(self, prompt: str, picture: Any) -> Inputs:
        _no_video(picture)
        pixels: Tensor = self.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        words = _asked(self.tokenizer, prompt, self.begin)
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "pixel_values": pixels}

    def prefix(self, network: nn.Module, inputs: Sequence[Inputs]) -> Prefix:
        from transformers import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        longest = max(one["input_ids"].shape[1] for one in inputs)
        words, mask = (
            torch.cat([F.pad(one[name], (longest - one[name].shape[1], 0)) for one in inputs])
            for name in ("input_ids", "attention_mask")
        )
        mask = mask.bool()
        read: Any = network(
            pixel_values=torch.cat([one["pixel_values"] for one in inputs]),
            input_ids=words,
            attention_mask=mask.long(),
            position_ids=places(mask),
            use_cache=True,
            logits_to_keep=1,
            **{self._past: cache},
        )
        states: Tensor = read.image_embeds
        seen = _Seen(cache, states, states.new_ones(states.shape[:2]).bool())
        return Prefix(read.logits[:, -1], _whole(seen), mask, mask.sum(1))

    def extend(
        self, network: nn.Module, prefix: Prefix, rows: Tensor | None, tokens: Tensor, past: int
    ) -> tuple[Tensor, Prefix]:
        if rows is not None:
            prefix = replace(
                prefix, cache=prefix.cache.take(rows), mask=prefix.mask[rows], position=prefix.position[rows]
            )
        seen, (count, length) = prefix.cache, tokens.shape
        ones = torch.ones(count, past + length, dtype=torch.bool, device=tokens.device)
        read: Any = bare(network).text_decoder(
            input_ids=tokens,
            attention_mask=torch.cat([prefix.mask, ones], 1).long(),
            position_ids=prefix.position[:, None] + torch.arange(past, past + length, device=tokens.device),
            encoder_hidden_states=seen.states,
            use_cache=True,
            **{self._past: seen.cache},
        )
        return read.logits, prefix


class EncoderDecoder:
    """Feeds an encoder with picture and prompt, and a decoder that looks at what it read."""

    def __init__(self, settings: PolicySettings) -> None:
        self.processor, self.model = _loaded(settings)
        self.tokenizer: Any = self.processor.tokenizer
        text, generation = self.model.config.text_config, self.model.generation_config
        first = generation.decoder_start_token_id
        # A token that every text must begin with is no choice, and so no action.
        given = [text.decoder_start_token_id if first is None else first, generation.forced_bos_token_id]
        self.begin = torch.tensor([[int(number) for number in given if number is not None]])
        named = generation.eos_token_id
        self.ends = ends([*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id])
        self.image_token: int = self.model.config.image_token_id
        self.banned = banned(self.tokenizer, self.ends, self.image_token)
        self.lora_targets = linears(self.model, BART, ".layers.")
        self._past = past_name(self.model)

    @property
    def end(self) -> int:
        return closing(self.tokenizer, self.ends)

    def encode(self, prompt: str, picture: Any) -> Inputs:
        _no_video(picture)
        read = self.processor(text=prompt, images=picture, return_tensors="pt")
        if self.image_token not in read["input_ids"].flatten().tolist():
            raise ValueError("policy.model: its processor gives the picture no place in the prompt")
        names = ("input_ids", "attention_mask", "pixel_values")
        return {name: read[name] for name in names} | {"decoder_input_ids": self.begin}

    def prefix(self, network: nn.Module, inputs: Sequence[Inputs]) -> Prefix:
        longest = max(one["input_ids"].shape[1] for one in inputs)
        pad = {"input_ids": self.tokenizer.pad_token_id or 0, "attention_mask": 0}
        # Padded on the right, because the encoder counts places from its first token.
        batch = {
            name: torch.cat([F.pad(one[name], (0, longest - one[name].shape[1]), value=v) for one in inputs])
            for name, v in pad.items()
        }
        for name in ("pixel_values", "decoder_input_ids"):
            batch[name] = torch.cat([one[name] for one in inputs])
        read: Any = network(**batch, use_cache=True, logits_to_keep=1)
        states, mask = read.encoder_last_hidden_state, batch["attention_mask"].bool()
        seen = _Seen(getattr(read, self._past), states, mask)
        begun = batch["decoder_input_ids"]
        position = torch.full((len(inputs),), begun.shape[1], device=begun.device)
        return Prefix(read.logits[:, -1], _whole(seen), torch.ones_like(begun).bool(), position)

    def extend(
        self, network: nn.Module, prefix: Prefix, rows: Tensor | None, tokens: Tensor, past: int
    ) -> tuple[Tensor, Prefix]:
        from transformers.modeling_outputs import BaseModelOutput

        if rows is not None:
            prefix = replace(
                prefix, cache=prefix.cache.take(rows), mask=prefix.mask[rows], position=prefix.position[rows]
            )
        seen = prefix.cache
        read: Any = network(
            encoder_outputs=BaseModelOutput(seen.states),
            attention_mask=seen.mask.long(),
            decoder_input_ids=tokens,
            use_cache=True,
            **{self._past: seen.cache},
        )
        return read.logits, prefix


def _loaded(settings: PolicySettings) -> tuple[Any, Any]:
    """Processor and network."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(settings.model, dtype=kept(settings))
    return AutoProcessor.from_pretrained(settings.model), model


def _no_video(picture: Any) -> None:
    if isinstance(picture, Video):
        raise ValueError(
            "policy.model: it reads pictures, not videos; Qwen2-VL and later, SmolVLM, LLaVA-OneVision, "
            "InternVL and GIT of several frames read videos"
        )


def _asked(tokenizer: Any, prompt: str, begin: int) -> Tensor:
    """What a text goes on from, [1, T]: the token that begins it, and the prompt without one that ends it."""
    words: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return torch.tensor([[begin, *words]])


def _whole(seen: _Seen) -> _Seen:
    """The same; ValueError where cross-attention has kept less or more than there is to look at."""
    kept, there = seen.cache.cross_attention_cache.get_seq_length(), seen.states.shape[1]
    if kept != there:
        raise ValueError(f"the decoder has kept {kept} of the {there} places that the encoder gave")
    return seen
