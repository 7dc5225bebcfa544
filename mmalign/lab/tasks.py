"""What a prompt asks for, as constraints that can be checked; scenes that satisfy them.

The categories follow GenEval (Ghosh et al. 2023, arXiv:2310.11513), with words to be written as a seventh.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations as pairs

from mmalign.lab import heldout
from mmalign.lab.font import word_box
from mmalign.lab.scenes import (
    CANVAS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    WORDS,
    Relation,
    Scene,
    Thing,
    Word,
    relation,
)

CATEGORIES = ("single_object", "two_objects", "counting", "colors", "position", "attribute_binding", "text")
# What asks for several things is hard for small models, so training sees it most.
MIX = {
    "single_object": 2,
    "two_objects": 5,
    "counting": 5,
    "colors": 3,
    "position": 5,
    "attribute_binding": 5,
    "text": 3,
}
SAID_SIZES = ("small", "large")
PLACES = ("on the left", "on the right", "at the top", "at the bottom")
MOST_THINGS = 4

BORDER, GAP = 1.0, 3.0  # free pixels between a thing and the edge, and between two things
CLEAR = 0.65  # in a composed relation the smaller offset is at most this share of the larger one
PLACED_WITHIN, COMPOSED_WITHIN = 27.0, 22.0  # pixels from a named edge to the center: to pass, composed


@dataclass(frozen=True)
class Group:
    """`count` things of one kind; None leaves an attribute open."""

    shape: str
    count: int = 1
    color: str | None = None
    size: str | None = None
    place: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("color", self.color, (None, *COLORS)),
            ("size", self.size, (None, *SAID_SIZES)),
            ("place", self.place, (None, *PLACES)),
            ("count", self.count, range(1, MOST_THINGS + 1)),
        ):
            if value not in known:
                raise ValueError(f"Group: {name} {value!r} is not one of {list(known)}")
        if self.place and self.count > 1:
            raise ValueError(f"Group: only a single thing has a place, got {self.count}")

    def admits(self, thing: Thing) -> bool:
        """Whether a thing has the kind asked for: shape, color and size, not its place."""
        return (
            thing.shape == self.shape
            and self.color in (None, thing.color)
            and self.size in (None, thing.size)
        )


@dataclass(frozen=True)
class Spelling:
    """A word to be written."""

    text: str
    color: str | None = None

    def __post_init__(self) -> None:
        if self.text not in WORDS:
            raise ValueError(f"Spelling: {self.text!r} is not a word of the lab, see scenes.WORDS")
        if self.color not in (None, *COLORS):
            raise ValueError(f"Spelling: color {self.color!r} is not one of {list(COLORS)}")


@dataclass(frozen=True)
class Task:
    """Either groups of things, with at most one relation from the first of two to the second, or a word."""

    groups: tuple[Group, ...] = ()
    relations: tuple[Relation, ...] = ()
    word: Spelling | None = None

    def __post_init__(self) -> None:
        if bool(self.groups) == bool(self.word):
            raise ValueError("Task: asks for either things or a word")
        if sum(group.count for group in self.groups) > MOST_THINGS:
            raise ValueError(f"Task: a scene holds at most {MOST_THINGS} things")
        for first, second in pairs(self.groups, 2):
            apart = first.color and second.color and first.color != second.color
            if first.shape == second.shape and not apart:
                raise ValueError(f"Task: one thing could be both {first} and {second}")
        if any(group.place for group in self.groups) and len(self.groups) > 1:
            raise ValueError("Task: only a thing that stands alone has a place")
        for link in self.relations:
            if (link.first, link.second) != (0, 1) or link.kind not in RELATIONS or len(self.relations) > 1:
                raise ValueError(f"Task: {link} is not a relation {RELATIONS} from group 0 to group 1")
            if [group.count for group in self.groups] != [1, 1]:
                raise ValueError("Task: a relation is between two single things")

    @property
    def category(self) -> str:
        """The kind of difficulty, one of `CATEGORIES`; it follows from what is asked."""
        if self.word:
            return "text"
        if self.relations or self.groups[0].place:
            return "position"
        if any(group.count > 1 for group in self.groups):
            return "counting"
        colored = any(group.color for group in self.groups)
        if len(self.groups) == 1:
            return "colors" if colored else "single_object"
        return "attribute_binding" if colored or len(self.groups) > 2 else "two_objects"

    def combinations(self) -> Iterator[heldout.Combination]:
        """The combinations of `heldout` that every picture of this task must show."""
        counts: Counter[str] = Counter()
        for group in self.groups:
            yield group.color, group.shape
            yield group.size, group.shape
            counts[group.shape] += group.count
        yield from ((count, shape) for shape, count in counts.items())
        for link in self.relations:
            yield heldout.canonical(self.groups[link.first].shape, link.kind, self.groups[link.second].shape)
        if self.word:
            yield (self.word.text,)

    @property
    def held_out(self) -> bool:
        """Whether no training scene could show this."""
        return any(found in heldout.HELD_OUT for found in self.combinations())


def sample_task(rng: random.Random, category: str | None = None, split: str = "train") -> Task:
    """A task of one category (None: any, weighted by `MIX`) from the split "train" or "heldout"."""
    if split not in ("train", "heldout"):
        raise ValueError(f"sample_task: split is 'train' or 'heldout', got {split!r}")
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"sample_task: category {category!r} is not one of {CATEGORIES}")
    category = category or rng.choices(list(MIX), list(MIX.values()))[0]
    while True:
        task = _draw(rng, category)
        if task.held_out == (split == "heldout"):
            return task


def _draw(rng: random.Random, category: str) -> Task:
    """A task of the category, from either split."""
    shapes, colors = rng.sample(SHAPES, 3), rng.sample(list(COLORS), 3)

    def size(chance: float) -> str | None:
        return rng.choice(SAID_SIZES) if rng.random() < chance else None

    if category == "text":
        return Task(word=Spelling(rng.choice(WORDS), colors[0] if rng.random() < 0.7 else None))
    if category == "single_object":
        return Task((Group(shapes[0], size=size(0.3)),))
    if category == "colors":
        return Task((Group(shapes[0], color=colors[0], size=size(0.3)),))
    if category == "two_objects":
        return Task((Group(shapes[0], size=size(0.15)), Group(shapes[1], size=size(0.15))))
    if category == "counting":
        count = rng.randint(2, MOST_THINGS)
        counted = Group(shapes[0], count, colors[0] if rng.random() < 0.5 else None, size(0.1))
        if count == MOST_THINGS or rng.random() < 0.8:
            return Task((counted,))
        return Task((counted, Group(shapes[1], color=colors[1] if counted.color else None)))
    # One time in six the things share their shape and only their colors tell them apart.
    if rng.random() < 1 / 6:
        shapes = shapes[:1] * 3
    if category == "attribute_binding":
        kinds = list(zip(shapes, colors, strict=True))[: 3 if rng.random() < 0.3 else 2]
        return Task(tuple(Group(shape, color=color, size=size(0.15)) for shape, color in kinds))
    if rng.random() < 0.2:
        color = colors[0] if rng.random() < 0.6 else None
        return Task((Group(shapes[0], color=color, place=rng.choice(PLACES)),))
    colored = shapes[0] == shapes[1] or rng.random() < 0.6
    groups = tuple(Group(shapes[i], color=colors[i] if colored else None) for i in (0, 1))
    return Task(groups, (Relation(0, rng.choice(RELATIONS), 1),))


def placed(thing: Thing, place: str, within: float = PLACED_WITHIN) -> bool:
    """Whether the thing's center lies no further than `within` pixels from the edge the place names."""
    distance = {
        "on the left": thing.x,
        "on the right": CANVAS - thing.x,
        "at the top": thing.y,
        "at the bottom": CANVAS - thing.y,
    }
    return distance[place] <= within


def compose(task: Task, rng: random.Random) -> Scene:
    """A scene that shows what the task asks for and nothing else; what it leaves open is drawn.

    A scene for a training task shows no held-out combination, not even by accident.
    """
    if task.word:
        return Scene(word=_write(task.word, rng))
    while True:
        scene = Scene(arrange(_dress(task, rng), rng))
        if _satisfied(task, scene) and (task.held_out or not heldout.shows_held_out(scene)):
            return scene


def _write(spelling: Spelling, rng: random.Random) -> Word:
    color = spelling.color or rng.choice(list(COLORS))
    word = Word(spelling.text, color, CANVAS / 2, CANVAS / 2)
    width, height = word_box(word)
    dx, dy = (CANVAS - width) / 2 - BORDER, min((CANVAS - height) / 2 - BORDER, 12)
    return Word(spelling.text, color, CANVAS / 2 + rng.uniform(-dx, dx), CANVAS / 2 + rng.uniform(-dy, dy))


def _dress(task: Task, rng: random.Random) -> list[Thing]:
    """The things of a task with their open colors and sizes drawn, not yet placed."""
    things = []
    crowded = sum(group.count for group in task.groups) > 2
    for group in task.groups:
        alike = rng.choice(list(COLORS)) if rng.random() < 0.5 else None
        for _ in range(group.count):
            color = group.color or alike or rng.choice(list(COLORS))
            size = group.size or rng.choices(list(SIZES), (1, 4, 0 if crowded else 1))[0]
            things.append(Thing(group.shape, color, size, 0.0, 0.0, rng.uniform(*SIZES[size])))
    return things


def arrange(things: Sequence[Thing], rng: random.Random, tries: int = 40) -> tuple[Thing, ...]:
    """The things at places where none touches another; each in its own quarter if that is hard to find."""
    order = list(range(len(things)))
    rng.shuffle(order)
    done: dict[int, Thing] = {}
    for i in order:
        low, high = things[i].extent + BORDER, CANVAS - things[i].extent - BORDER
        for _ in range(tries):
            thing = moved(things[i], rng.uniform(low, high), rng.uniform(low, high))
            if all(apart(thing, other) for other in done.values()):
                done[i] = thing
                break
        else:
            return _quarters(things, rng)
    return tuple(done[i] for i in range(len(things)))


def _quarters(things: Sequence[Thing], rng: random.Random) -> tuple[Thing, ...]:
    corners = rng.sample([(0, 0), (0, 1), (1, 0), (1, 1)], len(things))

    def coordinate(extent: float, far: int) -> float:
        near = rng.uniform(extent + BORDER, max(extent + BORDER, (CANVAS - GAP) / 2 - extent))
        return CANVAS - near if far else near

    return tuple(
        moved(thing, coordinate(thing.extent, right), coordinate(thing.extent, low))
        for thing, (right, low) in zip(things, corners, strict=True)
    )


def moved(thing: Thing, x: float, y: float) -> Thing:
    return Thing(thing.shape, thing.color, thing.size, x, y, thing.radius)


def apart(first: Thing, second: Thing) -> bool:
    """Whether the boxes around two things leave `GAP` pixels free between them."""
    distance = max(abs(first.x - second.x), abs(first.y - second.y))
    return distance >= first.extent + second.extent + GAP


def _satisfied(task: Task, scene: Scene) -> bool:
    """Whether relations and places hold clearly; things stand in the order of the task's groups."""
    for link in task.relations:
        first, second = scene.things[link.first], scene.things[link.second]
        near, far = sorted((abs(first.x - second.x), abs(first.y - second.y)))
        if relation(first, second) != link.kind or near > CLEAR * far:
            return False
    place = task.groups[0].place
    return place is None or placed(scene.things[0], place, COMPOSED_WITHIN)
