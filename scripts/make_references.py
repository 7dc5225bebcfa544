"""Write references for `adversarial` into assets/lab/references.

    python scripts/make_references.py [STYLE] [COUNT] [SEED]
    python scripts/make_references.py emoji [COUNT] [FOLDER]

Pictures of the training split as they should be, drawn by the renderer in a style of the lab, plain if none
is named; or emoji of the training split, evenly over their codes, from what scripts/fetch_assets.py brought
(data/emoji/64).
"""

from __future__ import annotations

import io
import json
import random
import sys
import zipfile
from pathlib import Path

from PIL import Image

from mmalign.lab import compose, render, sample_task

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "lab" / "references"


def write(file: Path, style: str = "plain", count: int = 512, seed: int = 0) -> None:
    """The same bytes for the same arguments."""
    rng = random.Random(seed)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for number in range(count):
            png = io.BytesIO()
            picture = render(compose(sample_task(rng), rng), style=style)
            Image.fromarray(picture).save(png, "PNG", optimize=True)
            archive.writestr(zipfile.ZipInfo(f"{number:04d}.png", (2000, 1, 1, 0, 0, 0)), png.getvalue())


LICENCE = """Fluent Emoji, copyright (c) Microsoft Corporation, MIT License
(https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE); by the npm package @lobehub/fluent-emoji-3d.
"""


def write_emoji(file: Path, count: int, source: Path) -> None:
    """`count` pictures of the training split of a folder with metadata.jsonl; the same bytes each time."""
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    names = sorted(row["file_name"] for row in rows if row["split"] == "train")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in [names[place * len(names) // count] for place in range(count)]:
            archive.writestr(zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0)), (source / name).read_bytes())
        archive.writestr(zipfile.ZipInfo("LICENCE.txt", (2000, 1, 1, 0, 0, 0)), LICENCE)


if __name__ == "__main__":
    style = sys.argv[1] if len(sys.argv) > 1 else "plain"
    if style == "emoji":
        count = int(sys.argv[2]) if len(sys.argv) > 2 else 192
        write_emoji(FOLDER / "emoji.zip", count, Path(sys.argv[3] if len(sys.argv) > 3 else "data/emoji/64"))
    else:
        write(FOLDER / f"{style}.zip", style, *map(int, sys.argv[2:]))
