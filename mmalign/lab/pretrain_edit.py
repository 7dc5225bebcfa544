"""Trains a small FLUX.1-Kontext pipeline from nothing on the lab's edits, over the autoencoder of `flow/`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.lab.edit_verifier import EditVerdict, score_edit
from mmalign.lab.edits import Edit, draw_edit, write_edit
from mmalign.lab.pretrain_flow import flow_optimizers, save_pipeline
from mmalign.lab.pretrain_loop import Schedule, Stage, remember
from mmalign.lab.pretrain_text import clip_tokenizer, t5_tokenizer, words
from mmalign.lab.pretrain_vae import encode_mean
from mmalign.lab.render import render
from mmalign.lab.scenes import CANVAS, Scene

HEAD = 32  # width of an attention head


@dataclass(frozen=True)
class EditPretraining:
    """What is trained and for how long; see assets/lab/README.md for times and scores."""

    vae: str = "assets/lab/flow/vae"  # the folder of the autoencoder, which is not trained
    edits: int = 40_000  # drawn for training
    layers: int = 3  # with streams of their own for text and pictures
    single_layers: int = 3  # with one stream
    heads: int = 4  # each 32 wide
    text_width: int = 96
    pooled_width: int = 64
    length: int = 16  # tokens of an instruction, its end included
    steps: int = 4000  # raise it for a better model
    decay: int = 1000
    batch: int = 64
    lr: float = 2e-3
    seed: int = 0
    save_every: int = 500


def draw_edits(count: int, seed: int, split: str = "train") -> list[tuple[Scene, Edit, Scene]]:
    """Sources, edits and targets; in the training split nothing held out is among them."""
    rng = random.Random(f"pretrain edits {split} {seed}")
    return [draw_edit(rng, split) for _ in range(count)]


def pictures_of(scenes: Sequence[Scene]) -> Tensor:
    """Pictures uint8 [N, 64, 64, 3] of scenes."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes]))


def build_transformer(config: EditPretraining, channels: int) -> Any:
    """A fresh Flux transformer, one token for 2 x 2 places of the latent; its first velocity is 0."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * channels,
        num_layers=config.layers,
        num_single_layers=config.single_layers,
        attention_head_dim=HEAD,
        num_attention_heads=config.heads,
        joint_attention_dim=config.text_width,
        pooled_projection_dim=config.pooled_width,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in transformer.named_modules():
        zero = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "proj_out")
        inner = name.startswith("single") and name.endswith("proj_out")
        if isinstance(module, nn.Linear) and name.endswith(zero) and not inner:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def build_text_encoders(clip: Any, t5: Any, config: EditPretraining) -> dict[str, nn.Module]:
    """Fresh encoders: a CLIP for the pooled embedding, a T5 for one a token, of two layers each."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    pooled = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=config.pooled_width,
            intermediate_size=2 * config.pooled_width,
            num_hidden_layers=2,
            num_attention_heads=config.pooled_width // HEAD,
            max_position_embeddings=config.length,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    # As in the other encoders of the lab: at CLIP's own 0.02 small models hear nothing.
    for weight in (p for key, p in pooled.named_parameters() if "_embedding.weight" in key):
        nn.init.normal_(weight, std=0.5)
    long = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=config.text_width,
            d_kv=HEAD,
            d_ff=2 * config.text_width,
            num_layers=2,
            num_heads=config.text_width // HEAD,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            pad_token_id=t5.pad_token_id,
            eos_token_id=t5.eos_token_id,
        )
    )
    return {"text_encoder": pooled, "text_encoder_2": long}


def token_ids(tokenizers: Sequence[Any], texts: Sequence[str], length: int) -> Tensor:
    """Token ids [N, 2, length] of instructions; ValueError names one that does not fit."""
    rows = []
    for tokenizer in tokenizers:
        found = tokenizer(list(texts), padding="max_length", max_length=length)["input_ids"]
        if too_long := [text for text, row in zip(texts, found, strict=True) if len(row) > length]:
            raise ValueError(f"token_ids: {too_long[0]!r} has more than {length} tokens")
        rows.append(torch.tensor(found))
    return torch.stack(rows, 1)


def pack(latents: Tensor) -> Tensor:
    """Tokens [B, h w / 4, 4 C] of latents [B, C, h, w]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def places(side: int, first: float) -> Tensor:
    """The coordinates of the tokens of a picture of side x side tokens; first: 0 drawn, 1 the source."""
    line = torch.arange(side, dtype=torch.float32)
    return torch.cartesian_prod(torch.tensor([first]), line, line)


def velocity_error(
    modules: dict[str, nn.Module], ids: Tensor, source: Tensor, target: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error [B] of the velocity at one logit-normal time for each target latent [B, C, h, w]."""
    pooled = modules["text_encoder"](ids[:, 0]).pooler_output
    embeds = modules["text_encoder_2"](ids[:, 1])[0]
    sigma = torch.randn(len(target), generator=generator).sigmoid()
    noise = torch.randn(target.shape, generator=generator)
    tokens = pack(target.lerp(noise, sigma[:, None, None, None]))
    side = target.shape[-1] // 2
    velocity = modules["transformer"](
        hidden_states=torch.cat([tokens, pack(source)], 1),
        timestep=sigma,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        txt_ids=torch.zeros(ids.shape[-1], 3),
        img_ids=torch.cat([places(side, 0.0), places(side, 1.0)]),
        return_dict=False,
    )[0][:, : tokens.shape[1]]
    error: Tensor = (velocity.float() - pack(noise - target)).square().mean((1, 2))
    return error


def pretrain_edit(
    config: EditPretraining, out: Path, on_snapshot: Callable[[Any, int], None] = lambda pipeline, step: None
) -> None:
    """Draws the edits, trains, and writes the pipeline folder `out/pipeline`, going on if `out` was begun."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    remember(config, out, free=("steps", "decay", "save_every"))
    vae = AutoencoderKL.from_pretrained(config.vae).eval().to(memory_format=torch.channels_last)
    drawn = draw_edits(config.edits, config.seed)
    texts = [write_edit(edit) for _, edit, _ in drawn]
    source = encode_mean(vae, pictures_of([before for before, _, _ in drawn]))
    target = encode_mean(vae, pictures_of([after for _, _, after in drawn]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vocabulary = words(texts)
        clip, t5 = clip_tokenizer(vocabulary, config.length), t5_tokenizer(vocabulary, config.length)
        encoders = build_text_encoders(clip, t5, config)
        transformer = build_transformer(config, vae.config.latent_channels)
    modules: dict[str, nn.Module] = {"transformer": transformer, **encoders}
    ids = token_ids([clip, t5], texts, config.length)
    pipeline = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        tokenizer=clip,
        tokenizer_2=t5,
        **modules,
    )

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(ids), (config.batch,), generator=generator)
        error = velocity_error(modules, ids[picked], source[picked], target[picked], generator)
        return error.mean(), {}

    def snapshot(step: int) -> None:
        save_pipeline(pipeline, out / "snapshots" / f"{step:05d}")
        on_snapshot(pipeline, step)

    for module in modules.values():
        module.train()
    schedule = Schedule(config.steps, warmup=min(100, config.steps), decay=config.decay)
    optimizers = flow_optimizers(modules, config.lr)
    Stage("flow", out, modules, optimizers, schedule, loss, config.seed, save_every=config.save_every).run(
        snapshot
    )
    for module in modules.values():
        module.eval()
    save_pipeline(pipeline, out / "pipeline")


@torch.no_grad()
def carry_out(
    pipeline: Any, sources: Sequence[Scene], edits: Sequence[Edit], steps: int, seed: int, batch: int = 64
) -> list[Any]:
    """One PIL picture for each edit by the pipeline's own sampler; the seed alone decides the noise."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pipeline.set_progress_bar_config(disable=True)
    pictures = [Image.fromarray(render(scene)) for scene in sources]
    found: list[Any] = []
    for start in range(0, len(edits), batch):
        found += pipeline(
            image=pictures[start : start + batch],
            prompt=[write_edit(edit) for edit in edits[start : start + batch]],
            height=CANVAS,
            width=CANVAS,
            max_area=CANVAS**2,
            _auto_resize=False,
            num_inference_steps=steps,
            guidance_scale=1.0,
            max_sequence_length=pipeline.tokenizer.model_max_length,
            generator=generator,
        ).images
    return found


def judged(pictures: Sequence[Any], sources: Sequence[Scene], edits: Sequence[Edit]) -> list[EditVerdict]:
    """What the verifier says of edited pictures, of pillow or [3, 64, 64] in [0, 1]."""
    return [
        score_edit(picture if isinstance(picture, Tensor) else np.asarray(picture), source, edit)
        for picture, source, edit in zip(pictures, sources, edits, strict=True)
    ]
