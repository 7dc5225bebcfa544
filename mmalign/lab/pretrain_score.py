"""What the verifier says about a pipeline's pictures, category by category."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.lab.grammar import parse
from mmalign.lab.pretrain_flow import sample
from mmalign.lab.tasks import CATEGORIES
from mmalign.lab.verifier import Verdict, score


@dataclass(frozen=True)
class Scores:
    """Verdicts on pictures sampled with these settings; the overall scores are means over pictures."""

    steps: int
    guidance: float
    verdicts: list[Verdict]

    def share(self, category: str | None = None) -> tuple[float, float]:
        """Mean strict and soft score of a category, or of all."""
        chosen = [v for v in self.verdicts if category in (None, v.category)]
        return float(np.mean([v.strict for v in chosen])), float(np.mean([v.soft for v in chosen]))


def score_pipeline(
    pipeline: Any,
    prompts: Sequence[str],
    images: int,
    steps: int,
    guidance: float,
    seed: int = 0,
    sheet: Path | None = None,
) -> Scores:
    """Samples `images` pictures of every prompt and judges them; the first of them go on a sheet if asked."""
    repeated = [prompt for prompt in prompts for _ in range(images)]
    pictures = sample(pipeline, repeated, steps, guidance, seed)
    verdicts = [
        score(np.asarray(picture), parse(prompt)) for picture, prompt in zip(pictures, repeated, strict=True)
    ]
    if sheet:
        write_sheet(pictures, repeated, sheet)
    return Scores(steps, guidance, verdicts)


def write_sheet(
    pictures: Sequence[Any], prompts: Sequence[str], path: Path, columns: int = 8, most: int = 64
) -> None:
    """Pictures with their prompts below them."""
    from PIL import Image, ImageDraw

    count, cell, line = min(len(pictures), most), 128, 24
    page = Image.new("RGB", (columns * cell, -(-count // columns) * (cell + line)), "white")
    draw = ImageDraw.Draw(page)
    for i in range(count):
        x, y = i % columns * cell, i // columns * (cell + line)
        page.paste(pictures[i].resize((cell - 4, cell - 4)), (x + 2, y))
        text = prompts[i]
        draw.text((x + 2, y + cell - 4), text[:22], fill="black")
        draw.text((x + 2, y + cell + 6), text[22:44], fill="black")
    page.save(path)


def table(scores: Sequence[Scores]) -> str:
    """Strict / soft by category as a Markdown table, in percent, a line for each way of sampling."""
    names = [category.replace("_", " ") for category in CATEGORIES]
    lines = ["| steps | guidance | all | " + " | ".join(names) + " |", "|---:" * (len(names) + 3) + "|"]
    for found in scores:
        cells = []
        for category in (None, *CATEGORIES):
            strict, soft = found.share(category)
            cells.append(f"{100 * strict:.0f} / {100 * soft:.0f}")
        lines.append(f"| {found.steps} | {found.guidance:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
