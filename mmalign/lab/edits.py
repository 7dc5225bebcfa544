"""Edits of the lab's pictures: a scene, an instruction in words, and the scene that it asks for.

An instruction names the things it speaks of by what tells them apart, and changes one thing, or the places of
two; everything else has to stay as it is. What it leaves open (where a new thing stands) is drawn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmalign.lab import heldout
from mmalign.lab.scenes import CANVAS, COLORS, RELATIONS, SHAPES, SIZES, Scene, Thing, relation
from mmalign.lab.tasks import (
    BORDER,
    CLEAR,
    COMPOSED_WITHIN,
    MOST_THINGS,
    PLACES,
    SAID_SIZES,
    apart,
    arrange,
    moved,
    placed,
)

# What is drawn for training and for prompts, by how often.
MIX = {"recolor": 3, "reshape": 3, "resize": 2, "move": 3, "remove": 2, "add": 4, "swap": 2}
KINDS = tuple(MIX)

# What one has to understand to carry out an edit of each kind, as Meta-CoT (arXiv:2604.24625) has it.
ABILITY = {
    "recolor": "color",
    "reshape": "shape",
    "resize": "size",
    "move": "position",
    "remove": "identity",
    "add": "composition",
    "swap": "relation",
}

TRIES = 40  # places that are tried for a thing before another edit is drawn


@dataclass(frozen=True)
class Referent:
    """A thing by what tells it apart: its shape, and its color where that is said."""

    shape: str
    color: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.color, self.shape)))

    def means(self, thing: Thing) -> bool:
        return thing.shape == self.shape and self.color in (None, thing.color)


@dataclass(frozen=True)
class Edit:
    """One change. `value` is the color, shape, size or place that the subject gets.

    A thing that moves or is new may stand in a `relation` to an `anchor` instead; two are swapped with one
    another. The subject of "add" is not there yet: its shape and color are what it shall be.
    """

    kind: str
    subject: Referent
    value: str | None = None
    relation: str | None = None
    anchor: Referent | None = None

    def __post_init__(self) -> None:
        known: dict[str, Sequence[str]] = {
            "recolor": tuple(COLORS),
            "reshape": SHAPES,
            "resize": SAID_SIZES,
            "move": PLACES,
        }
        if self.kind not in KINDS:
            raise ValueError(f"Edit: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        related = self.relation is not None
        if self.value is not None and self.value not in known.get(self.kind, ()):
            raise ValueError(f"Edit: {self.value!r} is nothing that a thing can get by {self.kind!r}")
        if self.kind in known and (self.value is None) != (related and self.kind == "move"):
            raise ValueError(f"Edit: {self.kind!r} needs one of {', '.join(known[self.kind])}")
        if related and (self.relation not in RELATIONS or self.kind not in ("move", "add")):
            raise ValueError(f"Edit: {self.kind!r} does not go with the relation {self.relation!r}")
        if (self.anchor is not None) != (related or self.kind == "swap"):
            raise ValueError(f"Edit: {self.kind!r} names a second thing with a relation, or to swap them")
        if self.kind == "add" and self.subject.color is None:
            raise ValueError("Edit: a new thing needs a color")


# ---- language

THE = rf"the (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
BESIDE = rf"({'|'.join(RELATIONS)}) {THE}"
SENTENCES = {
    "make": re.compile(rf"make {THE} ({'|'.join((*COLORS, *SAID_SIZES))})"),
    "turn": re.compile(rf"turn {THE} into a ({'|'.join(SHAPES)})"),
    "put": re.compile(rf"put {THE} (?:({'|'.join(PLACES)})|{BESIDE})"),
    "remove": re.compile(rf"remove {THE}"),
    "add": re.compile(rf"add a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?: {BESIDE})?"),
    "swap": re.compile(rf"swap {THE} and {THE}"),
}


def write_edit(edit: Edit) -> str:
    """The instruction: a short lower-case sentence."""
    beside = f"{edit.relation} the {edit.anchor}" if edit.relation else edit.value
    match edit.kind:
        case "recolor" | "resize":
            return f"make the {edit.subject} {edit.value}"
        case "reshape":
            return f"turn the {edit.subject} into a {edit.value}"
        case "move":
            return f"put the {edit.subject} {beside}"
        case "add":
            return " ".join(filter(None, (f"add a {edit.subject}", beside)))
        case "swap":
            return f"swap the {edit.subject} and the {edit.anchor}"
        case _:
            return f"remove the {edit.subject}"


def parse_edit(instruction: str) -> Edit:
    """The edit that an instruction asks for, the inverse of `write_edit`; else a ValueError."""
    verb = instruction.partition(" ")[0]
    found = SENTENCES[verb].fullmatch(instruction) if verb in SENTENCES else None
    if found is None:
        raise ValueError(f"parse_edit: {instruction!r} is not an instruction of the lab")
    color, shape, *rest = found.groups()
    subject = Referent(shape, color)
    match verb:
        case "make":
            return Edit("recolor" if rest[0] in COLORS else "resize", subject, rest[0])
        case "turn":
            return Edit("reshape", subject, rest[0])
        case "put":
            place, link, *other = rest
            return Edit("move", subject, place, link, Referent(other[1], other[0]) if link else None)
        case "add":
            link, *other = rest
            return Edit("add", subject, None, link, Referent(other[1], other[0]) if link else None)
        case "swap":
            return Edit("swap", subject, anchor=Referent(rest[1], rest[0]))
        case _:
            return Edit("remove", subject)


def write_plan(edit: Edit) -> str:
    """The reasoning before an edit, in the parts of Meta-CoT: its task, its target, the ability it needs."""
    return f"task: {write_edit(edit)}; target: the {edit.subject}; ability: {ABILITY[edit.kind]}"


def parse_plan(plan: str) -> Edit:
    """The edit that a plan states; a ValueError where it says none, or where its parts do not agree."""
    found = re.fullmatch(r"task: (.+); target: (.+); ability: (.+)", plan)
    if found is None:
        raise ValueError(f"parse_plan: expected 'task: ...; target: ...; ability: ...', got {plan!r}")
    edit = parse_edit(found[1])
    if write_plan(edit) != plan:
        raise ValueError(f"parse_plan: target and ability do not belong to the task, in {plan!r}")
    return edit


# ---- scenes


def find(scene: Scene, referent: Referent) -> int:
    """Which thing of the scene is meant; a ValueError where none or several could be."""
    found = [i for i, thing in enumerate(scene.things) if referent.means(thing)]
    if len(found) != 1:
        raise ValueError(f"find: the scene has {len(found)} things that 'the {referent}' could mean")
    return found[0]


def referent(scene: Scene, index: int) -> Referent:
    """The shortest words that mean this thing alone; things of a scene differ in shape or color."""
    thing = scene.things[index]
    short = Referent(thing.shape)
    return short if sum(map(short.means, scene.things)) == 1 else Referent(thing.shape, thing.color)


def apply(scene: Scene, edit: Edit, rng: random.Random) -> Scene | None:
    """The scene after the edit, or None where the change finds no room or changes nothing.

    Every thing that is not spoken of is kept, in its order; a new one comes last.
    """
    things = list(scene.things)
    if edit.kind == "add":
        if len(things) == MOST_THINGS or any(edit.subject.means(thing) for thing in things):
            return None
        size = "small" if len(things) > 2 else "medium"
        new = Thing(edit.subject.shape, str(edit.subject.color), size, 0.0, 0.0, rng.uniform(*SIZES[size]))
        found = _room(new, things, edit, scene, rng)
        return None if found is None else replace(scene, things=(*things, found))
    at = find(scene, edit.subject)
    old = things[at]
    if edit.kind == "remove":
        return replace(scene, things=(*things[:at], *things[at + 1 :]))
    if edit.kind == "swap":
        other = find(scene, edit.anchor)  # type: ignore[arg-type]
        there = things[other]
        things[at], things[other] = moved(old, there.x, there.y), moved(there, old.x, old.y)
    elif edit.kind == "move":
        rest = things[:at] + things[at + 1 :]
        spot = None if holds(edit, old, scene) else _room(old, rest, edit, scene, rng)
        if spot is None:
            return None
        things[at] = spot
    else:
        things[at] = _altered(old, edit, rng)
    if tuple(things) == scene.things or not _fits(things):
        return None
    return replace(scene, things=tuple(things))


def _altered(thing: Thing, edit: Edit, rng: random.Random) -> Thing:
    value = str(edit.value)
    if edit.kind == "recolor":
        return replace(thing, color=value)
    if edit.kind == "reshape":
        return replace(thing, shape=value)
    return thing if thing.size == value else replace(thing, size=value, radius=rng.uniform(*SIZES[value]))


def _room(
    thing: Thing, others: Sequence[Thing], edit: Edit, scene: Scene, rng: random.Random
) -> Thing | None:
    """The thing at a place where it touches no other and stands as the edit clearly says, if one is found."""
    low, high = thing.extent + BORDER, CANVAS - thing.extent - BORDER
    for _ in range(TRIES):
        spot = moved(thing, rng.uniform(low, high), rng.uniform(low, high))
        if all(apart(spot, other) for other in others) and holds(edit, spot, scene, clearly=True):
            return spot
    return None


def holds(edit: Edit, thing: Thing, scene: Scene, clearly: bool = False) -> bool:
    """Whether the thing stands where the edit says; a thing may stand anywhere if it says nothing."""
    if edit.value in PLACES:
        return placed(thing, str(edit.value), COMPOSED_WITHIN) if clearly else placed(thing, str(edit.value))
    if edit.relation is None or edit.anchor is None:
        return True
    anchor = scene.things[find(scene, edit.anchor)]
    near, far = sorted((abs(thing.x - anchor.x), abs(thing.y - anchor.y)))
    return relation(thing, anchor) == edit.relation and not (clearly and near > CLEAR * far)


def _fits(things: Sequence[Thing]) -> bool:
    """Whether all things differ, lie inside and touch no other."""
    inside = all(
        thing.extent + BORDER <= place <= CANVAS - thing.extent - BORDER
        for thing in things
        for place in (thing.x, thing.y)
    )
    distinct = len({(thing.shape, thing.color) for thing in things}) == len(things)
    free = all(apart(thing, other) for i, thing in enumerate(things) for other in things[:i])
    return inside and distinct and free


# ---- draws


def draw_source(rng: random.Random) -> Scene:
    """A scene to edit, of one to three things of which no two have one shape and color."""
    while True:
        count = rng.choices((1, 2, 3), (2, 5, 4))[0]
        kinds = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], count)
        sizes = rng.choices(list(SIZES), (1, 4, 1), k=count)
        drawn = [
            Thing(shape, color, size, 0.0, 0.0, rng.uniform(*SIZES[size]))
            for (shape, color), size in zip(kinds, sizes, strict=True)
        ]
        scene = Scene(arrange(drawn, rng))
        if _fits(scene.things) and not heldout.shows_held_out(scene):
            return scene


def draw_edit(rng: random.Random, split: str = "train", kind: str | None = None) -> tuple[Scene, Edit, Scene]:
    """A scene, an edit of it, and the scene after it; sources show nothing that is held out.

    split: "train", where the target shows no held-out combination either, or "heldout", where it shows one.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"draw_edit: split is 'train' or 'heldout', got {split!r}")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"draw_edit: kind {kind!r} is not one of {', '.join(KINDS)}")
    kind = kind or rng.choices(KINDS, list(MIX.values()))[0]
    while True:
        scene = draw_source(rng)
        edit = _draw(rng, scene, kind)
        target = edit and apply(scene, edit, rng)
        if edit and target and heldout.shows_held_out(target) == (split == "heldout"):
            return scene, edit, target


def _draw(rng: random.Random, scene: Scene, kind: str) -> Edit | None:
    order = rng.sample(range(len(scene.things)), len(scene.things))
    subject, others = referent(scene, order[0]), [referent(scene, i) for i in order[1:]]
    match kind:
        case "recolor":
            return Edit(kind, subject, rng.choice(list(COLORS)))
        case "reshape":
            return Edit(kind, subject, rng.choice(SHAPES))
        case "resize":
            return Edit(kind, subject, rng.choice(SAID_SIZES))
        case "remove":
            return Edit(kind, subject)
        case "swap":
            return Edit(kind, subject, anchor=others[0]) if others else None
        case "add":
            new = Referent(rng.choice(SHAPES), rng.choice(list(COLORS)))
            if rng.random() < 0.4:
                return Edit(kind, new)
            return Edit(kind, new, relation=rng.choice(RELATIONS), anchor=subject)
        case _:
            if not others or rng.random() < 0.5:
                return Edit(kind, subject, rng.choice(PLACES))
            return Edit(kind, subject, relation=rng.choice(RELATIONS), anchor=others[0])
