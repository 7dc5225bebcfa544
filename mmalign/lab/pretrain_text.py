"""Text encoders of lab size: two CLIPs and a T5 with one token a word, encoded as SD3 pipelines do."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

START, END, PAD, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<pad>", "<unk>"
SPELLING = "abcdefghijklmnopqrstuvwxyz0123456789"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class TextSize:
    """Widths of the text encoders. A T5 is as wide as both CLIPs together, as SD3 wants."""

    length: int = 16  # tokens, start and end included; raise it for longer captions
    clip_width: int = 64
    layers: int = 2

    @property
    def joint_width(self) -> int:
        return 2 * self.clip_width


def words(captions: Sequence[str], most: int = 4000) -> Counter[str]:
    """How often each of the commonest words and marks occurs; text in quotation marks is left to letters."""
    found: Counter[str] = Counter()
    for caption in captions:
        found.update(re.findall(r"[^\W\d_]+|\d|[^\w\s]", re.sub(r'"[^"]*"', ' " ', caption.lower())))
    return Counter(dict(found.most_common(most)))


def clip_tokenizer(vocabulary: Mapping[str, int], length: int) -> Any:
    """A byte-pair tokenizer with one token for each word of the vocabulary, and letters for the rest."""
    from tokenizers import trainers
    from transformers import CLIPTokenizer

    untrained = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    # Merging until nothing is left to merge makes every word one token.
    trainer = trainers.BpeTrainer(
        vocab_size=10**6,
        min_frequency=1,
        special_tokens=[START, END],
        initial_alphabet=list(SPELLING),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    text = [word for word in sorted(vocabulary) for _ in range(min(vocabulary[word], 50))] + list(SPELLING)
    untrained.train_from_iterator(text, trainer)
    # Training resets the settings of the model, hence a second tokenizer with what was learned.
    model = json.loads(untrained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=length)


def t5_tokenizer(vocabulary: Mapping[str, int], length: int) -> Any:
    """A unigram tokenizer with one token for each word of the vocabulary, and letters for the rest."""
    from transformers import T5Tokenizer

    pieces = [(PAD, 0.0), ("</s>", 0.0), (UNKNOWN, 0.0), ("▁", -2.0)]
    marks = sorted({word for word in vocabulary if not word.isalnum()})
    pieces += [("▁" + word, -3.0) for word in sorted(vocabulary)]
    pieces += [(letter, -8.0) for letter in [*SPELLING, *marks]]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def build_encoders(tokenizers: Sequence[Any], size: TextSize) -> dict[str, nn.Module]:
    """Fresh encoders for two CLIP tokenizers and one T5 tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    encoders: dict[str, nn.Module] = {}
    for name, tokenizer in zip(ENCODERS[:2], tokenizers[:2], strict=True):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.clip_width,
            intermediate_size=2 * size.clip_width,
            projection_dim=size.clip_width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.clip_width // 32,
            max_position_embeddings=size.length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        encoders[name] = clip = CLIPTextModelWithProjection(config)
        # SD3 reads hidden states that no norm has scaled; at CLIP's own 0.02 small models hear nothing.
        for weight in (p for key, p in clip.named_parameters() if "_embedding.weight" in key):
            nn.init.normal_(weight, std=0.5)
    config = T5Config(
        vocab_size=len(tokenizers[2]),
        d_model=size.joint_width,
        d_kv=32,
        d_ff=2 * size.joint_width,
        num_layers=size.layers,
        num_heads=size.joint_width // 32,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        pad_token_id=tokenizers[2].pad_token_id,
        eos_token_id=tokenizers[2].eos_token_id,
    )
    encoders[ENCODERS[2]] = T5EncoderModel(config)
    return encoders


def token_ids(tokenizers: Sequence[Any], prompts: Sequence[str], length: int) -> Tensor:
    """Token ids [N, 3, length] of prompts; a prompt that does not fit is named in the ValueError."""
    rows = []
    for tokenizer in tokenizers:
        found = tokenizer(list(prompts), add_special_tokens=True)["input_ids"]
        i = max(range(len(found)), key=lambda i: len(found[i]))
        if len(found[i]) > length:
            raise ValueError(
                f"token_ids: {prompts[i]!r} has {len(found[i])} tokens, expected at most {length}"
            )
        rows.append(torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in found]))
    return torch.stack(rows, 1)


def encode(encoders: Mapping[str, nn.Module], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [B, 2 length, joint width] and pooled embeddings [B, 2 clip width], with gradients.

    ids: [B, 3, length]. This is `StableDiffusion3Pipeline.encode_prompt` after its tokenizers, for pipelines
    called with `max_sequence_length=length`: padding is not masked there, so it is not masked here.
    """
    clips = [encoders[name](ids[:, i], output_hidden_states=True) for i, name in enumerate(ENCODERS[:2])]
    short = torch.cat([clip.hidden_states[-2] for clip in clips], -1)
    long = encoders[ENCODERS[2]](ids[:, 2])[0]
    short = nn.functional.pad(short, (0, long.shape[-1] - short.shape[-1]))
    return torch.cat([short, long], 1), torch.cat([clip.text_embeds for clip in clips], -1)
