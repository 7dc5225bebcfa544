"""A small AutoencoderKL, and latents of unit variance without a scaling factor."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.lab.pretrain_loop import Schedule, Stage

KL_WEIGHT = 1e-3


def build_vae(size: int, widths: tuple[int, ...] = (16, 32, 64, 64), latent_channels: int = 8) -> Any:
    """A fresh autoencoder that halves the picture at every width but the first."""
    from diffusers import AutoencoderKL

    levels = len(widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
        use_quant_conv=True,
        use_post_quant_conv=True,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def as_pixels(pictures: Tensor) -> Tensor:
    """Pictures uint8 [B, H, W, 3] as the autoencoder sees them: fp32 [B, 3, H, W] in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(
    vae: Any, pictures: Tensor, folder: Path, steps: int, batch: int, lr: float, seed: int, save_every: int
) -> None:
    """Trains the autoencoder in place on pictures uint8 [N, H, W, 3], and normalizes its latents."""
    vae.train().to(memory_format=torch.channels_last)  # twice as fast on CPU at these widths

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(pictures), (batch,), generator=generator)
        pixels = as_pixels(pictures[picked]).contiguous(memory_format=torch.channels_last)
        latents = vae.encode(pixels).latent_dist
        restored = vae.decode(latents.sample(generator)).sample
        error = (restored - pixels).abs().mean()
        kl = latents.kl().sum() / latents.mean.numel()
        return error + KL_WEIGHT * kl, {"l1": error.item(), "kl": kl.item()}

    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = Schedule(steps, warmup=min(50, steps), decay=steps // 2)
    modules = {"vae": vae}
    Stage("vae", folder, modules, [optimizer], schedule, loss, seed, ema=0.99, save_every=save_every).run()
    vae.eval()
    fold_normalization(vae, *latent_moments(vae, pictures[:1024]))


@torch.no_grad()
def encode_mean(vae: Any, pictures: Tensor, batch: int = 64) -> Tensor:
    """Mean latents [N, C, h, w] of pictures uint8 [N, H, W, 3]."""
    pixels = (
        as_pixels(part).contiguous(memory_format=torch.channels_last) for part in torch.split(pictures, batch)
    )
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels]).contiguous()


@torch.no_grad()
def latent_moments(vae: Any, pictures: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of every channel of sampled latents.

    Sampled, not mean ones: a channel that the pictures do not use has a mean that hardly moves, and must not
    be blown up to unit variance for the flow to learn.
    """
    parts = [vae.encode(as_pixels(part)).latent_dist for part in torch.split(pictures, batch)]
    means, variances = torch.cat([part.mean for part in parts]), torch.cat([part.var for part in parts])
    return means.mean((0, 2, 3)), (means.var((0, 2, 3)) + variances.mean((0, 2, 3))).sqrt()


@torch.no_grad()
def fold_normalization(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Makes (latent - mean) / std the latent, in place; mean, std: [C]. Restored pictures stay the same.

    SD3 pipelines know one scalar scale and shift, so channels are normalized in the two 1 x 1 convolutions
    around the latent.
    """
    channels = len(mean)
    inward, outward = vae.quant_conv, vae.post_quant_conv
    inward.bias[:channels] = (inward.bias[:channels] - mean) / std
    inward.weight[:channels] /= std[:, None, None, None]
    inward.bias[channels:] -= 2 * std.log()  # the second half of the outputs is the log-variance
    outward.bias += (outward.weight[:, :, 0, 0] * mean).sum(1)
    outward.weight *= std[None, :, None, None]
