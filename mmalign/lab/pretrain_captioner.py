"""Trains the lab's captioner from nothing: a small LLaVA that describes pictures, with mistakes, and answers.

First its vision tower learns to name what each patch shows, which stands for the pretraining on pictures that
real towers have behind them. Then the whole model learns captions that are wrong in a tenth of what they say
and leave out a third (`captions.CARELESS`), and questions with their right answers.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.lab.caption_check import check
from mmalign.lab.captions import CARELESS, INSTRUCTION, describe, draw_scene, spoil, write
from mmalign.lab.font import SPACE, WIDTH, word_box
from mmalign.lab.pretrain_loop import Muon, Schedule, Stage
from mmalign.lab.questions import ask, multiple_choice, single_choice
from mmalign.lab.render import render
from mmalign.lab.scenes import CANVAS, COLORS, LETTERS, SHAPES, SIZES, WORDS, Scene

PAD, END, UNKNOWN, USER, ASSISTANT, IMAGE = "<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<image>"
PIECES = r" ?[A-Za-z]+| ?[^A-Za-z ]"  # a word or a mark, with the space before it
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
IGNORED = -100
QUESTIONS = 2  # in one conversation, which is then about as long as one with a caption


@dataclass(frozen=True)
class CaptionerPretraining:
    """What is trained and for how long; see assets/lab/README.md for times and scores."""

    width: int = 128  # of the language model and of the vision tower
    layers: int = 4
    vision_layers: int = 3
    patch: int = 8  # pixels; 64 image tokens
    tower_steps: int = 800
    tower_batch: int = 64
    steps: int = 3500  # raise it for a captioner that sees better; its habits come from what it reads
    batch: int = 32
    answers: float = 0.25  # share of conversations that are questions
    lr: float = 2e-3
    precision: str = "bf16"  # twice as fast where the processor computes in it; elsewhere take fp32
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is 'fp32' or 'bf16', got {self.precision!r}")

    @property
    def images(self) -> int:
        """Tokens of a picture."""
        return (CANVAS // self.patch) ** 2

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")


def words() -> list[str]:
    """Every piece a conversation of the lab can contain, sorted."""
    rng = random.Random("words")
    found: set[str] = set(WORDS)
    for _ in range(3000):
        for _, text, answer in conversation(draw_scene(rng), rng.random() < 0.5, rng):
            found |= set(re.findall(PIECES, text)) | set(re.findall(PIECES, answer))
            found |= {piece.strip() for piece in re.findall(PIECES, answer)}
    for word in WORDS:
        found |= set(re.findall(PIECES, ask("Which word is written?", [word, word])))
    return sorted(found)


def build_processor(patch: int) -> Any:
    """A LlavaProcessor whose tokenizer has one token for each word of the lab."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

    special = [PAD, END, UNKNOWN, USER, ASSISTANT, IMAGE]
    vocabulary = {piece: number for number, piece in enumerate([*special, *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    half = [0.5, 0.5, 0.5]
    pictures = SiglipImageProcessor(size={"height": CANVAS, "width": CANVAS}, image_mean=half, image_std=half)
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=fast,
        patch_size=patch,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )


def build_captioner(config: CaptionerPretraining, tokenizer: Any) -> Any:
    """A fresh LlavaForConditionalGeneration."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=config.width,
        intermediate_size=2 * config.width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.width // 32,
        image_size=CANVAS,
        patch_size=config.patch,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=3 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.width // 32,
        num_key_value_heads=config.width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=config.images,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            tie_word_embeddings=True,
            attn_implementation="eager",  # its backward is five times faster than sdpa's at this size, on CPU
        )
    )


Turn = tuple[bool, str, str]  # whether it shows the picture, what the user says, what the captioner answers


def conversation(scene: Scene, answers: bool, rng: random.Random) -> list[Turn]:
    """A careless caption of a scene, or right answers to questions about it."""
    if not answers:
        return [(True, INSTRUCTION, write(spoil(describe(scene), CARELESS, rng)))]
    questions = single_choice(scene, rng)[:3] + multiple_choice(scene, rng)[:1]
    questions = rng.sample(questions, min(QUESTIONS, len(questions)))
    return [
        (i == 0, ask(question.question, question.choices), ", ".join(question.answers) + ".")
        for i, question in enumerate(questions)
    ]


def encode(
    conversations: Sequence[Sequence[Turn]], tokenizer: Any, images: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels [B, T], padded on the right; only what the captioner says is learned.

    images: tokens of a picture.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for turns in conversations:
        ids: list[int] = []
        labels: list[int] = []
        for shown, said, answer in turns:
            asked = USER + IMAGE * (images if shown else 0) + said + END + ASSISTANT
            for text, counts in ((asked, False), (answer + END, True)):
                found = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += found
                labels += found if counts else [IGNORED] * len(found)
        rows.append((ids, labels))
    length = max(len(ids) for ids, _ in rows)
    padded = [ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in rows]
    mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]
    learned = [labels + [IGNORED] * (length - len(labels)) for _, labels in rows]
    return torch.tensor(padded), torch.tensor(mask), torch.tensor(learned)


NAMED = (1 + len(COLORS), 1 + len(SHAPES), 1 + len(SIZES), 2, 1 + len(LETTERS))


def name_patches(scene: Scene, patch: int) -> np.ndarray:
    """What each patch shows, uint8 [patches, 5]: color, shape, size, whether a center lies in it, and letter.

    0 is none; the largest thing that the box around its shape covers counts, and a word before all things.
    """
    side = CANVAS // patch
    named = np.zeros((side, side, len(NAMED)), np.uint8)
    middles = (np.arange(side) + 0.5) * patch
    for thing in sorted(scene.things, key=lambda thing: thing.radius):
        down = np.abs(middles - thing.y) <= thing.extent
        across = np.abs(middles - thing.x) <= thing.extent
        kinds = (list(COLORS).index(thing.color), SHAPES.index(thing.shape), list(SIZES).index(thing.size))
        named[np.ix_(down, across, [0, 1, 2])] = np.array(kinds) + 1
        named[int(thing.y // patch), int(thing.x // patch), 3] = 1
    if (word := scene.word) is not None:
        width, height = word_box(word)
        down = np.abs(middles - word.y) <= height / 2
        across = np.abs(middles - word.x) <= width / 2
        place = (middles - (word.x - width / 2)) / ((WIDTH + SPACE) * word.cell)
        letters = [LETTERS.index(word.text[min(max(int(p), 0), len(word.text) - 1)]) + 1 for p in place]
        named[np.ix_(down, across, [0])] = list(COLORS).index(word.color) + 1
        named[np.ix_(down, across, [1, 2])] = 0
        named[:, :, 4] = down[:, None] * across[None] * np.array(letters)[None]
    return named.reshape(-1, len(NAMED))


def as_pixels(pictures: Tensor) -> Tensor:
    """Pictures uint8 [N, H, W, 3] as the image processor gives them, [N, 3, H, W] in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def optimizers(modules: Sequence[nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embeddings, biases and gains."""
    named = [pair for module in modules for pair in module.named_parameters()]
    inner = [p for name, p in named if p.ndim == 2 and "embed" not in name and "named" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name or "named" in name]
    return [Muon(inner, lr, decay=0.01), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def pretrain_captioner(
    config: CaptionerPretraining,
    scenes: Sequence[Scene],
    out: Path,
    on_snapshot: Callable[[Any, Any, int], None] = lambda model, processor, step: None,
) -> None:
    """Trains on scenes and writes the folder `out/captioner`, going on if `out` was begun.

    Every `config.save_every` steps `on_snapshot(model, processor, step)` is called with averaged weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "pretraining.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        processor = build_processor(config.patch)
        model = build_captioner(config, processor.tokenizer)
        names = nn.Linear(config.width, sum(NAMED))
    pictures = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    learn_to_name(config, model, names, scenes, pictures, out)
    learn_to_speak(config, model, processor, scenes, pictures, out, on_snapshot)
    model.to(torch.bfloat16).save_pretrained(out / "captioner")
    processor.save_pretrained(out / "captioner")


def learn_to_name(
    config: CaptionerPretraining,
    model: Any,
    names: nn.Module,
    scenes: Sequence[Scene],
    pictures: Tensor,
    out: Path,
) -> None:
    """Trains the vision tower to name patches through one linear map, which is thrown away."""
    named = torch.from_numpy(np.stack([name_patches(scene, config.patch) for scene in scenes])).long()
    tower = model.model.vision_tower

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(scenes), (config.tower_batch,), generator=generator)
        with config.autocast:
            seen = tower(as_pixels(pictures[picked]), output_hidden_states=True).hidden_states[-1]
            scores = names(seen)
        errors = [
            nn.functional.cross_entropy(part.flatten(0, 1), named[picked][..., i].flatten())
            for i, part in enumerate(scores.float().split(NAMED, -1))
        ]
        kinds = ("color", "shape", "size", "center", "letter")
        return torch.stack(errors).sum(), {k: e.item() for k, e in zip(kinds, errors, strict=True)}

    modules = {"tower": tower, "named": names}
    schedule = Schedule(config.tower_steps, decay=config.tower_steps // 2)
    Stage(
        "tower", out, modules, optimizers(list(modules.values()), config.lr), schedule, loss, config.seed,
        ema=0.99, save_every=config.save_every,
    ).run()  # fmt: skip


def learn_to_speak(
    config: CaptionerPretraining,
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    pictures: Tensor,
    out: Path,
    on_snapshot: Callable[[Any, Any, int], None],
) -> None:
    """Trains the whole model on conversations, drawn anew whenever a picture comes up again."""

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(scenes), (config.batch,), generator=generator)
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        asked = round(config.answers * config.batch)
        talks = [conversation(scenes[n], i < asked, rng) for i, n in enumerate(picked.tolist())]
        ids, mask, labels = encode(talks, processor.tokenizer, config.images)
        pixels = as_pixels(pictures[picked])
        with config.autocast:
            logits = model(ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits
        errors = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        ).view(len(ids), -1)
        counted = (labels[:, 1:] != IGNORED).float()
        caption = errors[asked:].sum() / counted[asked:].sum()
        answer = errors[:asked].sum() / counted[:asked].sum().clamp(min=1)
        return errors.sum() / counted.sum(), {"caption": caption.item(), "answer": answer.item()}

    def snapshot(step: int) -> None:
        model.eval()
        on_snapshot(model, processor, step)
        model.train()

    schedule = Schedule(config.steps, decay=config.steps // 2)
    Stage(
        "captioner", out, {"captioner": model}, optimizers([model], config.lr), schedule, loss, config.seed,
        ema=0.99, save_every=config.save_every,
    ).run(snapshot)  # fmt: skip


@torch.no_grad()
def rates(model: Any, processor: Any, scenes: Sequence[Scene], seed: int = 0) -> tuple[float, float]:
    """Shares of wrong claims and of facts left out, in captions drawn at temperature 1: means over scenes."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [Image.fromarray(render(scene)) for scene in scenes]
    inputs = processor(images=pictures, text=[prompt] * len(scenes), return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=96)
    said = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    read = [check(text.strip(), scene) for text, scene in zip(said, scenes, strict=True)]
    wrong = [len(reading.wrong) / max(1, len(reading.judged)) for reading in read]
    silent = [len(reading.omitted) / len(reading.facts) for reading in read]
    return sum(wrong) / len(wrong), sum(silent) / len(silent)
