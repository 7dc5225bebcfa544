"""What a picture of the lab shows: things and words on a plain ground, typed, with their relations derived.

Places and lengths are in pixels of a 64 x 64 picture, x to the right and y downward, at any rendered size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

CANVAS = 64
BACKGROUND = (236, 236, 236)

COLORS = {
    "red": (222, 36, 36),
    "green": (34, 164, 60),
    "blue": (40, 66, 226),
    "yellow": (246, 208, 18),
    "purple": (180, 38, 206),
    "cyan": (24, 198, 206),
}

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

# Half the side of the box around a shape, in radii. Shapes of one radius look equally large.
EXTENT = {"circle": 1.0, "square": 0.9, "triangle": 1.2, "star": 1.24, "cross": 1.15, "ring": 1.15}

# Radii a composed thing may have. "medium" is what is drawn when a prompt says nothing, and is never said.
SIZES = {"small": (6.7, 7.4), "medium": (9.0, 9.8), "large": (11.2, 11.8)}
SMALL_BELOW, LARGE_ABOVE = 8.2, 10.5

RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_WORDS = """
    at he no on so to up us
    act ant ape arc cap car cat cup ear eat hat hen hot hut let net nut oat
    pan pen pet pot rat run sea sun tea ten toe top
    cone coat hero lace nose note race rope rose soap
"""
WORDS = tuple(_WORDS.split())
LETTERS = tuple(sorted(set("".join(WORDS))))


@dataclass(frozen=True)
class Thing:
    """One colored shape; `radius` is that of an equally large circle, see `EXTENT` for the other shapes."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def extent(self) -> float:
        """Half the side of the box that holds it, in pixels."""
        return EXTENT[self.shape] * self.radius


@dataclass(frozen=True)
class Word:
    """A lower-case word drawn in capitals around (x, y); `cell` is the pixels per dot of its letters."""

    text: str
    color: str
    x: float
    y: float
    cell: float = 2.4


@dataclass(frozen=True)
class Relation:
    """`first` stands in relation `kind` to `second`; both are positions in the list of things (or groups)."""

    first: int
    kind: str
    second: int


@dataclass(frozen=True)
class Scene:
    """Everything there is to see. The order of things names them: thing 0, thing 1, ..."""

    things: tuple[Thing, ...] = ()
    word: Word | None = None
    background: tuple[int, int, int] = BACKGROUND

    def relations(self) -> Iterator[Relation]:
        """The one relation of every pair of things, stated from the earlier thing."""
        for i, first in enumerate(self.things):
            for j in range(i + 1, len(self.things)):
                yield Relation(i, relation(first, self.things[j]), j)


def relation(first: Thing, second: Thing) -> str:
    """Where `first` stands seen from `second`: the larger offset decides, so exactly one relation holds."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def size_of(radius: float) -> str:
    """The size word for a measured radius in pixels."""
    return "small" if radius < SMALL_BELOW else "large" if radius > LARGE_ABOVE else "medium"
