"""Write references of the lab for `adversarial`: python scripts/make_references.py [STYLE] [COUNT] [SEED]

Pictures of the training split as they should be, drawn by the renderer in a style of the lab, plain if none
is named, in assets/lab/references/STYLE.zip.
"""

from __future__ import annotations

import io
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


if __name__ == "__main__":
    style = sys.argv[1] if len(sys.argv) > 1 else "plain"
    write(FOLDER / f"{style}.zip", style, *map(int, sys.argv[2:]))
