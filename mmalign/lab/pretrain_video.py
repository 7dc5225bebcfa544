"""Trains a small Wan pipeline from nothing: a causal autoencoder, then a flow with its text encoder."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.lab.clip_verifier import score_clip
from mmalign.lab.clips import FRAMES, SIDE, parse_clip, training_clip
from mmalign.lab.pretrain_flow import flow_optimizers, save_pipeline
from mmalign.lab.pretrain_loop import Schedule, Stage, remember
from mmalign.lab.pretrain_text import t5_tokenizer, words
from mmalign.lab.scenes import BACKGROUND

SPATIAL, TEMPORAL = 4, 2  # pixels and frames for each place of the latent
KL_WEIGHT, THINGS = 1e-5, 10.0  # in the autoencoder's loss: of the divergence, of the pixels of things
GROUND = BACKGROUND[0] / 127.5 - 1


@dataclass(frozen=True)
class VideoPretraining:
    """What is trained and for how long; see assets/lab/README.md for times and scores."""

    clips: int = 12_000  # drawn for training
    channels: int = 8  # of the latents
    vae_width: int = 16
    vae_steps: int = 2400  # raise it if restored clips look soft
    vae_frames: int = (
        550  # the first of them see single frames, six times as many, and learn what things look like
    )
    vae_batch: int = 8
    vae_lr: float = 3e-3
    layers: int = 4
    heads: int = 4  # each 32 wide
    text_width: int = 96
    length: int = 16  # tokens of a prompt, its end included
    flow_steps: int = 3000  # raise it for a better model
    flow_decay: int = 700
    flow_batch: int = 48
    flow_lr: float = 2e-3
    shift: float = 1.0  # of the sampler
    seed: int = 0
    save_every: int = 250


def draw_clips(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Training clips uint8 [N, F, H, W, 3] with their prompts; nothing held out is among them."""
    rng = random.Random(f"pretrain clips {seed}")
    found = [training_clip(rng) for _ in range(count)]
    return torch.from_numpy(np.stack([clip for clip, _ in found])), [text for _, text in found]


def build_video_vae(channels: int, width: int) -> Any:
    """A fresh Wan autoencoder: 4 pixels along a side and 2 frames for each place of the latent."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=width,
        z_dim=channels,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        scale_factor_temporal=TEMPORAL,
        scale_factor_spatial=SPATIAL,
    )


def build_video_transformer(config: VideoPretraining) -> Any:
    """A fresh Wan transformer, one token for 2 x 2 places of a latent frame; its first velocity is 0."""
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.heads,
        attention_head_dim=32,
        in_channels=config.channels,
        out_channels=config.channels,
        text_dim=config.text_width,
        freq_dim=64,
        ffn_dim=64 * config.heads,
        num_layers=config.layers,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_text_encoder(tokenizer: Any, width: int) -> Any:
    """A fresh UMT5 encoder of two layers."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_layers=2,
        num_heads=width // 32,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return UMT5EncoderModel(config)


def as_video(clips: Tensor) -> Tensor:
    """Clips uint8 [B, F, H, W, 3] as the autoencoder sees them: fp32 [B, 3, F, H, W] in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_video_vae(vae: Any, clips: Tensor, folder: Path, config: VideoPretraining) -> None:
    """Trains the autoencoder in place, and notes the moments of its latents in its configuration."""
    vae.train()

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        alone = step < config.vae_frames
        picked = torch.randint(len(clips), (config.vae_batch * (6 if alone else 1),), generator=generator)
        video = as_video(clips[picked])
        if alone:
            frame = int(torch.randint(video.shape[2], (1,), generator=generator))
            video = video[:, :, frame : frame + 1]
        latents = vae.encode(video).latent_dist
        restored = vae.decode(latents.sample(generator)).sample
        # Most of a clip is ground: pixels of things count more, or the things are forgotten.
        weight = 1 + THINGS * ((video - GROUND).abs().amax(1, keepdim=True) > 0.1)
        error = ((restored - video).abs() * weight).mean() / weight.mean()
        kl = latents.kl().sum() / latents.mean.numel()
        return error + KL_WEIGHT * kl, {"l1": error.item(), "kl": kl.item()}

    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_lr, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = Schedule(config.vae_steps, warmup=min(50, config.vae_steps), decay=config.vae_steps // 2)
    Stage(
        "vae",
        folder,
        {"vae": vae},
        [optimizer],
        schedule,
        loss,
        config.seed,
        ema=0.99,
        save_every=config.save_every,
    ).run()
    vae.eval()
    with torch.no_grad():
        found = [vae.encode(as_video(part)).latent_dist for part in torch.split(clips[:512], 64)]
    sampled = torch.cat([part.mean for part in found]), torch.cat([part.var for part in found])
    mean = sampled[0].mean((0, 2, 3, 4))
    std = (sampled[0].var((0, 2, 3, 4)) + sampled[1].mean((0, 2, 3, 4))).sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


@torch.no_grad()
def video_latents(vae: Any, clips: Tensor, batch: int = 64) -> Tensor:
    """Standardized mean latents [N, C, f, h, w] of clips uint8 [N, F, H, W, 3]."""
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(m).reshape(shape) for m in (vae.config.latents_mean, vae.config.latents_std))
    found = [vae.encode(as_video(part)).latent_dist.mean for part in torch.split(clips, batch)]
    return (torch.cat(found) - mean) / std


def encode_texts(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings [B, length, width], zero behind the end of a text, as `WanPipeline` encodes them."""
    embeds: Tensor = encoder(ids, mask).last_hidden_state
    return embeds * mask[..., None]


def train_video_flow(
    transformer: nn.Module,
    encoder: nn.Module,
    latents: Tensor,
    ids: Tensor,
    mask: Tensor,
    empty: tuple[Tensor, Tensor],
    folder: Path,
    config: VideoPretraining,
    on_save: Callable[[int], None],
    dropped: float = 0.1,
) -> None:
    """Trains transformer and text encoder in place; ids, mask: [N, length]; empty: those of ""."""
    modules = {"transformer": transformer.train(), "text_encoder": encoder.train()}

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = config.flow_batch
        picked = torch.randint(len(latents), (batch,), generator=generator)
        drop = (torch.rand(batch, generator=generator) < dropped)[:, None]
        words, seen = torch.where(drop, empty[0], ids[picked]), torch.where(drop, empty[1], mask[picked])
        clean = latents[picked]
        sigma = torch.randn(batch, generator=generator).sigmoid()
        noise = torch.randn(clean.shape, generator=generator)
        velocity = transformer(
            hidden_states=clean.lerp(noise, sigma.reshape(-1, 1, 1, 1, 1)),
            timestep=1000 * sigma,
            encoder_hidden_states=encode_texts(encoder, words, seen),
            return_dict=False,
        )[0]
        return (velocity.float() - (noise - clean)).square().mean(), {}

    schedule = Schedule(config.flow_steps, warmup=min(100, config.flow_steps), decay=config.flow_decay)
    optimizers = flow_optimizers(modules, config.flow_lr)
    Stage("flow", folder, modules, optimizers, schedule, loss, config.seed, save_every=config.save_every).run(
        on_save
    )
    for module in modules.values():
        module.eval()


def pretrain_video(
    config: VideoPretraining, out: Path, on_snapshot: Callable[[Any, int], None] = lambda pipeline, step: None
) -> None:
    """Draws the clips, trains, and writes the pipeline folder `out/pipeline`, going on if `out` was begun."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    remember(config, out, free=("vae_steps", "flow_steps", "flow_decay", "save_every", "shift"))
    clips, texts = draw_clips(config.clips, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        tokenizer = t5_tokenizer(words(texts), config.length)
        encoder = build_text_encoder(tokenizer, config.text_width)
        vae = build_video_vae(config.channels, config.vae_width)
        transformer = build_video_transformer(config)
    if not (out / "vae").exists():
        train_video_vae(vae, clips, out, config)
        vae.save_pretrained(out / "vae.partial")
        (out / "vae.partial").rename(out / "vae")
    # Read back even if it was just trained: the flow then starts from the same bits whenever it starts.
    vae = AutoencoderKLWan.from_pretrained(out / "vae").eval()
    ids, mask = token_ids(tokenizer, texts, config.length)
    none = token_ids(tokenizer, [""], config.length)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=config.shift)
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, scheduler=scheduler, transformer=transformer
    )

    def snapshot(step: int) -> None:
        save_pipeline(pipeline, out / "snapshots" / f"{step:05d}")
        on_snapshot(pipeline, step)

    latents = video_latents(vae, clips)
    train_video_flow(
        transformer, encoder, latents, ids, mask, (none[0][0], none[1][0]), out, config, snapshot
    )
    save_pipeline(pipeline, out / "pipeline")


def token_ids(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids and the mask of what is text, both [N, length]."""
    found = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return found["input_ids"], found["attention_mask"]


@torch.no_grad()
def sample_clips(pipeline: Any, prompts: Sequence[str], steps: int, guidance: float, seed: int) -> Tensor:
    """Clips [N, F, 3, H, W] in [0, 1] by the pipeline's own sampler; the seed alone decides the noise."""
    generator = torch.Generator().manual_seed(seed)
    pipeline.set_progress_bar_config(disable=True)
    found = [
        pipeline(
            list(prompts[start : start + 32]),
            height=SIDE,
            width=SIDE,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=pipeline.tokenizer.model_max_length,
            generator=generator,
            output_type="pt",
        ).frames
        for start in range(0, len(prompts), 32)
    ]
    return torch.cat(found)


def scores(clips: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """What the verifier says of clips [N, F, 3, H, W]: mean strict, soft, direction, and the static share."""
    verdicts = [score_clip(clip, parse_clip(prompt)) for clip, prompt in zip(clips, prompts, strict=True)]
    led = [verdict.direction for verdict in verdicts if verdict.direction is not None]
    return {
        "strict": float(np.mean([verdict.strict for verdict in verdicts])),
        "soft": float(np.mean([verdict.soft for verdict in verdicts])),
        "direction": float(np.mean(led)) if led else float("nan"),
        "static": float(np.mean([verdict.static for verdict in verdicts])),
    }
