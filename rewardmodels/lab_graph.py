"""Captions of the lab as scene graphs, by their words, for `capture`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmalign.lab.grammar import SINGULARS
from mmalign.lab.scenes import COLORS, RELATIONS, SHAPES, SIZES
from mmalign.rewardmodels.caption_graph import CaptionGraph

NOUN = "|".join(sorted({*SHAPES, *SINGULARS}, key=len, reverse=True))
ABOUT = "|".join((*COLORS, *SIZES))
THING = rf"(?:(?:{ABOUT})\s+)*(?:{NOUN})"
LINK = re.compile(rf"({THING})\b[^.,;]*?\b({'|'.join(RELATIONS)})\s+(?:the|an?)\s+({THING})\b", re.IGNORECASE)
WORD = re.compile(rf"\b(?:{NOUN}|{ABOUT})\b", re.IGNORECASE)


def graphs(texts: Sequence[str]) -> list[CaptionGraph]:
    """The graph of each text: shapes are objects, colors and sizes their attributes."""
    return [graph(text) for text in texts]


def graph(text: str) -> CaptionGraph:
    words = [found.lower() for found in WORD.findall(text)]
    return CaptionGraph(
        frozenset(SINGULARS.get(word, word) for word in words if word in SHAPES or word in SINGULARS),
        frozenset(word for word in words if word in COLORS or word in SIZES),
        frozenset((shape_of(a), link.lower(), shape_of(b)) for a, link, b in LINK.findall(text)),
    )


def shape_of(thing: str) -> str:
    last = thing.lower().split()[-1]
    return SINGULARS.get(last, last)
