"""Preference pairs on disk."""

import json
from pathlib import Path

from PIL import Image


def write(folder: Path) -> Path:
    """Three pairs of a bright picture, which is preferred, and a dark one, as a prompt file."""
    rows = []
    for i in range(3):
        row = {"prompt": f"a red cat {i}"}
        for side, level in (("chosen", 200), ("rejected", 40)):
            row[side] = f"{side}_{i}.png"
            Image.new("RGB", (40, 32), (level, level, 10 * i)).save(folder / row[side])
        rows.append(row)
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file
