"""Tiny random captioners of the real classes, written to disk as users have them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = (
    "a",
    "red",
    "blue",
    "dog",
    "cat",
    "hat",
    "on",
    "the",
    "left",
    ".",
    "describe",
    "picture",
    "two",
    "of",
)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image> {% else %} {{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant {% endif %}"
)
SIDE = 28


def tokenizer(special: Sequence[str] = ("<image>",), **names: Any) -> PreTrainedTokenizerFast:
    """A token for each word; texts are joined by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    every = ["<pad>", "<end>", "<unk>", *special, "user", "assistant", *WORDS]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(every)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=list(special),
        **names,
    )


def tiny_llava(folder: Path) -> Path:
    """A LLaVA of 16 image tokens with random weights."""
    words = tokenizer()
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        words,
        patch_size=7,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=7,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures(folder: Path, number: int = 4) -> list[str]:
    """Pictures of one color each, the last of them inside a zip."""
    folder.mkdir(exist_ok=True)
    files = []
    for i in range(number):
        picture = Image.new("RGB", (40, 30), tuple(80 * ((i >> k) & 1) + 40 * k for k in range(3)))
        if i < number - 1:
            picture.save(folder / f"{i}.png")
            files.append(str(folder / f"{i}.png"))
        else:
            buffer = BytesIO()
            picture.save(buffer, "PNG")
            with zipfile.ZipFile(folder / "images.zip", "w") as archive:
                archive.writestr(f"inside/{i}.png", buffer.getvalue())
            files.append(str(folder / "images.zip" / "inside" / f"{i}.png"))
    return files
