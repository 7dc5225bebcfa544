"""What any caption claims about a scene of the lab, claim by claim, and which of its facts it leaves out.

The text is searched for phrases of the lab's captions, whatever stands around them: word soup has few claims,
and no text is an error. A phrase is understood as speaking of that thing of the scene which it fits best, so
that a red circle called blue is one wrong color, not an invented thing and a forgotten one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmalign.lab.captions import NUMBERS, PLACES
from mmalign.lab.grammar import region
from mmalign.lab.scenes import COLORS, RELATIONS, SHAPES, SIZES, Scene, Thing
from mmalign.lab.tasks import CLEAR

NEAR = 2.0  # pixels by which a place may be off
FITS = 4  # a phrase speaks of a thing if shape, or color and place, are right: see `fit`

Fact = tuple[
    str, str
]  # (aspect, subject), as ("color", "thing 0"), ("relation", "things 0 1"), ("text", "word")


@dataclass(frozen=True)
class Claim:
    """One thing that a caption says, and whether it is so.

    aspect: object, count, color, size, position, relation or text. said: the claim in a few words. start,
    end: its characters. holds: None where it describes or relates something that is not there, so that
    it is neither true nor another mistake. fact: what of the scene it speaks about, if there is such a thing.
    repeated: the same was said before; such a claim does not hold.
    """

    aspect: str
    said: str
    start: int
    end: int
    holds: bool | None
    fact: Fact | None = None
    repeated: bool = False


@dataclass(frozen=True)
class Reading:
    """The claims of a caption in their order, and the facts that a complete caption of the scene states."""

    claims: tuple[Claim, ...]
    facts: tuple[Fact, ...]

    @property
    def stated(self) -> dict[Fact, bool]:
        """Whether what the caption says of a fact is right, for every fact it says anything about."""
        found: dict[Fact, bool] = {}
        for claim in self.claims:
            if claim.fact is not None and claim.holds is not None and not claim.repeated:
                found[claim.fact] = found.get(claim.fact, True) and claim.holds
        return found

    @property
    def judged(self) -> list[Claim]:
        """The claims that are right or wrong."""
        return [claim for claim in self.claims if claim.holds is not None]

    @property
    def wrong(self) -> list[Claim]:
        return [claim for claim in self.judged if not claim.holds]

    @property
    def omitted(self) -> list[Fact]:
        """Facts about which the caption says nothing; what is said wrongly is not left out as well."""
        stated = self.stated
        return [fact for fact in self.facts if fact not in stated]


@dataclass(frozen=True)
class Said:
    """A word or phrase at its place in the text."""

    aspect: str
    value: str
    start: int
    end: int


@dataclass(frozen=True)
class Phrase:
    """A noun with what is said of it; `noun` is a shape, or the word that is written."""

    noun: Said
    about: tuple[Said, ...]
    start: int
    end: int

    def values(self, aspect: str) -> list[str]:
        return [said.value for said in self.about if said.aspect == aspect]


def _any(words: Sequence[str]) -> str:
    longest_first = sorted(words, key=len, reverse=True)
    return "|".join(word.replace(" ", r"\s+") for word in longest_first)


_ATTRIBUTE = re.compile(rf"\b(?:(?P<color>{_any(list(COLORS))})|(?P<size>{_any(list(SIZES))}))\b", re.I)
_NOUN = rf"(?:\b(?:a|an|one|the)\s+)?(?:\b(?:{_any([*COLORS, *SIZES])})\s+)*\b(?:{_any(SHAPES)})\b"
_PLACE = re.compile(rf"\b(?:{_any(PLACES)})\b", re.I)
_SHAPE = re.compile(rf"\b(?:{_any(SHAPES)})\b", re.I)
_THING = re.compile(rf"{_NOUN}(?:\s+(?:{_any(PLACES)})\b)?", re.I)
_LINK = re.compile(
    rf"(?P<first>{_NOUN})\s+is\s+(?:to\s+the\s+)?(?P<kind>{_any(RELATIONS)})\s+(?P<second>{_NOUN})", re.I
)
_WORD = re.compile(
    rf'\bword\s+"(?P<text>[^"]*)"(?:\s+is\s+written)?(?:\s+in\s+(?P<color>{_any(list(COLORS))})\b)?'
    rf"(?:\s+(?P<place>{_any(PLACES)})\b)?",
    re.I,
)
_COUNT = re.compile(rf"\b(?P<count>{_any(NUMBERS)})\s+things?\b", re.I)


@dataclass(frozen=True)
class Heard:
    """What a caption says, whatever it is about.

    mentions: its things, each once. links: each relation, and the places of its two ends among the mentions.
    words, counts: what it says is written, and how many things it says there are.
    """

    mentions: tuple[Phrase, ...]
    links: tuple[tuple[re.Match[str], tuple[int, int]], ...]
    words: tuple[re.Match[str], ...]
    counts: tuple[re.Match[str], ...]


def hear(caption: str) -> Heard:
    """The phrases of a caption."""
    text = caption
    links = list(_LINK.finditer(text))
    text = _blank(text, links)
    words = list(_WORD.finditer(text))
    text = _blank(text, words)
    counts = list(_COUNT.finditer(text))
    mentions = [_phrase(caption, *found.span()) for found in _THING.finditer(_blank(text, counts))]

    def place(phrase: Phrase) -> int:
        found = _meant(phrase, mentions)
        if found is None:
            mentions.append(phrase)
            return len(mentions) - 1
        return found

    ends = [
        (
            found,
            (place(_phrase(caption, *found.span("first"))), place(_phrase(caption, *found.span("second")))),
        )
        for found in links
    ]
    return Heard(tuple(mentions), tuple(ends), tuple(words), tuple(counts))


def check(caption: str, scene: Scene) -> Reading:
    """Every claim of the caption held against the scene."""
    heard = hear(caption)
    meant = assign(heard.mentions, scene.things)
    claims = [
        *_counted(heard.counts, scene),
        *_spelled(heard.words, scene),
        *_described(heard.mentions, meant, scene),
        *_related(heard.links, meant, scene),
    ]
    return Reading(tuple(sorted(claims, key=lambda claim: (claim.start, claim.end))), tuple(facts(scene)))


def facts(scene: Scene) -> Iterator[Fact]:
    """What a complete caption states; how many things there are follows from naming them."""
    for i in range(len(scene.things)):
        yield from ((aspect, f"thing {i}") for aspect in ("object", "color", "size", "position"))
    for i in range(len(scene.things) - 1):
        yield "relation", f"things {i} {i + 1}"
    if scene.word is not None:
        yield from ((aspect, "word") for aspect in ("text", "color", "position"))


def _blank(text: str, found: Sequence[re.Match[str]]) -> str:
    """The text with what was found replaced by marks that nothing matches; places stay the same."""
    for match in found:
        start, end = match.span()
        text = text[:start] + "\0" * (end - start) + text[end:]
    return text


def _phrase(caption: str, start: int, end: int) -> Phrase:
    """The phrase at these characters: its shape, and what is said of it before and after."""
    *_, shape = _SHAPE.finditer(caption, start, end)
    about = [
        Said(str(found.lastgroup), found[0].lower(), *found.span())
        for found in _ATTRIBUTE.finditer(caption, start, shape.start())
    ]
    about += [
        Said("position", _plain(found[0]), *found.span())
        for found in _PLACE.finditer(caption, shape.end(), end)
    ]
    return Phrase(Said("object", shape[0].lower(), *shape.span()), tuple(about), start, end)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _meant(phrase: Phrase, mentions: Sequence[Phrase]) -> int | None:
    """Which of the earlier mentions a phrase refers back to: the first of its shape and no other color."""
    colors = set(phrase.values("color"))
    for i, mention in enumerate(mentions):
        other = set(mention.values("color"))
        if mention.noun.value == phrase.noun.value and (not colors or not other or colors == other):
            return i
    return None


def fit(phrase: Phrase, thing: Thing) -> int:
    """How well a phrase describes a thing; below `FITS` it does not speak of it."""
    right = [
        said.aspect for said in (phrase.noun, *phrase.about) if said.value in true_of(thing, said.aspect)
    ]
    return sum({"object": 4, "color": 2, "position": 2, "size": 1}[aspect] for aspect in set(right))


def true_of(thing: Thing, aspect: str) -> set[str]:
    """All that can rightly be said of one aspect of a thing."""
    if aspect == "position":
        return places(thing.x, thing.y)
    return {{"object": thing.shape, "color": thing.color, "size": thing.size}[aspect]}


def places(x: float, y: float) -> set[str]:
    """Where something at (x, y) may be said to be, give or take `NEAR` pixels."""
    return {region(x + dx, y + dy) for dx in (-NEAR, 0, NEAR) for dy in (-NEAR, 0, NEAR)}


def assign(mentions: Sequence[Phrase], things: Sequence[Thing]) -> list[int | None]:
    """Which thing each mention speaks of, none twice, so that together they fit best.

    Of mentions that fit equally well the earlier one is taken.
    """
    gain = np.array([[fit(mention, thing) for thing in things] for mention in mentions], dtype=float)
    meant: list[int | None] = [None] * len(mentions)
    if not gain.size:
        return meant
    gain[gain < FITS] = 0
    gain += (gain > 0) * 1e-3 * np.linspace(1, 0, len(mentions))[:, None]
    for row, i in zip(*linear_sum_assignment(gain, maximize=True), strict=True):
        if gain[row, i] > 0:
            meant[row] = int(i)
    return meant


def _described(mentions: Sequence[Phrase], meant: Sequence[int | None], scene: Scene) -> Iterator[Claim]:
    """The claims that a thing is there, and what is said of it."""
    known: set[tuple[str, frozenset[str]]] = set()
    for mention, place in zip(mentions, meant, strict=True):
        kind = mention.noun.value, frozenset(mention.values("color"))
        if place is None:
            yield Claim(
                "object", mention.noun.value, mention.start, mention.end, False, None, repeated=kind in known
            )
            for said in mention.about:
                yield Claim(said.aspect, said.value, said.start, said.end, None)
        else:
            thing, subject = scene.things[place], f"thing {place}"
            for said in (mention.noun, *mention.about):
                holds = said.value in true_of(thing, said.aspect)
                yield Claim(said.aspect, said.value, said.start, said.end, holds, (said.aspect, subject))
        known.add(kind)


def _related(
    links: Sequence[tuple[re.Match[str], tuple[int, int]]], meant: Sequence[int | None], scene: Scene
) -> Iterator[Claim]:
    """The claims of relations; the thing named first stands so to the second."""
    known: set[Fact] = set()
    for found, (first, second) in links:
        kind = _plain(found["kind"])
        one, other = meant[first], meant[second]
        if one is None or other is None:
            yield Claim("relation", kind, *found.span(), None)
            continue
        low, high = sorted((one, other))
        fact = ("relation", f"things {low} {high}")
        holds = holds_between(scene.things[one], kind, scene.things[other])
        yield Claim("relation", kind, *found.span(), holds and fact not in known, fact, fact in known)
        known.add(fact)


def holds_between(first: Thing, kind: str, second: Thing) -> bool:
    """Whether `first` stands so to `second`; diagonally, two relations may hold."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx, dy) if kind in ("left of", "right of") else (dy, dx)
    if kind in ("left of", "above"):
        along = -along
    return along > 0 and along >= CLEAR * abs(across)


def _counted(counts: Sequence[re.Match[str]], scene: Scene) -> Iterator[Claim]:
    for i, found in enumerate(counts):
        right = NUMBERS.index(found["count"].lower()) == len(scene.things)
        yield Claim(
            "count", found["count"].lower(), *found.span(), right and not i, ("count", "scene"), i > 0
        )


def _spelled(words: Sequence[re.Match[str]], scene: Scene) -> Iterator[Claim]:
    """The claims about what is written; without a word in the scene the first of them is invented."""
    for i, found in enumerate(words):
        there = scene.word if i == 0 else None
        said = found["text"].strip().lower()
        right = there is not None and said == there.text
        fact = ("text", "word") if there else None
        yield Claim("text", said, *found.span("text"), right, fact, repeated=i > 0 and scene.word is not None)
        for aspect, group in (("color", "color"), ("position", "place")):
            if found[group] is None:
                continue
            value = _plain(found[group])
            if there is None:
                yield Claim(aspect, value, *found.span(group), None)
            else:
                right = value == there.color if aspect == "color" else value in places(there.x, there.y)
                yield Claim(aspect, value, *found.span(group), right, (aspect, "word"))
