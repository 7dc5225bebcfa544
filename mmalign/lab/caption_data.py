"""The lab's captioned pictures for training and evaluation of captioners, with references and questions.

The lists in the repository were written by `python -m mmalign.lab.caption_data assets/lab/captions`.
"""

from __future__ import annotations

import io
import json
import random
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.lab.captions import CAREFUL, INSTRUCTION, as_json, describe, draw_scene, spoil, write
from mmalign.lab.questions import multiple_choice, single_choice
from mmalign.lab.render import render
from mmalign.lab.scenes import Scene

COUNTS = {"train": 1250, "validation": 150, "heldout": 300}
ARCHIVE = "images.zip"
STAMP = (2000, 1, 1, 0, 0, 0)  # of every member, so that the archive is the same whenever it is written
QUESTIONS = 3


def line(scene: Scene, image: str, rng: random.Random) -> dict[str, Any]:
    """What is known of a picture, as one line of a prompt file."""
    asked = [
        {"question": q.question, "choices": q.choices, "answer": q.answers[0]}
        for q in single_choice(scene, rng)[:QUESTIONS]
    ]
    several = rng.choice(multiple_choice(scene, rng))
    return {
        "prompt": INSTRUCTION,
        "image": f"{ARCHIVE}/{image}",
        "reference": write(spoil(describe(scene), CAREFUL, rng)),
        "scene": as_json(scene),
        "questions": asked,
        "several": {"question": several.question, "choices": several.choices, "answers": several.answers},
    }


def as_png(picture: np.ndarray) -> bytes:
    """A picture uint8 [H, W, 3] as a PNG with a palette where it has at most 256 colors, bit for bit."""
    from PIL import Image

    colors, index = np.unique(picture.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colors) > 256:
        image = Image.fromarray(picture)
    else:
        image = Image.fromarray(index.reshape(picture.shape[:2]).astype(np.uint8), "P")
        image.putpalette(colors.tobytes())
    found = io.BytesIO()
    image.save(found, "PNG", optimize=True)
    return found.getvalue()


def write_lists(folder: Path, counts: Mapping[str, int] = COUNTS) -> None:
    """Writes train.jsonl, validation.jsonl, heldout.jsonl and images.zip; no scene is in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random("captions")
    seen: set[Scene] = set()
    with zipfile.ZipFile(folder / ARCHIVE, "w") as archive:
        for name, count in counts.items():
            lines: list[str] = []
            while len(lines) < count:
                scene = draw_scene(rng, "heldout" if name == "heldout" else "train")
                if scene in seen:
                    continue
                seen.add(scene)
                image = f"{name}_{len(lines):04d}.png"
                archive.writestr(zipfile.ZipInfo(image, STAMP), as_png(render(scene)))
                lines.append(json.dumps(line(scene, image, rng), separators=(",", ":")))
            (folder / f"{name}.jsonl").write_text("".join(f"{text}\n" for text in lines))


if __name__ == "__main__":
    write_lists(Path(sys.argv[1]))
