"""Make labeled pictures, train an artifact detector on them, and measure it.

    python scripts/artifacts.py make --out runs/artifacts/train --count 4000
    python scripts/artifacts.py make --out runs/artifacts/test --count 800 --split heldout --unseen --seed 1
    python scripts/artifacts.py make --out runs/artifacts/own --clean PICTURES --damaged BAD_ROLLOUTS
    python scripts/artifacts.py make --out runs/artifacts/drawn --model FOLDER --prompts FILE
    python scripts/artifacts.py train --data runs/artifacts/train --tower assets/lab/dino --out runs/detector
    python scripts/artifacts.py evaluate --detector runs/detector --data runs/artifacts/test

`make` takes artifact-free pictures from --clean (a folder: references, or rollouts of a generator that
somebody looked through), or draws scenes of the lab in all their styles; beside each it puts one that is
damaged in a known way at a known place. Pictures in --damaged go in as they are, as artifacts. With --model
a generator draws: each picture in many steps, as artifact-free, and from the same noise in few, as artifacts.
Nobody looks whether they are: choose steps whose pictures you have seen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from mmalign.contracts import PolicySettings
from mmalign.data import read_prompts
from mmalign.evaluation import batches, repeat, spread
from mmalign.lab import compose, render, sample_task
from mmalign.lab.corruptions import SEEN, UNSEEN, corrupt
from mmalign.lab.render import STYLES
from mmalign.pictures import STILLS, open_picture
from mmalign.pipelines import load
from mmalign.pipelines.flow import FlowPolicy
from mmalign.rewardmodels.artifact import Detector
from mmalign.rewardmodels.artifact_training import (
    LABELS,
    evaluate_detector,
    fresh_tower,
    read_labeled,
    table,
    train_detector,
)
from mmalign.rewardmodels.vlm_score import picture_of
from mmalign.sde import Noise

FEW = "few_steps"  # the kind of damage that a draw of few steps has


def arguments() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    part = commands.add_parser("make", help="labeled pictures")
    part.add_argument("--out", type=Path, required=True, help="folder that is written")
    source = part.add_mutually_exclusive_group()
    source.add_argument(
        "--clean", type=Path, help="folder of artifact-free pictures; without, the lab's scenes"
    )
    source.add_argument("--model", help="folder or hub id of a flow pipeline that draws the pictures")
    part.add_argument("--prompts", type=Path, help="that --model draws, .txt or .jsonl")
    part.add_argument("--clean-steps", type=int, default=40, help="of an artifact-free draw (40)")
    part.add_argument("--damaged-steps", type=int, default=4, help="of a draw with artifacts (4)")
    part.add_argument("--guidance", type=float, default=1.0, help="of --model's draws (1: none)")
    part.add_argument("--max-sequence-length", type=int, default=256, help="tokens of a T5 of --model (256)")
    part.add_argument("--batch", type=int, default=16, help="pictures of --model at once (16)")
    part.add_argument("--damaged", type=Path, help="folder of pictures with artifacts, of unknown place")
    part.add_argument("--count", type=int, default=2000, help="of artifact-free pictures (2000)")
    part.add_argument("--size", type=int, default=64, help="pixels a side (64)")
    part.add_argument("--split", choices=("train", "heldout"), default="train", help="of the lab's scenes")
    part.add_argument(
        "--unseen", action="store_true", help="also the kinds that detectors are never trained on"
    )
    part.add_argument("--seed", type=int, default=0)
    part = commands.add_parser("train", help="a detector")
    part.add_argument("--data", type=Path, required=True, help="what `make` wrote, or labels of your own")
    start = part.add_mutually_exclusive_group(required=True)
    start.add_argument(
        "--tower",
        help="folder or hub id of an image model, assets/lab/dino; resnet: a small one from nothing",
    )
    start.add_argument("--start", help="detector that is trained further")
    part.add_argument("--out", type=Path, required=True, help="folder of the detector")
    part.add_argument("--steps", type=int, default=1000)
    part.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (100)")
    part.add_argument("--batch", type=int, default=64)
    part.add_argument("--lr", type=float, default=1e-3)
    part.add_argument("--frozen", action="store_true", help="train the heads alone")
    part.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    part.add_argument("--device", default="cpu")
    part.add_argument("--seed", type=int, default=0)
    part = commands.add_parser("evaluate", help="AUC, calibration, by kind")
    part.add_argument("--detector", required=True)
    part.add_argument("--data", type=Path, required=True)
    part.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args()


def drawn(options: argparse.Namespace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A model's draws of many and of few steps from the same noise, [S, S, 3] in [0, 1] each."""
    if options.prompts is None:
        raise ValueError("--model needs --prompts, a file of what it is to draw")
    if not 0 < options.damaged_steps < options.clean_steps:
        raise ValueError(
            "--damaged-steps must lie between 1 and --clean-steps, got "
            f"{options.damaged_steps} and {options.clean_steps}"
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    settings = PolicySettings(
        options.model, guidance=options.guidance, max_sequence_length=options.max_sequence_length
    )
    policy = load(settings, Noise(), device or "cpu")
    if not isinstance(policy, FlowPolicy):
        raise ValueError(f"--model {options.model} writes texts, and pictures are needed")
    prompts = read_prompts(options.prompts)
    places = spread(len(prompts), min(options.count, len(prompts)))
    asked, key = repeat(prompts, places, -(-options.count // len(places))), (options.seed, "artifacts")
    for rows in batches(options.count, options.batch):
        many, few = (
            policy.images(asked.take(rows), steps, key).float().cpu()
            for steps in (options.clean_steps, options.damaged_steps)
        )
        if many.ndim != 4:
            raise ValueError(f"--model {options.model} draws videos, and pictures are needed")
        for one, other in zip(many, few, strict=True):
            yield brought_to(picture_of(one), options.size), brought_to(picture_of(other), options.size)


def clean_pictures(options: argparse.Namespace) -> Iterator[np.ndarray]:
    """Artifact-free pictures [S, S, 3] in [0, 1]."""
    if options.clean is None:
        rng = random.Random(f"artifacts {options.split} {options.seed}")
        for _ in range(options.count):
            scene = compose(sample_task(rng, split=options.split), rng)
            yield render(scene, options.size, rng.choice(STYLES)) / 255
        return
    for file in files_in(options.clean)[: options.count]:
        yield fitted(file, options.size)


def files_in(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in STILLS)
    if not found:
        raise SystemExit(f"error: {folder} holds no pictures ({', '.join(STILLS)})")
    return found


def fitted(file: Path, size: int) -> np.ndarray:
    return brought_to(open_picture(file), size)


def brought_to(picture: Image.Image, size: int) -> np.ndarray:
    """The middle square of a picture, [size, size, 3] in [0, 1]."""
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)) / 255


def make(options: argparse.Namespace) -> None:
    """Writes pictures, masks and labels."""
    options.out.mkdir(parents=True, exist_ok=True)
    kinds = SEEN + UNSEEN if options.unseen else SEEN
    draws, number = np.random.default_rng(options.seed), 0

    def write(picture: np.ndarray, **label: object) -> str:
        nonlocal number
        number += 1
        name = f"{number:06d}"
        Image.fromarray((255 * picture).round().astype(np.uint8)).save(options.out / f"{name}.png")
        labels.write(json.dumps({"file": f"{name}.png", **label}) + "\n")
        return name

    with open(options.out / LABELS, "w") as labels:
        pairs = drawn(options) if options.model else ((picture, None) for picture in clean_pictures(options))
        for place, (picture, rough) in enumerate(tqdm(pairs, "make", total=options.count)):
            write(picture, artifact=False)
            if rough is not None:
                write(rough, artifact=True, kind=FEW)
            kind = kinds[place % len(kinds)]
            found = corrupt(picture, kind, draws)
            mask = f"{number + 1:06d}_mask.png"
            Image.fromarray(found.mask).save(options.out / mask)
            write(found.picture, artifact=True, kind=kind, mask=mask, seen=kind in SEEN)
        for file in files_in(options.damaged) if options.damaged else ():
            write(fitted(file, options.size), artifact=True)
    print(f"{number} pictures in {options.out}")


def train(options: argparse.Namespace) -> None:
    """Trains a detector and writes its folder; the same command goes on with a run that was killed."""
    data = read_labeled(options.data)
    bar = tqdm(total=options.steps, desc="train")
    mean = {"loss": 0.0, "right": 0.5}

    def log(row: dict[str, float]) -> None:
        for key in mean:
            mean[key] += 0.05 * (row[key] - mean[key])
        bar.set_postfix({key: f"{value:.3f}" for key, value in mean.items()}, refresh=False)
        bar.update()

    if options.tower == "resnet":
        options.tower = str(options.out / "fresh")
        fresh_tower(Path(options.tower))
    detector = Detector.load(options.start) if options.start else Detector(options.tower)
    detector.to(options.device)
    settings = {key: getattr(options, key) for key in ("steps", "batch", "lr", "frozen", "precision", "seed")}
    train_detector(detector, data, **settings, log=log, folder=options.out, every=options.save_every)
    bar.close()
    detector.to("cpu").save(options.out)
    print(f"{options.out}: temperature {detector.temperature:.2f}")


def evaluate(options: argparse.Namespace) -> None:
    """Prints how good a detector is."""
    found = evaluate_detector(Detector.load(options.detector), read_labeled(options.data))
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    options = arguments()
    try:
        {"make": make, "train": train, "evaluate": evaluate}[options.command](options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
