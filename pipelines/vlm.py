"""Image-text-to-text models of transformers: decoders that read pictures among their tokens.

One adapter serves them all, because they differ in what their processors return and not in what is done with
it. What lies along the first axis of a processor's tensors (pictures, or the patches of pictures with their
grid) is put one after the other, token rows are padded on the left, and the few models whose places are not a
plain count say so themselves (`rope_deltas` of the Qwen family).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.contracts import PolicySettings
from mmalign.pipelines.captioner import Inputs, Prefix, kept
from mmalign.pipelines.videos import Video

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEES = (
    "vision",
    "visual",
    "image",
    "multi_modal_projector",
    "connector",
)  # parts of names of what stays frozen
PLACEHOLDERS = (
    "image_token_id",
    "image_token_index",
    "media_placeholder_token_id",
    "video_token_id",
    "video_token_index",
)
CLOSED = "Zebra"  # what an assistant says, to see what its turn ends with
TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # a number for each token


class VisionLanguage:
    """Feeds a decoder that reads pictures among its tokens."""

    def __init__(self, settings: PolicySettings) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(settings.model)
        self.model: nn.Module = AutoModelForImageTextToText.from_pretrained(
            settings.model, dtype=kept(settings)
        )
        self.tokenizer: Any = self.processor.tokenizer
        config: Any = self.model.config
        found = (getattr(config, name, None) for name in PLACEHOLDERS)
        self.placeholders = {int(number) for number in found if number is not None}
        named: Any = self.model.generation_config.eos_token_id  # type: ignore[union-attr]
        self.ends = ends([*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id])
        self.banned = banned(self.tokenizer, self.ends, *self.placeholders)
        self._past = past_name(self.model)
        self.lora_targets = linears(self.model, LINEAR)

    @cached_property
    def end(self) -> int:
        """The token by which the chat template ends a turn, or else the tokenizer's own."""
        if self.processor.chat_template is not None:
            turns = [
                {"role": role, "content": [{"type": "text", "text": word}]}
                for role, word in (("user", "hello"), ("assistant", CLOSED))
            ]
            said = self.processor.apply_chat_template(turns, tokenize=False).rpartition(CLOSED)[2]
            for number in self.tokenizer(said, add_special_tokens=False)["input_ids"]:
                if number in self.ends:
                    return int(number)
        return closing(self.tokenizer, self.ends)

    def encode(self, prompt: str, picture: Any) -> Inputs:
        """Tensors of the processor for a user turn of a picture or video and a prompt; a first axis of 1."""
        film = isinstance(picture, Video)
        try:
            read = self._film(prompt, picture) if film else self._still(prompt, picture)
        except ValueError as error:
            what = "video" if film else "picture"
            raise ValueError(
                f"policy.model: its processor cannot read a {what} and a prompt: {error}"
            ) from error
        inputs = {name: part for name, part in read.items() if isinstance(part, Tensor) and name != "labels"}
        if self.placeholders.isdisjoint(inputs["input_ids"].flatten().tolist()) or not any(
            tensor.is_floating_point() for tensor in inputs.values()
        ):
            raise ValueError(
                "policy.model: its chat template gives the picture no place in the prompt; mend the "
                "chat_template of its processor"
            )
        return inputs

    def _still(self, prompt: str, picture: Any) -> Any:
        if self.processor.chat_template is None:  # a model that was not tuned to talk (PaliGemma)
            return self.processor(text=prompt, images=picture, return_tensors="pt")
        content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def _film(self, prompt: str, video: Video) -> Any:
        """The frames as they were chosen; the processor chooses none of them."""
        if getattr(self.processor, "video_processor", None) is None or self.processor.chat_template is None:
            raise ValueError(
                f"{type(self.processor).__name__} takes no videos; Qwen2-VL and later, SmolVLM, "
                "LLaVA-OneVision and InternVL do"
            )
        content = [{"type": "video"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        begun = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        return self.processor(
            text=[text],
            videos=[video.frames],
            video_metadata=[
                {
                    "total_num_frames": video.total,
                    "fps": video.fps,
                    "frames_indices": list(video.numbers),
                    "duration": video.total / video.fps,
                }
            ],
            do_sample_frames=False,
            return_tensors="pt",
            **({"add_special_tokens": False} if begun else {}),
        )

    def prefix(self, network: nn.Module, inputs: Sequence[Inputs]) -> Prefix:
        longest = max(one["input_ids"].shape[1] for one in inputs)
        pad = {"input_ids": self.tokenizer.pad_token_id or 0}
        batch = {
            name: torch.cat(
                [
                    F.pad(one[name], (longest - one[name].shape[1], 0), value=pad.get(name, 0))
                    if name in TOKENS
                    else one[name]
                    for one in inputs
                    if name in one  # pictures and videos may stand side by side
                ]
            )
            for name in dict.fromkeys(name for one in inputs for name in one)
        }
        mask = batch["attention_mask"].bool()
        place = {} if self._counts_itself else {"position_ids": places(mask)}
        read: Any = network(**batch, **place, use_cache=True, logits_to_keep=1)
        following = mask.sum(1)
        if self._counts_itself:
            delta: Tensor = bare(network).model.rope_deltas
            following = following + delta.flatten().to(following)
        return Prefix(read.logits[:, -1], getattr(read, self._past), mask, following)

    @property
    def _counts_itself(self) -> bool:
        """Whether places in a picture have a row and a column."""
        return hasattr(getattr(self.model, "model", None), "rope_deltas")

    def extend(
        self, network: nn.Module, prefix: Prefix, rows: Tensor | None, tokens: Tensor, past: int
    ) -> tuple[Tensor, Prefix]:
        cache, mask, position = prefix.cache, prefix.mask, prefix.position
        if rows is not None:
            # A cache changes in place; what others may still continue from is left as it was.
            cache = chosen(cache, rows)
            mask, position = mask[rows], position[rows]
        count, length = tokens.shape
        ones = torch.ones(count, past + length, dtype=mask.dtype, device=mask.device)
        where = position[:, None] + torch.arange(past, past + length, device=position.device)
        read: Any = network(
            input_ids=tokens,
            attention_mask=torch.cat([mask, ones], 1).long(),
            position_ids=where.expand(3, -1, -1) if self._counts_itself else where,
            use_cache=True,
            **{self._past: cache},
        )
        return read.logits, Prefix(prefix.logits, getattr(read, self._past), mask, position)


def ends(named: Sequence[int | None]) -> list[int]:
    """The tokens that end a text; ValueError where a model names none."""
    found = sorted({int(number) for number in named if number is not None})
    if not found:
        raise ValueError("neither its generation_config nor its tokenizer names a token that ends a text")
    return found


def closing(tokenizer: Any, ends: Sequence[int]) -> int:
    """The token that ends a text where several may."""
    own = tokenizer.eos_token_id
    return int(own) if own in ends else int(ends[0])


def banned(tokenizer: Any, ends: Sequence[int], *more: int) -> list[int]:
    """The special tokens that no text may hold: all but those that end it."""
    known = {*tokenizer.all_special_ids, *more}
    known |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(known - set(ends))


def linears(model: nn.Module, endings: Sequence[str], inside: str = "") -> list[str]:
    """Names of the layers that get adapters: those with these endings, none of them in what sees."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in endings
        and inside in name
        and not any(part in name for part in SEES)
    ]


def past_name(model: nn.Module) -> str:
    """What a model calls its keys and values; older versions of transformers say past_key_values."""
    takes = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    return "cache" if "cache" in takes else "past_key_values"


def chosen(cache: Any, rows: Tensor) -> Any:
    """A cache with the rows [n] of another, which stays as it is; gradients flow."""
    taken = copy(cache)
    taken.layers = [copy(layer) for layer in cache.layers]  # they hold the same tensors
    taken.batch_select_indices(rows)
    return taken


def places(mask: Tensor) -> Tensor:
    """Places of tokens that are padded on the left, [p, L]."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def bare(network: Any) -> Any:
    """The model inside of what the trainer wrapped around it."""
    while hasattr(network, "module"):
        network = network.module
    return network
