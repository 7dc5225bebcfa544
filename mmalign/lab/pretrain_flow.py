"""Flow matching of an SD3 transformer with its text encoders, and the pipeline folder it ends in."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.lab.pretrain_loop import Muon, Schedule, Stage
from mmalign.lab.pretrain_text import ENCODERS, TextSize, encode

TABLES = ("shared", "embedding.", "relative_attention_bias")


@dataclass(frozen=True)
class FlowSize:
    """Width is heads times 32."""

    layers: int = 4
    heads: int = 4


def build_transformer(size: FlowSize, text: TextSize, latents: tuple[int, int, int]) -> Any:
    """A fresh transformer for latents [C, h, w], one token for each place; its first velocity is 0."""
    from diffusers import SD3Transformer2DModel

    channels, side, _ = latents
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=1,
        in_channels=channels,
        out_channels=channels,
        num_layers=size.layers,
        num_attention_heads=size.heads,
        attention_head_dim=32,
        caption_projection_dim=32 * size.heads,
        joint_attention_dim=text.joint_width,
        pooled_projection_dim=2 * text.clip_width,
        pos_embed_max_size=side,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (".norm1" in name or name in ("norm_out.linear", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def flow_optimizers(modules: Mapping[str, nn.Module], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embeddings, biases, gains and the last projection."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in modules.values():
        for name, parameter in module.named_parameters():
            outer = name.startswith("proj_out") or any(part in name for part in TABLES)
            (matrices if parameter.ndim == 2 and not outer else rest).append(parameter)
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr, decay=0.01), adam]


Text = tuple[Tensor, Tensor]  # embeddings [B, tokens, width] and pooled embeddings [B, width], see `encode`


def velocity_error(
    transformer: nn.Module,
    latents: Tensor,
    text: Text,
    generator: torch.Generator,
    guidance: float = 1.0,
    no_text: Text | None = None,
) -> Tensor:
    """Squared error [B] of the velocity at one logit-normal time for each latent [B, C, h, w].

    With guidance g > 1 the target leads away from the velocity without text (model guidance, Tang et al.
    2025, arXiv:2502.12154): what is learned is the velocity that guidance g would give. It needs `no_text`.
    """
    sigma = torch.randn(len(latents), generator=generator).sigmoid()
    noise = torch.randn(latents.shape, generator=generator)
    noised = latents.lerp(noise, sigma[:, None, None, None])

    def velocity(text: Text) -> Tensor:
        found: Tensor = transformer(
            hidden_states=noised,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            timestep=1000 * sigma,
            return_dict=False,
        )[0]
        return found.float()

    predicted, target = velocity(text), noise - latents
    if guidance > 1:
        if no_text is None:
            raise ValueError(f"velocity_error: guidance {guidance} needs the embeddings of the empty prompt")
        with torch.no_grad():
            # v = u + w (v - v0) has the solution v0 + (u - v0) / (1 - w); where text was dropped, v is v0.
            target = target + (1 - 1 / guidance) * (predicted - velocity(no_text))
    return (predicted - target).square().mean((1, 2, 3))


@dataclass(frozen=True)
class Guided:
    """Guidance that the model itself learns, from a step on."""

    scale: float = 1.0
    start: int = 0


def train_flow(
    modules: Mapping[str, nn.Module],
    latents: Tensor,
    ids: Tensor,
    empty: Tensor,
    folder: Path,
    schedule: Schedule,
    batch: int,
    lr: float,
    seed: int,
    save_every: int,
    on_save: Callable[[int], None],
    guided: Guided,
    precision: str = "fp32",
    dropped: float = 0.1,
) -> None:
    """Trains the transformer and the text encoders in place.

    latents: [N, C, h, w]; ids: [N, 3, length]; empty: [3, length], the ids of "", which replace the text of
    a `dropped` share of samples, so that the model can be guided. precision: of the forward passes, "fp32" or
    "bf16"; weights stay in fp32.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is 'fp32' or 'bf16', got {precision!r}")
    encoders = {name: modules[name] for name in ENCODERS}
    for module in modules.values():
        module.train()

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(latents), (batch,), generator=generator)
        drop = torch.rand(batch, generator=generator) < dropped
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            text = encode(encoders, torch.where(drop[:, None, None], empty, ids[picked]))
            scale, no_text = 1.0, None
            if guided.scale > 1 and step >= guided.start:
                with torch.no_grad():
                    embedded, pooled = encode(encoders, empty[None])
                scale, no_text = guided.scale, (embedded.expand(batch, -1, -1), pooled.expand(batch, -1))
            error = velocity_error(modules["transformer"], latents[picked], text, generator, scale, no_text)
        return error.mean(), {}

    optimizers = flow_optimizers(modules, lr)
    Stage("flow", folder, modules, optimizers, schedule, loss, seed, save_every=save_every).run(on_save)
    for module in modules.values():
        module.eval()


def assemble(
    modules: Mapping[str, nn.Module], vae: nn.Module, tokenizers: Sequence[Any], shift: float
) -> Any:
    """The plain diffusers pipeline made of these parts."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    return StableDiffusion3Pipeline(
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        **dict(modules),
        **dict(zip(names, tokenizers, strict=True)),
    )


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Writes the pipeline folder, at once: a reader never sees half of it."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(partial)
    for file in partial.glob("*/config.json"):  # diffusers notes where on this machine a part came from
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None):
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def sample(
    pipeline: Any, prompts: Sequence[str], steps: int, guidance: float, seed: int, batch: int = 64
) -> list[Any]:
    """One PIL picture for each prompt by the pipeline's own sampler; the seed alone decides the noise."""
    generator = torch.Generator().manual_seed(seed)
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Any] = []
    for start in range(0, len(prompts), batch):
        pictures += pipeline(
            list(prompts[start : start + batch]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=pipeline.tokenizer.model_max_length,
            generator=generator,
        ).images
    return pictures
