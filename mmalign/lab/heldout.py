"""Combinations that training never shows, so that a held-out prompt asks for something new of known parts.

About a sixth of each table is held out. Every part (color, shape, count, size, relation, letter) remains in
training in other combinations. The rule speaks about what a picture shows, not only about what a prompt
says: a training scene contains none of these, stated or not. Relations are written with "left of" and "above"
alone, as their inverses are the same facts.
"""

from collections import Counter
from collections.abc import Hashable, Iterator

from mmalign.lab.scenes import INVERSE, Scene

COLOR_SHAPE = frozenset(
    {
        ("red", "square"),
        ("green", "triangle"),
        ("blue", "ring"),
        ("yellow", "cross"),
        ("purple", "circle"),
        ("cyan", "star"),
    }
)
COUNT_SHAPE = frozenset({(2, "triangle"), (3, "ring"), (4, "square")})
SIZE_SHAPE = frozenset({("small", "square"), ("large", "star"), ("large", "ring")})
SHAPE_RELATION_SHAPE = frozenset(
    {
        ("circle", "left of", "square"),
        ("triangle", "left of", "circle"),
        ("star", "left of", "square"),
        ("cross", "left of", "star"),
        ("ring", "left of", "cross"),
        ("circle", "above", "star"),
        ("cross", "above", "circle"),
        ("square", "above", "triangle"),
        ("ring", "above", "square"),
        ("triangle", "above", "ring"),
    }
)
WORD = frozenset({("no",), ("hat",), ("pen",), ("sun",), ("tea",), ("coat",), ("nose",), ("rope",)})

Combination = tuple[Hashable, ...]
HELD_OUT: frozenset[Combination] = frozenset().union(
    COLOR_SHAPE, COUNT_SHAPE, SIZE_SHAPE, SHAPE_RELATION_SHAPE, WORD
)


def canonical(first: str, kind: str, second: str) -> tuple[str, str, str]:
    """The same fact said with "left of" or "above"."""
    return (first, kind, second) if kind in ("left of", "above") else (second, INVERSE[kind], first)


def combinations(scene: Scene) -> Iterator[Combination]:
    """Every combination a scene shows, of the kinds the tables above list."""
    for thing in scene.things:
        yield thing.color, thing.shape
        yield thing.size, thing.shape
    for shape, count in Counter(thing.shape for thing in scene.things).items():
        yield count, shape
    for pair in scene.relations():
        yield canonical(scene.things[pair.first].shape, pair.kind, scene.things[pair.second].shape)
    if scene.word is not None:
        yield (scene.word.text,)


def shows_held_out(scene: Scene) -> bool:
    """Whether the scene belongs to the held-out split."""
    return any(found in HELD_OUT for found in combinations(scene))
