"""An autoencoder that draws all styles of the lab, with the latents of one that knows the plain style alone.

A flow model draws only what its autoencoder can decode. So that its samples can be moved to another style,
the autoencoder is trained further on pictures in all styles, while latents of plain ones are held where they
were: the flow model goes on as before.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.lab.pretrain_data import draw_styled
from mmalign.lab.pretrain_loop import Schedule, Stage
from mmalign.lab.pretrain_vae import KL_WEIGHT, as_pixels
from mmalign.lab.render import STYLES
from mmalign.lab.styles import style_of


@dataclass(frozen=True)
class StylesTraining:
    """What is trained and for how long; see assets/lab/README.md for times and scores."""

    start: str = "assets/lab/flow"  # pipeline whose autoencoder is trained further
    scenes: int = 8_000  # drawn for training, half of them plain
    steps: int = 700
    batch: int = 32
    lr: float = 2e-3
    hold: float = 0.1  # weight of the squared distance of plain latents from where they were
    precision: str = "bf16"  # fp32 where the processor does not compute in bf16
    scored: int = 400  # held-out scenes that it is measured on
    seed: int = 0
    save_every: int = 200


def train_styles(config: StylesTraining, out: Path) -> dict[str, float]:
    """Trains on drawn scenes, writes the folder `out/styles_vae`, and gives what `measure_styles` says."""
    from diffusers import AutoencoderKL

    first = AutoencoderKL.from_pretrained(config.start, subfolder="vae", torch_dtype=torch.float32)
    first = first.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    vae = deepcopy(first).train().requires_grad_(True)
    data = draw_styled(config.scenes, config.seed)
    plain = torch.tensor([style == STYLES[0] for style in data.styles])

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(plain), (config.batch,), generator=generator)
        pixels = as_pixels(data.pictures[picked]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            latents = vae.encode(pixels).latent_dist
            restored = vae.decode(latents.sample(generator)).sample.float()
            with torch.no_grad():
                before = first.encode(pixels).latent_dist.mean.float()
        error = (restored - pixels).abs().mean()
        moved = (latents.mean.float() - before).square().mean((1, 2, 3))
        moved = (moved * plain[picked]).sum() / plain[picked].sum().clamp(min=1)
        kl = latents.kl().float().sum() / latents.mean.numel()
        told = {"l1": error.item(), "kl": kl.item(), "moved": moved.item()}
        return error + KL_WEIGHT * kl + config.hold * moved, told

    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = Schedule(config.steps, warmup=min(50, config.steps), decay=config.steps // 2)
    Stage(
        "styles", out, {"vae": vae}, [optimizer], schedule, loss, config.seed, 0.99, config.save_every
    ).run()
    vae.eval().to(memory_format=torch.contiguous_format)
    found = measure_styles(vae, first, config.scored)
    vae.half().save_pretrained(out / "styles_vae")
    return found


@torch.no_grad()
def measure_styles(vae: Any, first: Any, count: int = 400, seed: int = 1) -> dict[str, float]:
    """How many held-out pictures of each style are restored in it, in percent, and how far plain ones moved.

    latents: root of the mean squared move of plain latents, whose deviation is 1. pixels: mean change, in
    [0, 2], of what a plain latent is decoded to.
    """
    data = draw_styled(count, seed, "heldout")
    pixels = as_pixels(data.pictures)
    latents, before = vae.encode(pixels).latent_dist.mean, first.encode(pixels).latent_dist.mean
    restored = (vae.decode(latents).sample.clamp(-1, 1) + 1) / 2
    seen = [style_of(picture) for picture in restored]
    found = {}
    for style in STYLES:
        of = [got == style for got, wanted in zip(seen, data.styles, strict=True) if wanted == style]
        found[style] = 100 * sum(of) / max(1, len(of))
    plain = torch.tensor([style == STYLES[0] for style in data.styles])
    change = vae.decode(before[plain]).sample - first.decode(before[plain]).sample
    return found | {
        "latents": (latents - before)[plain].square().mean().sqrt().item(),
        "pixels": change.abs().mean().item(),
    }
