"""Questions about the lab's scenes, with choices: what a captioner must still answer, or a caption tell."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mmalign.lab.captions import NUMBERS, PLACES
from mmalign.lab.grammar import region
from mmalign.lab.scenes import COLORS, RELATIONS, SHAPES, SIZES, WORDS, Scene, relation
from mmalign.lab.tasks import CLEAR

CHOICES = 4
NEAR = 2.0  # pixels from the border of a region within which it is not asked where a thing is


@dataclass(frozen=True)
class Question:
    """`answers` are the right ones of `choices`, in their order; kind is what one must see to answer."""

    kind: str
    question: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]


def ask(question: str, choices: Sequence[str]) -> str:
    """The question as a captioner is asked it: with its choices, of which it is to repeat the right ones."""
    return f"{question} {', '.join(choices[:-1])} or {choices[-1]}?"


def single_choice(scene: Scene, rng: random.Random) -> list[Question]:
    """Every question with one right choice that a scene answers beyond doubt, in random order."""
    found = list(_about_things(scene, rng))
    found.append(
        _question("count", "How many things are there?", [NUMBERS[len(scene.things)]], NUMBERS[1:6], rng)
    )
    if scene.word is not None:
        found.append(_question("text", "Which word is written?", [scene.word.text], WORDS, rng))
    rng.shuffle(found)
    return found


def multiple_choice(scene: Scene, rng: random.Random) -> list[Question]:
    """The questions with as many right choices as the scene shows colors, or shapes; one choice is wrong."""
    colors = list(dict.fromkeys(thing.color for thing in scene.things))
    shapes = list(dict.fromkeys(thing.shape for thing in scene.things))
    return [
        _question("color", "Which colors do the things have?", colors, list(COLORS), rng),
        _question("object", "Which shapes are there?", shapes, SHAPES, rng),
    ]


def _about_things(scene: Scene, rng: random.Random) -> Iterator[Question]:
    things = scene.things
    shapes, colors = Counter(t.shape for t in things), Counter(t.color for t in things)
    for thing in things:
        name = f"{thing.color} {thing.shape}"
        if shapes[thing.shape] == 1:
            yield _question("color", f"What color is the {thing.shape}?", [thing.color], list(COLORS), rng)
        if colors[thing.color] == 1:
            yield _question("object", f"What shape is the {thing.color} thing?", [thing.shape], SHAPES, rng)
        yield _question("size", f"How large is the {name}?", [thing.size], list(SIZES), rng)
        around = {region(thing.x + dx, thing.y + dy) for dx in (-NEAR, NEAR) for dy in (-NEAR, NEAR)}
        if len(around) == 1:
            yield _question("position", f"Where is the {name}?", list(around), PLACES, rng)
    for first, second in pairwise(things):
        near, far = sorted((abs(first.x - second.x), abs(first.y - second.y)))
        if near <= CLEAR * far:
            text = f"Where is the {first.color} {first.shape} seen from the {second.color} {second.shape}?"
            yield _question("relation", text, [relation(first, second)], RELATIONS, rng)


def _question(kind: str, text: str, right: list[str], known: Sequence[str], rng: random.Random) -> Question:
    """A question with at least one wrong choice, drawn from what else is known."""
    wrong = [name for name in known if name not in right]
    choices = right + rng.sample(wrong, min(len(wrong), max(1, CHOICES - len(right))))
    rng.shuffle(choices)
    return Question(kind, text, tuple(choices), tuple(name for name in choices if name in right))
