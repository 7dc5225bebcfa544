"""Teaches the lab's captioner to watch clips: several frames in, the reasoning of `clip_pairs` out.

It stands for the video model that a judge which thinks before it scores (DeScore) starts from, and knows
nothing of preferences: it learns to say what each frame shows, what moves, and what is not as asked.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.lab.clip_pairs import draw_pair, looked_at, reason
from mmalign.lab.pretrain_captioner import IGNORED, PIECES, as_pixels, encode, optimizers
from mmalign.lab.pretrain_loop import Schedule, Stage, remember
from mmalign.lab.render import render
from mmalign.lab.scenes import CANVAS

MARKS = ("<answer>", "</answer>")


@dataclass(frozen=True)
class WatcherPretraining:
    """What is trained and for how long; see assets/lab/README.md for times and scores."""

    start: str = "assets/lab/captioner"  # a captioner in transformers format
    frames: int = 3  # of a clip that are shown; 64 tokens each
    steps: int = 600  # raise it for a watcher that sees better
    pairs: int = 12  # of clips at once
    lr: float = 2e-3
    precision: str = "bf16"  # twice as fast where the processor computes in it; elsewhere take fp32
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is 'fp32' or 'bf16', got {self.precision!r}")
        if min(self.steps, self.pairs, self.frames) < 1:
            raise ValueError(
                f"steps, pairs and frames must be 1 or more, got {self.steps}, {self.pairs}, {self.frames}"
            )


def new_words(known: set[str], frames: int) -> list[str]:
    """Pieces of the prompts and reasoning of pairs that a vocabulary lacks, sorted."""
    rng, found = random.Random("words of clips"), set[str]()
    for _ in range(600):
        pair = draw_pair(rng)
        thoughts = (reason(clip, looked_at(frames)) for clip in (pair.chosen, pair.rejected))
        text = " ".join((pair.prompt, *thoughts))
        found |= set(re.findall(PIECES, re.sub(r"</?answer>", " ", text)))
        found |= {piece.strip() for piece in found}
    return sorted(found - known - {""})


def load_start(start: str, frames: int) -> tuple[Any, Any]:
    """The captioner and its processor, with the words of clips; their embeddings are drawn."""
    from tokenizers import AddedToken
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(start)
    words = processor.tokenizer
    plan = json.loads(words.backend_tokenizer.to_str())
    known = plan["model"]["vocab"]
    for piece in new_words(set(known), frames):
        known[piece] = len(known)
    words._tokenizer = type(words.backend_tokenizer).from_str(json.dumps(plan))
    words.add_tokens([AddedToken(mark, special=False, lstrip=True) for mark in MARKS])
    model = LlavaForConditionalGeneration.from_pretrained(
        start, dtype=torch.float32, attn_implementation="eager"
    )
    model.resize_token_embeddings(len(words))
    return model, processor


def pretrain_watcher(config: WatcherPretraining, out: Path) -> None:
    """Trains and writes the folder `out/watcher`, going on if `out` was begun."""
    remember(config, out, free=("steps", "save_every"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model, processor = load_start(config.start, config.frames)
    model.model.vision_tower.requires_grad_(False)
    numbers = looked_at(config.frames)
    images = (CANVAS // model.config.vision_config.patch_size) ** 2 * config.frames

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        pairs = [draw_pair(rng) for _ in range(config.pairs)]
        clips = [(pair.prompt, clip) for pair in pairs for clip in (pair.chosen, pair.rejected)]
        shown = np.stack([render(clip.clip.frames[number]) for _, clip in clips for number in numbers])
        talks = [[(True, prompt, reason(clip, numbers))] for prompt, clip in clips]
        ids, mask, labels = encode(talks, processor.tokenizer, images)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            pixels = as_pixels(torch.from_numpy(shown))
            logits = model(ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits
        errors = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != IGNORED]
        return errors, {"right": right.float().mean().item()}

    schedule = Schedule(config.steps, decay=config.steps // 2)
    Stage(
        "watcher", out, {"watcher": model}, optimizers([model], config.lr), schedule, loss, config.seed,
        ema=0.98, save_every=config.save_every,
    ).run()  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(out / "watcher")
    processor.save_pretrained(out / "watcher")
