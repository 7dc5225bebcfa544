"""Train the latent identity reward on labeled videos, and measure it; or write the lab's clips for feedback.

    python scripts/latent_identity.py train --out runs/video_identity
    python scripts/latent_identity.py train --base assets/lab/video --data labeled.jsonl --out runs/identity
    python scripts/latent_identity.py evaluate --model runs/video_identity
    python scripts/latent_identity.py prompts --out runs/identity_clips --count 240

`train` takes the first blocks of the denoiser of --base. Without --data it draws clips of the lab: kept,
swapped and vanished subjects, and subjects of another reference. `evaluate` tells accuracy in each bucket of
noise levels on held-out clips. `prompts` writes files for `lirefl`: kept clips with their prompts, references
and boxes, and held-out prompts with references.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mmalign.lab.identity_clips import IdentityClip, draw_identity_clip, draw_identity_clips
from mmalign.rewardmodels.latent_identity import SAID, IdentityNetwork, LatentSpace
from mmalign.rewardmodels.latent_identity_training import (
    LabeledLatents,
    label_latents,
    measure_identity,
    read_labeled_videos,
    train_identity,
)

PICTURES = "pictures.zip"


def arguments() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    train = commands.add_parser("train", help="a reward network")
    train.add_argument("--base", default="assets/lab/video", help="a Wan pipeline (assets/lab/video)")
    train.add_argument("--blocks", type=int, default=2, help="of its denoiser that are kept (2)")
    train.add_argument("--query", choices=("reference", "video"), default="reference", help="what asks")
    train.add_argument("--out", type=Path, required=True, help="folder of the network")
    train.add_argument("--steps", type=int, default=800)
    train.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (100)")
    train.add_argument("--batch", type=int, default=48)
    train.add_argument("--lr", type=float, default=1e-3, help="of the head (1e-3)")
    train.add_argument("--blocks-lr", type=float, default=1e-3, help="of the denoiser's blocks (1e-3)")
    train.add_argument("--device", default="cpu")
    train.add_argument("--seed", type=int, default=0)
    evaluate = commands.add_parser("evaluate", help="accuracy by noise level")
    evaluate.add_argument("--model", type=Path, required=True)
    evaluate.add_argument("--json", type=Path, help="write the figures there")
    for part, count in ((train, 6000), (evaluate, 600)):
        part.add_argument("--data", type=Path, help="labeled videos; without, clips of the lab")
        part.add_argument("--clips", type=int, default=count, help=f"of the lab ({count})")
        for name, default in (("height", 32), ("width", 32), ("frames", 9)):
            part.add_argument(f"--{name}", type=int, default=default, help=f"of --data ({default})")
    prompts = commands.add_parser("prompts", help="clips and prompts of the lab for lirefl")
    prompts.add_argument("--out", type=Path, required=True, help="folder that is written")
    prompts.add_argument("--count", type=int, default=240, help="of training clips (240)")
    prompts.add_argument("--heldout", type=int, default=96, help="of held-out prompts (96)")
    prompts.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def labeled(options: argparse.Namespace, space: LatentSpace, split: str, seed: int) -> LabeledLatents:
    """The set of --data, or clips of the lab."""
    if options.data is not None:
        return read_labeled_videos(options.data, space, options.height, options.width, options.frames)
    clips = draw_identity_clips(options.clips, split, seed)
    return label_latents(
        space,
        torch.from_numpy(np.stack([clip.frames for clip in clips])).permute(0, 1, 4, 2, 3),
        torch.from_numpy(np.stack([clip.reference for clip in clips])).permute(0, 3, 1, 2),
        [clip.prompt for clip in clips],
        [clip.kept for clip in clips],
        [clip.kind for clip in clips],
    )


def train(options: argparse.Namespace) -> None:
    """Trains a network and writes its folder; the same command goes on with a run that was killed."""
    from diffusers import WanTransformer3DModel

    space = LatentSpace(options.base)
    transformer = WanTransformer3DModel.from_pretrained(options.base, subfolder="transformer").float()
    network = IdentityNetwork(transformer, options.blocks, options.query, seed=options.seed)
    data = labeled(options, space, "train", options.seed)
    bar, mean = tqdm(total=options.steps, desc="train"), {"loss": 0.7, "right": 0.5}

    def log(row: dict[str, float]) -> None:
        for key in mean:
            mean[key] += 0.02 * (row[key] - mean[key])
        bar.set_postfix({key: f"{value:.3f}" for key, value in mean.items()}, refresh=False)
        bar.update()

    settings = {key: getattr(options, key) for key in ("steps", "batch", "lr", "blocks_lr", "seed")}
    train_identity(
        network.to(options.device),
        space,
        data,
        **settings,
        log=log,
        folder=options.out,
        every=options.save_every,
    )
    bar.close()
    network.to("cpu").save(options.out, options.base)
    print(f"{options.out}: loss {mean['loss']:.3f}, right {mean['right']:.3f} in the last steps")


def evaluate(options: argparse.Namespace) -> None:
    """Prints how often a network is right at each noise level."""
    network = IdentityNetwork.load(options.model)
    space = LatentSpace(json.loads((options.model / SAID).read_text())["base"])
    found = measure_identity(network, space, labeled(options, space, "heldout", 1))
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def table(rows: list[dict[str, float]]) -> str:
    """Percentages as a Markdown table."""
    names = [name for name in rows[0] if name not in ("low", "high")]
    lines = ["| noise | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for row in rows:
        cells = " | ".join(f"{100 * row[name]:.0f}" for name in names)
        lines.append(f"| {row['low']:.1f} to {row['high']:.1f} | {cells} |")
    return "\n".join(lines)


def prompts(options: argparse.Namespace) -> None:
    """Writes train.jsonl, heldout.jsonl, and their pictures in one archive."""
    import random

    options.out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(options.out / PICTURES, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, count in (("train", options.count), ("heldout", options.heldout)):
            rng = random.Random(f"identity prompts {split} {options.seed}")
            rows: dict[str, dict[str, Any]] = {}
            while len(rows) < count:
                clip = draw_identity_clip(rng, "kept", split)
                if clip.prompt not in rows:
                    rows[clip.prompt] = written(clip, split, len(rows), archive)
            text = "".join(json.dumps(row) + "\n" for row in rows.values())
            (options.out / f"{split}.jsonl").write_text(text)
    print(f"{options.count} clips and {options.heldout} held-out prompts in {options.out}")


def written(clip: IdentityClip, split: str, number: int, archive: zipfile.ZipFile) -> dict[str, Any]:
    """A line of a prompt file; pictures that are not there yet go into the archive."""

    def put(name: str, pixels: np.ndarray) -> str:
        if name not in archive.NameToInfo:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG", optimize=True)
            archive.writestr(zipfile.ZipInfo(name), file.getvalue())
        return f"{PICTURES}/{name}"

    color, shape = clip.prompt.split()[1:3]
    row: dict[str, Any] = {
        "prompt": clip.prompt,
        "reference_image": put(f"references/{color}_{shape}.png", clip.reference),
    }
    if split == "train":
        for frame, pixels in enumerate(clip.frames):
            put(f"{number:04d}/{frame}.png", pixels)
        row |= {
            "video": f"{PICTURES}/{number:04d}",
            "boxes": [box and [round(side, 3) for side in box] for box in clip.boxes],
        }
    return row


def main() -> None:
    options = arguments()
    try:
        {"train": train, "evaluate": evaluate, "prompts": prompts}[options.command](options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
