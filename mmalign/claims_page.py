"""The page of a captioner's run: each picture with what was said of it, its claims underlined by verdict.

A right claim is underlined in green, a wrong one in red, one that nobody could judge in gray; what was left
out is listed below. Before and after training stand side by side.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from mmalign.claims import OMISSIONS, find
from mmalign.grids import data_uri
from mmalign.pictures import open_picture
from mmalign.tracking import write_whole

PAGE = "claims.html"
SIDE = 224  # pixels along the longer side of a picture on the page
Mark = Literal["right", "wrong", "open", "omitted"]
LEGEND = {"right": "right", "wrong": "wrong", "open": "not judged", "omitted": "left out"}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #18181b; max-width: 1180px; margin: 2rem auto }
article { display: grid; grid-template-columns: 240px 1fr 1fr; gap: 1.2rem; padding: 1rem 0 }
article { border-top: 1px solid #e4e4e7 }
img { width: 224px; image-rendering: pixelated; border-radius: 4px }
.soft { color: #71717a; font-size: 13px } h2 { font-size: 13px; color: #71717a; margin: 0 }
u { text-decoration-thickness: 3px; text-underline-offset: 3px; text-decoration-skip-ink: none }
.right { text-decoration-color: #16a34a } .wrong { text-decoration-color: #dc2626; background: #fef2f2 }
.open { text-decoration-color: #a1a1aa; text-decoration-style: dotted }
.omitted { color: #b45309; text-decoration: none }
""".strip()


@dataclass(frozen=True)
class Marked:
    """A claim of a caption. span: its characters [start, end), or None; note: what is said of it."""

    mark: Mark
    span: tuple[int, int] | None
    note: str = ""

    def __post_init__(self) -> None:
        if self.mark not in get_args(Mark):
            raise ValueError(f"a claim is one of {', '.join(get_args(Mark))}, got {self.mark!r}")


@dataclass(frozen=True)
class Told:
    """A caption as the page shows it. image: path of the picture; values: what the rewards said."""

    caption: str
    image: str | None
    reference: str
    claims: tuple[Marked, ...]
    values: Mapping[str, float]


def marks(claims: Iterable[Mapping[str, Any]], caption: str) -> tuple[Marked, ...]:
    """The claims in the details of rewards: checked facts (`holds`), or differences that a judge found.

    Where every claim was checked, differences only tell what was left out.
    """
    told = list(claims)
    checked = any("holds" in claim for claim in told)
    found = [(claim, _mark(claim, caption)) for claim in told]
    return tuple(mark for claim, mark in found if not checked or "holds" in claim or mark.mark == "omitted")


def _mark(claim: Mapping[str, Any], caption: str) -> Marked:
    span = claim.get("span") or (find(str(claim.get("said", "")), caption) if claim.get("said") else None)
    place = (int(span[0]), int(span[1])) if span else None
    aspect = str(claim.get("aspect", ""))
    if "holds" in claim:
        return Marked("right" if claim["holds"] else "wrong", place, aspect)
    error, reference = claim.get("error"), str(claim.get("reference") or "")
    if error is None:
        return Marked("right" if claim.get("judgment") in ("A", "both_supported") else "open", place, aspect)
    note = f"{error}, severity {claim.get('severity')}"
    note += f"; the reference: {reference}" if reference else ""
    omitted = any(word in str(error).lower() for word in OMISSIONS)
    return Marked("omitted" if omitted else "wrong", None if omitted else place, note)


def save(told: Sequence[Told], path: Path) -> None:
    """Write captions to be shown later."""
    write_whole(path, json.dumps([asdict(one) for one in told]))


def load(path: Path) -> list[Told]:
    """What `save` wrote."""
    return [
        Told(
            row["caption"],
            row["image"],
            row["reference"],
            tuple(
                Marked(one["mark"], tuple(one["span"]) if one["span"] else None, one["note"])
                for one in row["claims"]
            ),
            row["values"],
        )
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def page(title: str, columns: Mapping[str, Sequence[Told]]) -> str:
    """The page, complete in one file; columns: name -> captions of the same pictures, in the same order."""
    legend = " ".join(
        f"<u class={mark}>{text}</u>" if mark != "omitted" else f"<span class={mark}>{text}</span>"
        for mark, text in LEGEND.items()
    )
    rows = zip(*columns.values(), strict=True)
    body = "".join(_row(list(columns), row) for row in rows)
    name = html.escape(title)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
        f"<h1>{name}</h1><p>{legend}</p>{body}</html>\n"
    )


def _row(names: Sequence[str], row: Sequence[Told]) -> str:
    first = row[0]
    shown = f'<img src="{_picture(first.image)}" alt="">' if first.image else ""
    reference = f"<p class=soft>Reference: {html.escape(first.reference)}</p>" if first.reference else ""
    cells = "".join(
        f"<div><h2>{html.escape(name)}</h2><p>{underlined(one.caption, one.claims)}</p>{_below(one)}</div>"
        for name, one in zip(names, row, strict=True)
    )
    return f"<article><div>{shown}{reference}</div>{cells}</article>"


def _below(one: Told) -> str:
    lost = [html.escape(claim.note) for claim in one.claims if claim.mark == "omitted"]
    left = f"<p class='soft omitted'>Left out: {'; '.join(lost)}</p>" if lost else ""
    said = ", ".join(f"{html.escape(name)} {value:.2f}" for name, value in one.values.items())
    return f"{left}<p class=soft>{said}</p>"


def underlined(caption: str, claims: Sequence[Marked]) -> str:
    """The caption as HTML, its claims underlined; where they overlap, the worse verdict counts."""
    worth = {"wrong": 3, "open": 1, "right": 2, "omitted": 0}
    owner: list[Marked | None] = [None] * len(caption)
    for claim in claims:
        for at in range(*(claim.span or (0, 0))):
            if at < len(owner) and ((now := owner[at]) is None or worth[now.mark] < worth[claim.mark]):
                owner[at] = claim
    out: list[str] = []
    start = 0
    for at in range(1, len(caption) + 1):
        if at == len(caption) or owner[at] is not owner[start]:
            out.append(_underline(caption[start:at], owner[start]))
            start = at
    return "".join(out)


def _underline(text: str, claim: Marked | None) -> str:
    shown = html.escape(text)
    return f'<u class={claim.mark} title="{html.escape(claim.note)}">{shown}</u>' if claim else shown


def _picture(file: str) -> str:
    image = open_picture(file).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return data_uri(image)
