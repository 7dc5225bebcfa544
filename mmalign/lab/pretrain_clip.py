"""Trains the lab's CLIP by image-text contrast (Radford et al. 2021, arXiv:2103.00020), and measures it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.lab import grammar
from mmalign.lab.clip import CLIP, END, PAD, START, UNKNOWN, CLIPSize, vocabulary_of
from mmalign.lab.pretrain_data import Styled, draw_styled
from mmalign.lab.pretrain_loop import Schedule, Stage, keyed, split_optimizers
from mmalign.lab.render import STYLES
from mmalign.lab.scenes import COLORS, LETTERS, SHAPES

WARMEST = 100.0  # logit scale above which cosines are sharpened no further
NOISE = 0.05  # largest standard deviation of the noise on training pictures


@dataclass(frozen=True)
class ClipTraining:
    """What is trained and for how long; see assets/lab/README.md for times and scores."""

    scenes: int = 24_000  # drawn for training
    steps: int = 500
    batch: int = 128  # pictures that each text is told apart from; raise it for finer distinctions
    lr: float = 1e-3
    weight_decay: float = 0.05
    precision: str = "bf16"  # of the towers; fp32 where the processor does not compute in bf16
    seed: int = 0
    save_every: int = 200
    size: CLIPSize = field(default_factory=CLIPSize)


def lab_words() -> list[str]:
    """What a caption of the lab can hold: the words of its prompts and the names of its styles."""
    return sorted({*grammar.vocabulary(), *STYLES})


def write_tokenizer(words: Sequence[str], context: int, folder: Path) -> None:
    """A tokenizer of one id a word, letters between quotation marks, as `grammar.tokens` cuts them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    # A letter of a run that a quotation mark closes stands alone; other runs, commas and marks are words.
    pattern = Regex('[a-z](?=[a-z]*")|[^\\s,"]+|[,"]')
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    frame = [(mark, ids[mark]) for mark in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(f"{START} $A {END}", None, frame)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=context,
    ).save_pretrained(folder)


def contrast(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of picking the right text for each image and the right image for each text.

    images, texts: [B, E] of length 1. same: [B, B] bool, True on the diagonal and where two captions are
    equal: those are right as well, each by an equal share.
    """
    logits = scale * images @ texts.T
    target = same / same.sum(1, keepdim=True)
    forward = -(target * logits.log_softmax(1)).sum(1).mean()
    return (forward - (target * logits.T.log_softmax(1)).sum(1).mean()) / 2


def train_clip(config: ClipTraining, out: Path) -> dict[str, Any]:
    """Trains on drawn scenes, writes the folder `out/clip`, and gives what `measure_clip` says of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        clip = CLIP(config.size, vocabulary_of(lab_words()))
    data = draw_styled(config.scenes, config.seed, damaged=0.1)
    names = {caption: i for i, caption in enumerate(dict.fromkeys(data.captions))}
    name = torch.tensor([names[caption] for caption in data.captions])
    ids = clip.ids(data.captions)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(ids), (config.batch,), generator=generator)
        images = as_floats(data.pictures[picked])
        noise = NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
        images = images + noise * torch.randn(images.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            seen, read = clip.encode_images(images), clip.encode_ids(ids[picked])
        same = name[picked][:, None] == name[picked]
        scale = clip.logit_scale.exp().clamp(max=WARMEST)
        right = ((seen @ read.T).argmax(1) == torch.arange(len(seen))).float().mean()
        return contrast(seen.float(), read.float(), scale, same), {
            "right": right.item(),
            "scale": scale.item(),
        }

    optimizers = split_optimizers({"clip": clip}, config.lr, config.weight_decay)
    schedule = Schedule(config.steps, warmup=min(50, config.steps), decay=config.steps // 2)
    Stage("clip", out, {"clip": clip}, optimizers, schedule, loss, config.seed, 0.99, config.save_every).run()
    folder = out / "clip"
    clip.save(folder)
    write_tokenizer(list(clip.words), config.size.context, folder)
    return measure_clip(CLIP.load(folder))


def as_floats(pictures: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] to [B, 3, S, S] in [0, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def measure_clip(clip: CLIP, count: int = 512, seed: int = 0) -> dict[str, Any]:
    """Retrieval among `count` held-out pictures of different prompts, and naming of styles, in percent.

    image_to_text, text_to_image: share whose own caption or picture comes first (top1) or among five (top5).
    changed: share of pictures that prefer their caption over it with one word changed. style: share of styled
    pictures whose style is the best of "<caption>, <style>".
    """
    data = held_out(count, seed)
    captions = [
        caption.removesuffix(f", {style}") for caption, style in zip(data.captions, data.styles, strict=True)
    ]
    images = clip.encode_images(as_floats(data.pictures))
    found: dict[str, Any] = {"pictures": count}
    cosines = images @ clip.encode_texts(captions).T
    for way, scores in (("image_to_text", cosines), ("text_to_image", cosines.T)):
        place = (scores > scores.diagonal()[:, None]).sum(1)
        found[way] = {f"top{k}": 100 * (place < k).float().mean().item() for k in (1, 5)}
    generator = keyed(seed, "changed", 0)
    changed = clip.encode_texts([change_word(caption, generator) for caption in captions])
    found["changed"] = 100 * (cosines.diagonal() > (images * changed).sum(1)).float().mean().item()
    named = torch.stack([clip.encode_texts([f"{c}, {style}" for c in captions]) for style in STYLES[1:]], 1)
    best = (images[:, None] * named).sum(-1).argmax(1)
    styled = [i for i, style in enumerate(data.styles) if style != STYLES[0]]
    right = [STYLES[1:][int(best[i])] == data.styles[i] for i in styled]
    found["style"] = 100 * sum(right) / len(right)
    return found


def held_out(count: int, seed: int) -> Styled:
    """`count` held-out pictures, no two of which have the same prompt."""
    data = draw_styled(3 * count, seed + 1000, "heldout")
    first: dict[str, int] = {}
    for i, (caption, style) in enumerate(zip(data.captions, data.styles, strict=True)):
        first.setdefault(caption.removesuffix(f", {style}"), i)
    rows = list(first.values())[:count]
    if len(rows) < count:
        raise ValueError(f"held_out: only {len(rows)} different held-out prompts were drawn of {count}")

    def taken(values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in rows]

    return Styled(
        data.pictures[rows], *(taken(v) for v in (data.captions, data.styles, data.scenes, data.damage))
    )


def change_word(caption: str, generator: torch.Generator) -> str:
    """The caption with one color, shape, number or direction exchanged for another of its kind."""
    kinds = [list(COLORS), list(SHAPES), list(grammar.SINGULARS), ["two", "three", "four"]]
    kinds += [["left", "right"], ["above", "below"], ["top", "bottom"], list(LETTERS)]
    words = grammar.tokens(caption)
    places = [(i, kind) for i, word in enumerate(words) for kind in kinds if word in kind]
    i, kind = places[int(torch.randint(len(places), (1,), generator=generator))]
    others = [word for word in kind if word != words[i]]
    words[i] = others[int(torch.randint(len(others), (1,), generator=generator))]
    parts = " ".join(words).split('"')
    if len(parts) == 3:
        parts[1] = parts[1].replace(" ", "")
    return '"'.join(part.replace(" ,", ",") for part in parts)
