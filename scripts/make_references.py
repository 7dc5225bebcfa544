"""Write references of the lab for `adversarial`: python scripts/make_references.py [COUNT] [SEED]

Pictures of the training split as they should be, drawn by the renderer, in assets/lab/references/plain.zip.
"""

from __future__ import annotations

import io
import random
import sys
import zipfile
from pathlib import Path

from PIL import Image

from mmalign.lab import training_pair

FILE = Path(__file__).resolve().parent.parent / "assets" / "lab" / "references" / "plain.zip"


def write(file: Path, count: int = 512, seed: int = 0) -> None:
    """The same bytes for the same arguments."""
    rng = random.Random(seed)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for number in range(count):
            png = io.BytesIO()
            Image.fromarray(training_pair(rng)[0]).save(png, "PNG", optimize=True)
            archive.writestr(zipfile.ZipInfo(f"{number:04d}.png", (2000, 1, 1, 0, 0, 0)), png.getvalue())


if __name__ == "__main__":
    write(FILE, *map(int, sys.argv[1:]))
