"""Preference pairs of the lab's clips, a judge that thinks before it scores, and how good it is.

    python scripts/descore.py watcher --out runs/watcher
    python scripts/descore.py pairs --out runs/pairs/train --count 2000
    python scripts/descore.py pairs --out runs/pairs/test --count 300 --split heldout --seed 1
    python scripts/descore.py train --stage 1 --model runs/watcher/watcher --pairs runs/pairs/train \
        --out runs/descore/cold --instruction "{prompt}" --frames 3 --longest 96 --lr 1e-3 --steps 250 \
        --words 1
    python scripts/descore.py train --stage 2 --start runs/descore/cold --pairs runs/pairs/train \
        --out runs/descore/dual --lr 1e-4 --steps 60 --length-step 40
    python scripts/descore.py evaluate --weights runs/descore/dual --pairs runs/pairs/test

`watcher` teaches the lab's captioner to watch clips; it stands for the video model that one would start from.
Pairs of one's own are a folder with pairs.jsonl (mmalign/descore_training.py), of frames or video files.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from PIL import Image
from tqdm import tqdm

from mmalign.descore_training import (
    PAIRS,
    ColdStart,
    DualRL,
    Student,
    calibrated,
    cold_start,
    dual_rl,
    evaluated,
    read_pairs,
)
from mmalign.lab.clip_pairs import Judged, draw_pair, looked_at, reason
from mmalign.lab.clips import render_clip
from mmalign.lab.pretrain_watcher import WatcherPretraining, pretrain_watcher
from mmalign.lab.scenes import CANVAS
from mmalign.rewardmodels.descore import Thinker, ThinkerSettings
from mmalign.rewardmodels.precisions import DTYPES

STAGES = {1: ColdStart, 2: DualRL}


def arguments() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    part = commands.add_parser("watcher", help="the lab's captioner, taught to watch clips")
    part.add_argument("--out", type=Path, required=True, help="the run; OUT/watcher is the model")
    add_settings(part, WatcherPretraining)
    part = commands.add_parser("pairs", help="preference pairs of the lab's clips")
    part.add_argument("--out", type=Path, required=True, help="folder that is written")
    part.add_argument("--count", type=int, default=2000)
    part.add_argument("--split", choices=("train", "heldout"), default="train", help="of the prompts")
    part.add_argument("--frames", type=int, default=3, help="frames that the reasoning tells of (3)")
    part.add_argument("--seed", type=int, default=0)
    part = commands.add_parser("train", help="a judge, stage 1 or 2")
    part.add_argument("--stage", type=int, choices=(1, 2), required=True, help="cold start or dual RL")
    part.add_argument("--pairs", type=Path, required=True, help="folder with pairs.jsonl")
    part.add_argument("--out", type=Path, required=True, help="folder of the judge")
    part.add_argument("--model", help="image-text-to-text model, a folder or hub id; stage 2: its new place")
    part.add_argument("--start", type=Path, help="stage 2: what stage 1 wrote")
    for field in fields(ThinkerSettings):
        if field.name not in ("model", "scale"):
            kind = type(field.default)
            part.add_argument(f"--{field.name}", type=kind, help=f"stage 1: {field.default}")
    part.add_argument("--calibrate", type=int, default=100, help="pairs that mean and deviation are of (100)")
    part.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of what is frozen (fp32)"
    )
    part.add_argument("--gradient-checkpointing", action="store_true", help="slower, in less memory")
    part.add_argument("--device", default="cpu")
    add_settings(part, *STAGES.values())
    part = commands.add_parser("evaluate", help="accuracy on pairs")
    part.add_argument("--weights", required=True, help="what train wrote")
    part.add_argument("--model", help="what it was trained from, if it lies elsewhere now")
    part.add_argument("--pairs", type=Path, required=True)
    part.add_argument("--precision", choices=DTYPES, default="fp32", help="of the network (fp32)")
    part.add_argument("--batch", type=int, default=16, help="videos at once (16)")
    part.add_argument("--device", default="cpu")
    part.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args()


def add_settings(parser: argparse.ArgumentParser, *settings: Any) -> None:
    """An option for each field of dataclasses; None where it is not given."""
    every: dict[str, list[Any]] = {}
    for kind in settings:
        for field in fields(kind):
            every.setdefault(field.name, []).append(field.default)
    for name, defaults in every.items():
        told = " or ".join(dict.fromkeys(map(str, defaults)))
        parser.add_argument("--" + name.replace("_", "-"), type=type(defaults[0]), help=told)


def chosen(kind: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a dataclass that the command line names."""
    named = {field.name: getattr(options, field.name, None) for field in fields(kind)}
    return {name: value for name, value in named.items() if value is not None}


def options_of(stage: int) -> set[str]:
    """The options of `train` that a stage takes."""
    if stage == 2:
        return {"start", "model", *(field.name for field in fields(DualRL))}
    return {field.name for kind in (ThinkerSettings, ColdStart) for field in fields(kind)} - {"scale"}


def watcher(options: argparse.Namespace) -> None:
    pretrain_watcher(WatcherPretraining(**chosen(WatcherPretraining, options)), options.out)


def pairs(options: argparse.Namespace) -> None:
    """Writes clips, each a zip of its frames, and pairs.jsonl when all are there."""
    (options.out / "clips").mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"pairs {options.split} {options.seed}")
    numbers = looked_at(options.frames)

    def write(judged: Judged, name: str) -> dict[str, object]:
        with zipfile.ZipFile(options.out / "clips" / f"{name}.zip", "w") as archive:
            for i, frame in enumerate(render_clip(judged.clip, CANVAS)):
                buffer = io.BytesIO()
                Image.fromarray(frame).save(buffer, "PNG")
                archive.writestr(f"clip/{i}.png", buffer.getvalue())
        video = f"clips/{name}.zip/clip"
        return {"video": video, "reasoning": reason(judged, numbers), "scores": judged.scores}

    lines = []
    for i in tqdm(range(options.count), "pairs"):
        pair = draw_pair(rng, options.split)
        row: dict[str, object] = {"prompt": pair.prompt, "tie": pair.tie, "kind": pair.kind}
        row["chosen"] = write(pair.chosen, f"{i:05d}_chosen")
        row["rejected"] = write(pair.rejected, f"{i:05d}_rejected")
        lines.append(json.dumps(row) + "\n")
    (options.out / PAIRS).write_text("".join(lines), encoding="utf-8")


def train(options: argparse.Namespace) -> None:
    """Trains a judge and writes its folder; the same command goes on with a run that was killed."""
    own, other = (options_of(stage) for stage in (options.stage, 3 - options.stage))
    if odd := [name for name in sorted(other - own) if getattr(options, name) is not None]:
        raise ValueError(f"stage {options.stage} takes no --{odd[0].replace('_', '-')}")
    if options.calibrate < 1:
        raise ValueError(f"--calibrate must be 1 or more pairs, got {options.calibrate}")
    found, kind = read_pairs(options.pairs), STAGES[options.stage]
    settings = kind(**chosen(kind, options))
    if options.stage == 1:
        if not options.model:
            raise ValueError("stage 1 needs --model, what the judge starts from")
        said = ThinkerSettings(**chosen(ThinkerSettings, options))
        judge = Thinker(said, options.precision)
        student = Student(judge, settings.rank, settings.alpha, settings.seed)
    else:
        if not options.start:
            raise ValueError("stage 2 needs --start, what stage 1 wrote")
        student = Student.load(options.start, options.model, options.precision)
    if options.gradient_checkpointing:
        student.judge.checkpoint_gradients()
    student.judge.to(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=settings.steps, desc=f"stage {options.stage}")
    with open(options.out / "log.jsonl", "w") as lines:

        def log(row: dict[str, float]) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            told = ("loss", "reward", "accuracy", "right")
            bar.set_postfix({name: f"{row[name]:.3f}" for name in told if name in row}, refresh=False)
            bar.update()

        (cold_start if options.stage == 1 else dual_rl)(student, found, settings, log, options.out)
    bar.close()
    calibrated(student.judge, found[: options.calibrate], 2 * settings.chunk)
    student.save(options.out)
    print(f"{options.out}: mean and deviation {student.judge.settings.scale}")


def evaluate(options: argparse.Namespace) -> None:
    """Prints how good a judge is."""
    if options.batch < 1:
        raise ValueError(f"--batch must be 1 or more videos, got {options.batch}")
    asked = read_pairs(options.pairs)
    judge = Thinker.load(options.weights, options.model, options.precision).to(options.device)
    found = evaluated(judge, asked, options.batch)
    names = list(found["all"])
    print("| kind | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names))
    for kind, row in found.items():
        told = [f"{row[name]:.3f}" if name != "pairs" else f"{row[name]:.0f}" for name in names]
        print(f"| {kind} | " + " | ".join(told) + " |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    options = arguments()
    try:
        commands = {"watcher": watcher, "pairs": pairs, "train": train, "evaluate": evaluate}
        commands[options.command](options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
