"""Dense captions of the lab's scenes: what they say as a record, the record as sentences, and mistakes in it.

A caption names the things with size, color and place, how many there are, where neighbors stand to each
other, and the word that is written.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from zlib import crc32

from mmalign.lab.font import word_box
from mmalign.lab.grammar import listed, region
from mmalign.lab.scenes import CANVAS, COLORS, INVERSE, SHAPES, SIZES, WORDS, Scene, Thing, Word
from mmalign.lab.scenes import relation as stands
from mmalign.lab.tasks import BORDER, GAP, apart

INSTRUCTION = "Describe the picture."
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
MOST_THINGS = 4
TRIES = 20  # places that are tried for a thing before all are drawn anew
CELL = 1.6  # pixels a dot of the letters, so that a word leaves room for things
CENTERS = [CANVAS * (2 * i + 1) / 6 for i in range(3)]
PLACES = tuple(region(x, y) for y in CENTERS for x in CENTERS)

LOOKALIKES = {
    "circle": "ring",
    "ring": "circle",
    "square": "cross",
    "triangle": "star",
    "star": "cross",
    "cross": "star",
}


@dataclass(frozen=True)
class Mention:
    """One thing as a caption speaks of it; None is not said."""

    shape: str
    color: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Lettering:
    """The written word as a caption speaks of it."""

    text: str
    color: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Link:
    """`first` stands in relation `kind` to `second`, each a (color, shape); the color may go unsaid."""

    first: tuple[str | None, str]
    kind: str
    second: tuple[str | None, str]


@dataclass(frozen=True)
class Description:
    """All that a caption says."""

    things: tuple[Mention, ...]
    count: int | None = None
    links: tuple[Link, ...] = ()
    word: Lettering | None = None


def draw_scene(rng: random.Random, split: str = "train") -> Scene:
    """One to four things, no two of one color and shape, in reading order, and one time in three a word.

    split: "train" or "heldout". What is held out is a combination of everything a caption can say.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"draw_scene: split is 'train' or 'heldout', got {split!r}")
    while True:
        scene = _draw(rng)
        if is_held_out(scene) == (split == "heldout"):
            return scene


def is_held_out(scene: Scene) -> bool:
    """Whether the scene is for evaluation alone: one in eight, by what a complete caption says of it."""
    return crc32(write(describe(scene)).encode()) % 8 == 0


def _draw(rng: random.Random) -> Scene:
    lettered = rng.random() < 1 / 3
    count = rng.choices(range(1, MOST_THINGS + 1), (2, 4, 4, 0 if lettered else 3))[0]
    word = _lettering(rng) if lettered else None
    while True:
        kinds = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], count)
        sizes = rng.choices(list(SIZES), (2, 3, 2 if count < 3 else 1), k=count)
        things: list[Thing] = []
        for (color, shape), size in zip(kinds, sizes, strict=True):
            drawn = (_placed(color, shape, size, rng) for _ in range(TRIES))
            things += next(([thing] for thing in drawn if _free(thing, things, word)), [])
        if len(things) == count:
            return Scene(tuple(sorted(things, key=lambda thing: (int(3 * thing.y / CANVAS), thing.x))), word)


def _lettering(rng: random.Random) -> Word:
    text, color = rng.choice(WORDS), rng.choice(list(COLORS))
    width, height = word_box(Word(text, color, 0, 0, CELL))
    x = rng.uniform(width / 2 + BORDER, CANVAS - width / 2 - BORDER)
    y = rng.uniform(height / 2 + BORDER, CANVAS - height / 2 - BORDER)
    return Word(text, color, round(x, 1), round(y, 1), CELL)


def _placed(color: str, shape: str, size: str, rng: random.Random) -> Thing:
    radius = round(rng.uniform(*SIZES[size]), 1)
    low = Thing(shape, color, size, 0, 0, radius).extent + BORDER
    x, y = (round(rng.uniform(low, CANVAS - low), 1) for _ in range(2))
    return Thing(shape, color, size, x, y, radius)


def _free(thing: Thing, things: Sequence[Thing], word: Word | None) -> bool:
    """Whether a thing touches none of the others, nor the word."""
    if not all(apart(thing, other) for other in things):
        return False
    if word is None:
        return True
    width, height = word_box(word)
    across = abs(thing.x - word.x) >= thing.extent + width / 2 + GAP
    return across or abs(thing.y - word.y) >= thing.extent + height / 2 + GAP


def describe(scene: Scene) -> Description:
    """Everything a caption can say of a scene, all of it true; relations of neighbors in reading order."""
    things = scene.things
    return Description(
        tuple(Mention(t.shape, t.color, t.size, region(t.x, t.y)) for t in things),
        len(things),
        tuple(
            Link((first.color, first.shape), stands(first, second), (second.color, second.shape))
            for first, second in pairwise(things)
        ),
        Lettering(scene.word.text, scene.word.color, region(scene.word.x, scene.word.y))
        if scene.word
        else None,
    )


def write(description: Description) -> str:
    """The caption, one paragraph of sentences."""
    sentences = []
    if description.things:
        phrases = [
            " ".join(filter(None, ("a", thing.size, thing.color, thing.shape, thing.place)))
            for thing in description.things
        ]
        start = "There is " if description.count in (None, 1) else "There are "
        if description.count is not None:
            start += f"{NUMBERS[description.count]} thing{'' if description.count == 1 else 's'}: "
        sentences.append(start + listed(phrases))
    for link in description.links:
        first, second = (" ".join(filter(None, named)) for named in (link.first, link.second))
        sentences.append(f"The {first} is {link.kind} the {second}")
    if word := description.word:
        tint = f"in {word.color}" if word.color else None
        sentences.append(" ".join(filter(None, (f'The word "{word.text}" is written', tint, word.place))))
    return "".join(f"{sentence}. " for sentence in sentences).strip()


@dataclass(frozen=True)
class Mistakes:
    """Chances of what goes wrong in a caption: of each thing, attribute, relation or word it could name."""

    omit_thing: float = 0.0
    omit_color: float = 0.0
    omit_size: float = 0.0
    omit_place: float = 0.0
    omit_count: float = 0.0
    omit_relation: float = 0.0
    omit_word: float = 0.0
    wrong_shape: float = 0.0
    wrong_color: float = 0.0
    wrong_size: float = 0.0
    wrong_place: float = 0.0
    wrong_count: float = 0.0
    wrong_relation: float = 0.0
    wrong_word: float = 0.0
    invent_thing: float = 0.0  # of each caption

    def __post_init__(self) -> None:
        for name, chance in vars(self).items():
            if not 0 <= chance <= 1:
                raise ValueError(f"Mistakes: {name} is a chance in 0..1, got {chance}")


# What a captioner learns from: about a tenth of what is said is wrong, about a third goes unsaid.
CARELESS = Mistakes(
    omit_thing=0.12,
    omit_color=0.08,
    omit_size=0.35,
    omit_place=0.25,
    omit_count=0.3,
    omit_relation=0.4,
    omit_word=0.2,
    wrong_shape=0.06,
    wrong_color=0.07,
    wrong_size=0.12,
    wrong_place=0.1,
    wrong_count=0.1,
    wrong_relation=0.15,
    wrong_word=0.1,
    invent_thing=0.15,
)
# What a reference is like: nearly always right, and not complete.
CAREFUL = Mistakes(
    omit_thing=0.04,
    omit_color=0.04,
    omit_size=0.2,
    omit_place=0.12,
    omit_count=0.2,
    omit_relation=0.3,
    omit_word=0.08,
    wrong_color=0.01,
    wrong_size=0.02,
    wrong_place=0.02,
)


def spoil(truth: Description, mistakes: Mistakes, rng: random.Random) -> Description:
    """What a captioner that makes these mistakes says of what `truth` describes; at least one thing is named.

    A thing that is called by a wrong color or shape is called so in relations too.
    """

    def happens(chance: float) -> bool:
        return rng.random() < chance

    kept = [i for i in range(len(truth.things)) if not happens(mistakes.omit_thing)]
    kept = kept or [rng.randrange(len(truth.things))]
    said = {i: _misseen(truth.things[i], mistakes, rng) for i in kept}
    called = {
        (thing.color, thing.shape): (said[i].color, said[i].shape)
        for i, thing in enumerate(truth.things)
        if i in said
    }
    links = []
    for link in truth.links:
        if link.first in called and link.second in called and not happens(mistakes.omit_relation):
            kind = INVERSE[link.kind] if happens(mistakes.wrong_relation) else link.kind
            links.append(Link(called[link.first], kind, called[link.second]))
    mentions = [_silent(mention, mistakes, rng) for mention in said.values()]
    if happens(mistakes.invent_thing):
        invented = Mention(*(rng.choice(list(known)) for known in (SHAPES, COLORS, SIZES, PLACES)))
        mentions.insert(rng.randint(0, len(mentions)), _silent(invented, mistakes, rng))
    count = None if happens(mistakes.omit_count) else truth.count
    if count is not None and happens(mistakes.wrong_count):
        count = max(1, count + rng.choice((-1, 1)))
    word = None
    if truth.word is not None and not happens(mistakes.omit_word):
        text = rng.choice(_alike(truth.word.text)) if happens(mistakes.wrong_word) else truth.word.text
        seen = _misseen(Mention("ring", truth.word.color, None, truth.word.place), mistakes, rng)
        seen = _silent(seen, mistakes, rng)
        word = Lettering(text, seen.color, seen.place)
    return Description(tuple(mentions), count, tuple(links), word)


def _misseen(mention: Mention, mistakes: Mistakes, rng: random.Random) -> Mention:
    """The mention with some of what it says replaced by something else that is likely to be taken for it."""

    def other(value: str | None, known: Sequence[str], chance: float) -> str | None:
        if value is None or rng.random() >= chance:
            return value
        return rng.choice([name for name in known if name != value])

    shape = LOOKALIKES[mention.shape] if rng.random() < mistakes.wrong_shape else mention.shape
    return Mention(
        shape,
        other(mention.color, list(COLORS), mistakes.wrong_color),
        other(mention.size, list(SIZES), mistakes.wrong_size),
        other(mention.place, PLACES, mistakes.wrong_place),
    )


def _silent(mention: Mention, mistakes: Mistakes, rng: random.Random) -> Mention:
    """The mention with some of what it says left out."""

    def said(value: str | None, chance: float) -> str | None:
        return None if rng.random() < chance else value

    return Mention(
        mention.shape,
        said(mention.color, mistakes.omit_color),
        said(mention.size, mistakes.omit_size),
        said(mention.place, mistakes.omit_place),
    )


def _alike(text: str) -> list[str]:
    """The other words of the lab that share most letters with one, place by place."""

    def shared(word: str) -> int:
        return sum(a == b for a, b in zip(word, text, strict=False)) - abs(len(word) - len(text))

    others = [word for word in WORDS if word != text]
    best = max(shared(word) for word in others)
    return [word for word in others if shared(word) == best]


def as_json(scene: Scene) -> dict[str, Any]:
    """A scene as plain numbers and strings; `from_json` is the inverse, for scenes on the plain ground."""
    found: dict[str, Any] = {"things": [vars(thing) for thing in scene.things]}
    if scene.word is not None:
        found["word"] = vars(scene.word)
    return found


def from_json(found: Mapping[str, Any]) -> Scene:
    """The scene that `as_json` wrote down; a ValueError says what is wrong with it."""
    try:
        things = tuple(Thing(**thing) for thing in found["things"])
        word = Word(**found["word"]) if found.get("word") else None
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"scene: expected things and perhaps a word, as `as_json` writes ({error})"
        ) from error
    for thing in things:
        if thing.shape not in SHAPES or thing.color not in COLORS or thing.size not in SIZES:
            raise ValueError(f"scene: the lab knows no {thing.size} {thing.color} {thing.shape}")
    return Scene(things, word)
