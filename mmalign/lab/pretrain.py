"""Trains a complete small SD3 pipeline from nothing: an autoencoder, then a flow with its text encoders."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmalign.lab.pretrain_data import Captioned
from mmalign.lab.pretrain_flow import (
    FlowSize,
    Guided,
    assemble,
    build_transformer,
    save_pipeline,
    train_flow,
)
from mmalign.lab.pretrain_loop import Schedule
from mmalign.lab.pretrain_text import (
    ENCODERS,
    TextSize,
    build_encoders,
    clip_tokenizer,
    t5_tokenizer,
    token_ids,
    words,
)  # fmt: skip
from mmalign.lab.pretrain_vae import build_vae, encode_mean, train_vae


@dataclass(frozen=True)
class Pretraining:
    """What is trained and for how long; see the table in assets/lab/README.md for times and scores."""

    size: int = 64  # of the pictures; latents are 8 times smaller
    vae_widths: tuple[int, ...] = (16, 32, 64, 64)
    vae_steps: int = 1200  # raise it if restored pictures look soft
    vae_batch: int = 16
    vae_lr: float = 2e-3
    flow: FlowSize = field(default_factory=FlowSize)
    text: TextSize = field(default_factory=TextSize)
    flow_steps: int = 4600  # raise it for a better model; the gain comes in the last `flow_decay` steps
    flow_decay: int = 930
    flow_batch: int = 64
    flow_lr: float = 2e-3
    guided: float = 2.5  # guidance to learn; raise it for cleaner pictures, 1 keeps all their variety
    guided_start: int = 3900  # the step it is learned from
    precision: str = "fp32"  # bf16 halves the time where the processor computes in it, else it is far slower
    shift: float = 1.0  # of the sampler; raise it for larger pictures
    seed: int = 0
    save_every: int = 300


def pretrain(
    config: Pretraining,
    data: Captioned,
    out: Path,
    on_snapshot: Callable[[Any, int], None] = lambda pipeline, step: None,
    start: Path | None = None,
) -> None:
    """Trains on the pictures and writes the pipeline folder `out/pipeline`, going on if `out` was begun.

    start: a pipeline that this function wrote, whose tokenizers and autoencoder are kept and whose flow is
    trained further; its sizes count, not those of `config`. Every `config.save_every` steps of the flow a
    complete pipeline goes to `out/snapshots/<step>`, and to `on_snapshot(pipeline, step)`.
    """
    _remember(config, data, start, out)
    tokenizers, encoders, vae, transformer = _load(start) if start else _build(config, data)
    vae_folder, latents_file = out / "vae", out / "latents.pt"
    if not vae_folder.exists():
        if start is None:
            train_vae(
                vae, data.pictures, out,
                config.vae_steps, config.vae_batch, config.vae_lr, config.seed, config.save_every,
            )  # fmt: skip
        vae.save_pretrained(vae_folder.with_suffix(".partial"))
        vae_folder.with_suffix(".partial").rename(vae_folder)
    # Read back even if it was just trained: the flow then starts from the same bits whenever it starts.
    vae = type(vae).from_pretrained(vae_folder).eval().to(memory_format=torch.channels_last)
    if not latents_file.exists():
        torch.save(encode_mean(vae, data.pictures), latents_file.with_suffix(".partial"))
        latents_file.with_suffix(".partial").rename(latents_file)

    modules = {"transformer": transformer, **encoders}
    latents = torch.load(latents_file, weights_only=True)
    ids = token_ids(tokenizers, data.captions, config.text.length)
    empty = token_ids(tokenizers, [""], config.text.length)[0]
    pipeline = assemble(modules, vae, tokenizers, config.shift)

    def snapshot(step: int) -> None:
        save_pipeline(pipeline, out / "snapshots" / f"{step:05d}")
        on_snapshot(pipeline, step)

    schedule = Schedule(config.flow_steps, warmup=min(100, config.flow_steps), decay=config.flow_decay)
    train_flow(
        modules, latents, ids, empty, out, schedule,
        config.flow_batch, config.flow_lr, config.seed, config.save_every, snapshot,
        Guided(config.guided, config.guided_start), config.precision,
    )  # fmt: skip
    save_pipeline(pipeline, out / "pipeline")


def _build(config: Pretraining, data: Captioned) -> tuple[list[Any], dict[str, nn.Module], Any, Any]:
    """Tokenizers and fresh models; the seed alone decides their weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vocabulary = words(data.captions)
        clip = clip_tokenizer(vocabulary, config.text.length)
        tokenizers = [clip, clip, t5_tokenizer(vocabulary, config.text.length)]
        encoders = build_encoders(tokenizers, config.text)
        vae = build_vae(config.size, config.vae_widths)
        side = config.size // 2 ** (len(config.vae_widths) - 1)
        transformer = build_transformer(config.flow, config.text, (vae.config.latent_channels, side, side))
    return tokenizers, encoders, vae, transformer


def _load(folder: Path) -> tuple[list[Any], dict[str, nn.Module], Any, Any]:
    """Tokenizers and models of a pipeline that was trained before."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3]
    return (
        tokenizers,
        {name: getattr(pipeline, name) for name in ENCODERS},
        pipeline.vae,
        pipeline.transformer,
    )


def _remember(config: Pretraining, data: Captioned, start: Path | None, out: Path) -> None:
    """Writes the settings beside the run, and refuses to go on with others; lengths may change."""
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\n".join(data.captions).encode() + data.pictures.numpy().tobytes()).hexdigest()
    now = json.loads(json.dumps({**asdict(config), "data": digest, "start": start and str(start)}))
    file = out / "pretraining.json"
    if file.exists():
        before = json.loads(file.read_text())
        free = ("flow_steps", "flow_decay", "guided", "guided_start", "save_every", "shift", "precision")
        changed = [key for key in now if now[key] != before.get(key) and key not in free]
        if changed:
            raise ValueError(f"{out}: was begun with other settings of {changed}: use another --out")
    file.write_text(json.dumps(now, indent=2) + "\n")
