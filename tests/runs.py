"""A tiny pipeline and the settings that let any recipe run on it in seconds."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from mmalign.testing import tiny_sd3

ROOT = Path(__file__).resolve().parent.parent


@cache
def tiny() -> Path:
    """One random pipeline for all tests of the session."""
    folder = Path(tempfile.mkdtemp(prefix="mmalign_tiny_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return tiny_sd3(folder)


def middle(folder: Path) -> Path:
    """The tiny pipeline with a denoiser of 73 million parameters and an autoencoder half as wide as SD3's."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

    network = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=8,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=32,
        caption_projection_dim=512,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    whole = StableDiffusion3Pipeline.from_pretrained(tiny(), transformer=network, vae=vae)
    whole.save_pretrained(folder)
    return folder


def small(folder: Path, *more: str) -> list[str]:
    """Overrides that make a recipe tiny and put its run into `folder`."""
    return [
        f"policy.model={tiny()}",
        "policy.height=64",
        "policy.width=64",
        "prompts.file=assets/lab/prompts/train.txt",
        "prompts.heldout_file=assets/lab/prompts/heldout.txt",
        "prompts.per_iteration=2",
        "prompts.group=2",
        "algorithm.steps=4",
        "training.iterations=2",
        "training.updates=2",
        "evaluation.prompts=3",
        "evaluation.seeds=2",
        "evaluation.steps=2",
        "run.tensorboard=false",
        f"run.dir={folder}",
        *more,
    ]
