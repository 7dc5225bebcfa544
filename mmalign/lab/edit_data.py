"""The lab's edits for training and evaluation of editors: instructions with the pictures to edit.

The lists in the repository were written by `python -m mmalign.lab.edit_data assets/lab/edits`.
"""

from __future__ import annotations

import json
import random
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmalign.lab.caption_data import STAMP, as_png
from mmalign.lab.captions import as_json
from mmalign.lab.edits import Edit, draw_edit, write_edit, write_plan
from mmalign.lab.render import render
from mmalign.lab.scenes import Scene

COUNTS = {"train": 640, "validation": 128, "heldout": 192}
ARCHIVE = "sources.zip"


def line(source: Scene, edit: Edit, picture: str) -> dict[str, Any]:
    """What is known of an edit, as one line of a prompt file."""
    return {
        "prompt": write_edit(edit),
        "source": f"{ARCHIVE}/{picture}",
        "category": edit.kind,
        "plan": write_plan(edit),
        "scene": as_json(source),
    }


def rounded(scene: Scene) -> Scene:
    """The scene with its numbers as they are written down."""
    things = tuple(
        replace(thing, x=round(thing.x, 1), y=round(thing.y, 1), radius=round(thing.radius, 1))
        for thing in scene.things
    )
    return replace(scene, things=things)


def write_lists(folder: Path, counts: Mapping[str, int] = COUNTS) -> None:
    """Writes train.jsonl, validation.jsonl, heldout.jsonl and sources.zip; no edit is among them twice."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random("edits")
    seen: set[tuple[Scene, str]] = set()
    with zipfile.ZipFile(folder / ARCHIVE, "w") as archive:
        for name, count in counts.items():
            lines: list[str] = []
            while len(lines) < count:
                drawn, edit, _ = draw_edit(rng, "heldout" if name == "heldout" else "train")
                source = rounded(drawn)
                if (source, write_edit(edit)) in seen:
                    continue
                seen.add((source, write_edit(edit)))
                picture = f"{name}_{len(lines):04d}.png"
                archive.writestr(zipfile.ZipInfo(picture, STAMP), as_png(render(source)))
                lines.append(json.dumps(line(source, edit, picture), separators=(",", ":")))
            (folder / f"{name}.jsonl").write_text("".join(f"{text}\n" for text in lines))


if __name__ == "__main__":
    write_lists(Path(sys.argv[1]))
