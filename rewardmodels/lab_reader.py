"""A reader of the lab's captions that understands them exactly, and knows nothing else of the picture."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mmalign.lab.caption_check import Heard, Phrase, hear
from mmalign.lab.captions import NUMBERS
from mmalign.lab.scenes import INVERSE
from mmalign.rewardmodels.readers import UNKNOWN, Asked, Told

DOUBT = 0.05  # how likely it is to the reader that a caption is wrong in what it says

_RELATION = re.compile(r"Where is the (\w+) (\w+) seen from the (\w+) (\w+)\?")
_NAMED = re.compile(r"(Where|How large) is the (\w+) (\w+)\?")
_COLOR = re.compile(r"What color is the (\w+)\?")
_SHAPE = re.compile(r"What shape is the (\w+) thing\?")


class LabReader:
    """Answers the questions of `lab.questions` by what a caption says first, and no other questions."""

    def choose(self, asked: Sequence[Asked]) -> list[int | None]:
        """Where the caption does not tell, the choice that says so, or else the first."""
        found: list[int | None] = []
        for one in asked:
            answer = answered(heard(one.caption), one.question)
            if answer not in one.choices:
                answer = UNKNOWN if UNKNOWN in one.choices else one.choices[0]
            found.append(one.choices.index(answer))
        return found

    def likelihood(self, told: Sequence[Told]) -> list[Tensor]:
        """An answer is one token: likely if the caption says so, and all alike if it is silent."""
        found = []
        for one in told:
            if one.answer not in one.choices:
                raise ValueError(
                    "the lab's reader answers questions with choices; for a reference name a language model"
                )
            said = answered(heard(one.caption), one.question)
            even = 1 / len(one.choices)
            other = DOUBT / (len(one.choices) - 1)
            p = even if said not in one.choices else 1 - DOUBT if said == one.answer else other
            found.append(torch.tensor([math.log(p)]))
        return found


@lru_cache(maxsize=4096)
def heard(caption: str) -> Heard:
    """What a caption says, taken apart once for all questions about it."""
    return hear(caption)


def answered(said: Heard, question: str) -> str | None:
    """The answer that a caption gives; None where it gives none."""
    if question == "How many things are there?":
        if said.counts:
            return said.counts[0]["count"].lower()
        return NUMBERS[len(said.mentions)] if 0 < len(said.mentions) < len(NUMBERS) else None
    if question == "Which word is written?":
        return said.words[0]["text"].strip().lower() if said.words else None
    if match := _COLOR.fullmatch(question):
        return _first(said.mentions, "color", shape=match[1])
    if match := _SHAPE.fullmatch(question):
        return next((m.noun.value for m in said.mentions if match[1] in m.values("color")), None)
    if match := _NAMED.fullmatch(question):
        aspect = "position" if match[1] == "Where" else "size"
        return _first(said.mentions, aspect, shape=match[3], color=match[2])
    if match := _RELATION.fullmatch(question):
        return _related(said, (match[2], match[1]), (match[4], match[3]))
    return None


def _related(said: Heard, one: tuple[str, str], other: tuple[str, str]) -> str | None:
    """Where the first (shape, color) stands seen from the second."""
    for found, (first, second) in said.links:
        kind = " ".join(found["kind"].lower().split())
        if _is(said.mentions[first], *one) and _is(said.mentions[second], *other):
            return kind
        if _is(said.mentions[second], *one) and _is(said.mentions[first], *other):
            return INVERSE[kind]
    return None


def _is(mention: Phrase, shape: str, color: str | None = None) -> bool:
    """Whether a mention may be of such a thing; what it does not say does not speak against it."""
    colors = mention.values("color")
    return mention.noun.value == shape and (color is None or not colors or color in colors)


def _first(mentions: Sequence[Phrase], aspect: str, shape: str, color: str | None = None) -> str | None:
    """What is said first of one aspect of such a thing."""
    values = (value for mention in mentions if _is(mention, shape, color) for value in mention.values(aspect))
    return next(values, None)
