"""Labelled sample grids: a row a prompt, a column a seed, what a reward said under each picture."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

STILLS = 9  # frames of a video on a sheet, at most
CELL = 192  # pixels of a picture in a grid, about
GAP, LABEL, MARGIN = 8, 200, 16
INK, SOFT, PAPER, RULE = (24, 24, 27), (113, 113, 122), (255, 255, 255), (228, 228, 231)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Panel:
    """One set of pictures for the same prompts: base, trained, iteration 40, ...

    images: [N * seeds, 3, H, W] in [0, 1], or videos [N * seeds, F, 3, H, W], prompt by prompt; panels of one
    grid may have different numbers of seeds. captions: what stands under each, or empty.
    """

    title: str
    images: Tensor
    captions: Sequence[str] = ()


def contact_sheet(video: Tensor) -> Tensor:
    """Frames of a video [F, 3, H, W] side by side, [3, rows * H, columns * W]; of many, nine."""
    length = len(video)
    frames = video[torch.linspace(0, length - 1, min(length, STILLS)).round().long()]
    columns = math.ceil(math.sqrt(len(frames)))
    rows = math.ceil(len(frames) / columns)
    sheet = frames.new_ones(rows * columns, *frames.shape[1:])
    sheet[: len(frames)] = frames
    high, wide = frames.shape[2:]
    return sheet.reshape(rows, columns, 3, high, wide).permute(2, 0, 3, 1, 4).reshape(3, rows * high, -1)


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] to a picture, a video [F, 3, H, W] to a sheet of its frames."""
    if image.ndim == 4:
        image = contact_sheet(image)
    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def from_pil(image: Image.Image) -> Tensor:
    """A picture in RGB to [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def fit(image: Image.Image, size: int = CELL) -> Image.Image:
    """About `size` pixels wide; small pictures grow by a whole factor, so that their pixels stay crisp."""
    if image.width > size:
        return image.resize((size, round(image.height * size / image.width)), Image.Resampling.LANCZOS)
    factor = round(size / image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def font(size: int) -> Font:
    return ImageFont.load_default(size)


def wrap(text: str, width: int, face: Font, lines: int = 8) -> list[str]:
    """`text` in lines no wider than `width` pixels; what does not fit in `lines` ends in an ellipsis."""
    rows: list[str] = []
    for word in text.split():
        joined = f"{rows[-1]} {word}" if rows else word
        if rows and face.getlength(joined) <= width:
            rows[-1] = joined
        else:
            rows.append(word)
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1] + " …"]
    return [clip(row, width, face) for row in rows]


def clip(text: str, width: int, face: Font) -> str:
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def grid(prompts: Sequence[str], panels: Sequence[Panel], title: str = "") -> Image.Image:
    """All panels side by side, with the prompts in front."""
    if not prompts or not panels:
        raise ValueError("a grid needs at least one prompt and one panel")
    if any(not len(panel.images) or len(panel.images) % len(prompts) for panel in panels):
        raise ValueError(
            f"every panel needs as many pictures for each of the {len(prompts)} prompts, "
            f"got {[len(panel.images) for panel in panels]}"
        )
    columns = [len(panel.images) // len(prompts) for panel in panels]
    small, large = font(13), font(16)
    sample = fit(to_pil(panels[-1].images[0]))
    width, height = sample.size
    lines = max((text.count("\n") + 1 for panel in panels for text in panel.captions), default=0)
    caption = 4 + 16 * lines if lines else 0
    row = height + caption + GAP
    wide = [count * (width + GAP) + GAP for count in columns]
    top = MARGIN + (28 if title else 0) + (28 if any(panel.title for panel in panels) else 0)
    sheet = Image.new(
        "RGB",
        (
            MARGIN + LABEL + sum(wide) + (len(wide) - 1) * GAP + MARGIN,
            top + len(prompts) * row + MARGIN,
        ),
        PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((MARGIN, MARGIN), title, INK, large)
    for n, prompt in enumerate(prompts):
        for k, text in enumerate(wrap(prompt, LABEL - 2 * GAP, small, max(1, height // 18))):
            pen.text((MARGIN, top + n * row + 2 + 18 * k), text, INK, small)
    for p, panel in enumerate(panels):
        left = MARGIN + LABEL + sum(wide[:p]) + p * GAP
        if panel.title:
            pen.text((left + GAP, top - 26), panel.title, INK, large)
        if p:
            pen.line([(left - GAP // 2, top - 26), (left - GAP // 2, sheet.height - MARGIN)], RULE, 2)
        for i, image in enumerate(panel.images):
            x = left + GAP + (i % columns[p]) * (width + GAP)
            y = top + (i // columns[p]) * row
            picture = fit(to_pil(image))
            picture.thumbnail((width, height))  # a source beside the sheet of a video is smaller
            sheet.paste(picture, (x, y))
            if panel.captions:
                for k, text in enumerate(panel.captions[i].split("\n")):
                    pen.text((x, y + height + 2 + 16 * k), clip(text, width, small), SOFT, small)
    return sheet


def data_uri(image: Image.Image) -> str:
    """A picture as text that an HTML file can hold."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


GALLERY_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #18181b; margin: 2rem auto; padding: 0 1rem }
body { max-width: 1400px }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 2rem 0 .5rem; font-weight: 600 }
.panels { display: flex; flex-wrap: wrap; gap: 1rem 2rem }
.panel > b { font-weight: 500; color: #71717a; font-size: .85rem }
.row { display: flex; flex-wrap: wrap; gap: 8px }
figure { margin: 0 } img { width: 192px; image-rendering: pixelated; border-radius: 4px; display: block }
figcaption { color: #71717a; font-size: .8rem; max-width: 192px; white-space: pre-line }
"""


def gallery(prompts: Sequence[str], panels: Sequence[Panel], title: str) -> str:
    """The same as a self-contained HTML page: nothing is loaded from elsewhere."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{GALLERY_STYLE}</style><h1>{html.escape(title)}</h1>",
    ]
    for n, prompt in enumerate(prompts):
        parts.append(f"<h2>{html.escape(prompt)}</h2><div class=panels>")
        for panel in panels:
            seeds = len(panel.images) // len(prompts)
            parts.append(f"<div class=panel><b>{html.escape(panel.title)}</b><div class=row>")
            for i in range(n * seeds, (n + 1) * seeds):
                said = html.escape(panel.captions[i]) if panel.captions else f"seed {i - n * seeds}"
                picture = data_uri(to_pil(panel.images[i]))
                parts.append(
                    f'<figure><img src="{picture}" alt="{html.escape(prompt)}">'
                    f"<figcaption>{said}</figcaption></figure>"
                )
            parts.append("</div></div>")
        parts.append("</div>")
    return "".join(parts) + "</html>\n"


def write(
    path: Path, prompts: Sequence[str], panels: Sequence[Panel], title: str, rows_per_page: int = 40
) -> list[Path]:
    """Save a grid as `path` (PNG) and the gallery beside it (HTML); long grids take several PNG files."""
    path = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    page = path.with_suffix(".html")
    page.write_text(gallery(prompts, panels, title), encoding="utf-8")
    written = []
    for first in range(0, len(prompts), rows_per_page):
        part = slice(first, first + rows_per_page)
        target = path if not first else path.with_stem(f"{path.stem}_{first // rows_per_page + 1}")
        grid(prompts[part], [cut(panel, len(prompts), part) for panel in panels], title).save(target)
        written.append(target)
    return [*written, page]


def cut(panel: Panel, prompts: int, part: slice) -> Panel:
    """The rows of a panel that belong to the prompts in `part`."""
    seeds = len(panel.images) // prompts
    rows = slice(part.start * seeds, part.stop * seeds)
    return Panel(panel.title, panel.images[rows], panel.captions[rows])
