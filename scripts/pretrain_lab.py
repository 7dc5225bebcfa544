"""Trains a complete small SD3 pipeline from nothing, on the lab or on any captioned pictures; or a captioner;
a Wan pipeline on clips of the lab; a Kontext pipeline on its edits; a CLIP or a DINO of its pictures; or an
autoencoder of all its styles.

    python scripts/pretrain_lab.py --out runs/pretrain_lab
    python scripts/pretrain_lab.py --data data/emoji/64 --out runs/pretrain_emoji --flow-steps 2000
    python scripts/pretrain_lab.py captioner --out runs/captioner
    python scripts/pretrain_lab.py video --out runs/video
    python scripts/pretrain_lab.py edit --out runs/edit
    python scripts/pretrain_lab.py clip --out runs/vision
    python scripts/pretrain_lab.py dino --out runs/vision
    python scripts/pretrain_lab.py styles_vae --out runs/vision

The model is written to OUT/pipeline, OUT/captioner, OUT/clip, OUT/dino or OUT/styles_vae; the same command
again goes on where it stopped.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

# Spinning threads slow each other down fourfold when anything else runs; must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from mmalign.lab.pretrain import Pretraining, pretrain
from mmalign.lab.pretrain_data import draw_lab, read_captioned

LAB_SCENES = 100_000  # drawn for training; each is seen about five times
CAPTIONED_SCENES = 24_000
SCORED_EDITS = 256  # held-out ones, at every snapshot
SCORED_CLIPS = 64  # of prompts that are not trained on, at every snapshot
SCORED_IMAGES = 2  # of each held-out prompt, at every snapshot


def add_settings(parser: argparse.ArgumentParser, settings: Any) -> None:
    """An option for each number or word among the settings, a dataclass."""
    for field in fields(settings):
        default = field.default
        if isinstance(default, int | float | str):
            name = "--" + field.name.replace("_", "-")
            parser.add_argument(name, type=type(default), default=default, help=str(default))


def parsed(given: list[str], settings: Any, which: str, result: str) -> tuple[Any, Path]:
    """The settings that `pretrain_lab.py WHICH` was given, and the folder of the run."""
    parser = argparse.ArgumentParser(prog=f"pretrain_lab.py {which}")
    parser.add_argument("--out", type=Path, required=True, help=f"the run; OUT/{result} is the result")
    add_settings(parser, settings)
    chosen = vars(parser.parse_args(given))
    out = chosen.pop("out")
    return settings(**chosen), out


def arguments() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, required=True, help="the run; OUT/pipeline is the result")
    parser.add_argument(
        "--data", type=Path, help="folder with metadata.jsonl or .tar shards; without, the lab"
    )
    parser.add_argument("--start", type=Path, help="a pipeline of this script whose flow is trained further")
    add_settings(parser, Pretraining)
    parser.add_argument("--layers", type=int, help="of the transformer")
    parser.add_argument("--heads", type=int, help="of the transformer, each 32 wide")
    parser.add_argument("--text-length", type=int, help="tokens of a caption, start and end included")
    return parser.parse_args()


def settings(chosen: argparse.Namespace) -> Pretraining:
    """The pretraining the command line asks for."""
    given = vars(chosen)
    config = Pretraining(**{key.name: given[key.name] for key in fields(Pretraining) if key.name in given})
    flow = {name: given[name] for name in ("layers", "heads") if given[name]}
    text = {"length": given["text_length"]} if given["text_length"] else {}
    return replace(config, flow=replace(config.flow, **flow), text=replace(config.text, **text))


def score_snapshot(pipeline: Any, step: int, out: Path) -> None:
    """Notes what the verifier says about held-out prompts, and leaves a sheet of pictures to look at."""
    from mmalign.lab.pretrain_score import score_pipeline
    from mmalign.lab.prompts import held_out_prompts

    sheet = out / f"sheet_{step:05d}.png"
    found = score_pipeline(pipeline, held_out_prompts(), SCORED_IMAGES, steps=20, guidance=1.0, sheet=sheet)
    strict, soft = found.share()
    with open(out / "scores.jsonl", "a") as log:
        log.write(json.dumps({"step": step, "strict": round(strict, 4), "soft": round(soft, 4)}) + "\n")
    print(f"\nstep {step}: held-out prompts strict {strict:.3f}, soft {soft:.3f}")


def sheet_snapshot(pipeline: Any, step: int, out: Path, captions: list[str]) -> None:
    """Leaves a sheet of pictures to look at."""
    from mmalign.lab.pretrain_flow import sample
    from mmalign.lab.pretrain_score import write_sheet

    shown = captions[:: max(1, len(captions) // 64)][:64]
    write_sheet(sample(pipeline, shown, steps=20, guidance=2.5, seed=0), shown, out / f"sheet_{step:05d}.png")


def captioner(given: list[str]) -> None:
    """Trains the lab's captioner."""
    from mmalign.lab.captions import draw_scene
    from mmalign.lab.pretrain_captioner import CaptionerPretraining, pretrain_captioner, rates

    config, out = parsed(given, CaptionerPretraining, "captioner", "captioner")
    rng, unseen = (random.Random(f"captioner {purpose}{config.seed}") for purpose in ("", "heldout "))
    scenes = [draw_scene(rng) for _ in range(CAPTIONED_SCENES)]
    scored = [draw_scene(unseen, "heldout") for _ in range(100)]

    def snapshot(model: Any, processor: Any, step: int) -> None:
        wrong, silent = rates(model, processor, scored, config.seed)
        with open(out / "scores.jsonl", "a") as log:
            log.write(json.dumps({"step": step, "hallucination": wrong, "omission": silent}) + "\n")
        print(f"\nstep {step}: held-out scenes, hallucination {wrong:.3f}, omission {silent:.3f}")

    pretrain_captioner(config, scenes, out, snapshot)


def video(given: list[str]) -> None:
    """Trains the lab's video model."""
    from mmalign.lab.clips import list_clip_prompts
    from mmalign.lab.pretrain_video import VideoPretraining, pretrain_video, sample_clips, scores

    config, out = parsed(given, VideoPretraining, "video", "pipeline")
    prompts = list_clip_prompts(SCORED_CLIPS, "train", seed=2)

    def snapshot(pipeline: Any, step: int) -> None:
        found = scores(sample_clips(pipeline, prompts, steps=12, guidance=1.0, seed=0), prompts)
        with open(out / "scores.jsonl", "a") as log:
            log.write(json.dumps({"step": step, **found}) + "\n")
        print(f"\nstep {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))

    pretrain_video(config, out, snapshot)


def edit(given: list[str]) -> None:
    """Trains the lab's editor."""
    from mmalign.lab.pretrain_edit import EditPretraining, carry_out, draw_edits, judged, pretrain_edit

    config, out = parsed(given, EditPretraining, "edit", "pipeline")
    drawn = draw_edits(SCORED_EDITS, config.seed, "heldout")
    sources, edits = [source for source, _, _ in drawn], [edit for _, edit, _ in drawn]

    def snapshot(pipeline: Any, step: int) -> None:
        pictures = carry_out(pipeline, sources, edits, steps=20, seed=0)
        verdicts = judged(pictures, sources, edits)
        found = {
            name: sum(float(getattr(verdict, name)) for verdict in verdicts) / len(verdicts)
            for name in ("strict", "soft", "change", "stay")
        }
        with open(out / "scores.jsonl", "a") as log:
            log.write(json.dumps({"step": step, **found}) + "\n")
        print(f"\nstep {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))

    pretrain_edit(config, out, snapshot)


def vision(which: str, given: list[str]) -> None:
    """Trains the lab's CLIP, its DINO or its autoencoder of all styles, and says how good it is."""
    from mmalign.lab.pretrain_clip import ClipTraining, train_clip
    from mmalign.lab.pretrain_dino import DinoTraining, train_dino
    from mmalign.lab.pretrain_styles import StylesTraining, train_styles

    trainings: dict[str, tuple[Any, Callable[[Any, Path], dict[str, Any]]]] = {
        "clip": (ClipTraining, train_clip),
        "dino": (DinoTraining, train_dino),
        "styles_vae": (StylesTraining, train_styles),
    }
    settings, train = trainings[which]
    config, out = parsed(given, settings, which, which)
    found = json.dumps(train(config, out), indent=2)
    (out / f"{which}_quality.json").write_text(found + "\n")
    print(found)


def main() -> None:
    named: dict[str, Callable[[list[str]], None]] = {
        "captioner": captioner,
        "video": video,
        "edit": edit,
        "clip": partial(vision, "clip"),
        "dino": partial(vision, "dino"),
        "styles_vae": partial(vision, "styles_vae"),
    }
    for name, train in named.items():
        if sys.argv[1:2] == [name]:
            train(sys.argv[2:])
            return
    chosen = arguments()
    config = settings(chosen)
    if chosen.data is None:
        data = draw_lab(LAB_SCENES, config.seed)
        pretrain(config, data, chosen.out, partial(score_snapshot, out=chosen.out), chosen.start)
    else:
        data = read_captioned(chosen.data, config.size)
        sheet = partial(sheet_snapshot, out=chosen.out, captions=data.captions)
        pretrain(config, data, chosen.out, sheet, chosen.start)


if __name__ == "__main__":
    main()
