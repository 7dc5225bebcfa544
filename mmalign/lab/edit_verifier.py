"""Did the asked change, and did the rest stay? Read off the edited picture and held against the source.

Both halves are scored apart and joined by their geometric mean, as VIEScore (Ku et al. 2023,
arXiv:2312.14867) joins its: leaving a picture as it was keeps everything and earns nothing, and so does
drawing a new picture that shows what was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmalign.lab.edits import Edit, find
from mmalign.lab.reading import read_scene
from mmalign.lab.scenes import Scene, Thing, relation
from mmalign.lab.tasks import PLACES, placed
from mmalign.lab.verifier import Check

NEAR = 8.0  # pixels within which a thing is taken for the one that stood there
STAYS = 3.0  # pixels by which a thing that stays may be off
SCALE = 1.2  # times that its radius may be off


@dataclass(frozen=True)
class EditVerdict:
    """What was seen, held against the source and the edit; equal edits of equal scenes have equal checks.

    asked: the change. kept: what the edit does not speak of. extras: things and letters beyond those.
    """

    kind: str
    asked: tuple[Check, ...]
    kept: tuple[Check, ...]
    extras: int
    scene: Scene

    @property
    def change(self) -> float:
        """How far the asked changed, in [0, 1]."""
        return float(np.mean([check.value for check in self.asked]))

    @property
    def stay(self) -> float:
        """How far the rest stayed, in [0, 1]; each thing that nobody asked for weighs as one that is lost."""
        held = [check.value for check in self.kept]
        return (sum(held) + 1) / (len(held) + 1 + self.extras)

    @property
    def soft(self) -> float:
        """The geometric mean of both, in [0, 1]; 0 for the source itself."""
        return float((self.change * self.stay) ** 0.5)

    @property
    def strict(self) -> bool:
        """All that was asked for changed, all else stayed, and nothing else is there."""
        return not self.extras and all(check.value == 1 for check in (*self.asked, *self.kept))


def score_edit(image: Any, source: Scene, edit: Edit) -> EditVerdict:
    """The verdict on an edited picture; see `reading.as_picture` for what a picture may be.

    source: the scene before. ValueError if the edit speaks of things that it does not have.
    """
    return judge_edit(read_scene(image), source, edit)


def judge_edit(scene: Scene, source: Scene, edit: Edit) -> EditVerdict:
    """The verdict on an edited scene that was already read."""
    subject = None if edit.kind == "add" else find(source, edit.subject)
    anchor = find(source, edit.anchor) if edit.anchor else None
    gone = subject if edit.kind in ("remove", "move") else None
    slots = [i for i in range(len(source.things)) if i != gone]
    expected = [_moved(source, i, edit, subject, anchor) for i in slots]
    seen = dict(zip(slots, matched(expected, scene.things), strict=True))
    free = [thing for i, thing in enumerate(scene.things) if i not in seen.values()]
    things = {slot: None if i is None else scene.things[i] for slot, i in seen.items()}
    wanted = dict(zip(slots, expected, strict=True))

    touched = {i for i in (subject, anchor if edit.kind == "swap" else None) if i is not None}
    kept = [_unchanged(wanted[i], things[i]) for i in slots if i not in touched]
    if edit.kind in ("recolor", "reshape", "resize"):
        assert subject is not None
        asked, rest = _altered(wanted[subject], things[subject], edit)
        kept += rest
    elif edit.kind == "swap":
        pairs = [(wanted[i], things[i]) for i in sorted(touched)]
        asked = [
            _exchanged(thing, seen, other)
            for (thing, seen), (other, _) in zip(pairs, pairs[::-1], strict=True)
        ]
        kept += [_measured(thing, seen) for thing, seen in pairs]
    elif edit.kind == "remove":
        asked, free = _removed(source.things[subject or 0], free)
    else:
        stood = None if anchor is None else things[anchor] or source.things[anchor]
        asked, rest, free = _placed(
            source.things[subject] if subject is not None else None, free, edit, stood
        )
        kept += rest
    letters = len(scene.word.text) if scene.word else 0
    return EditVerdict(edit.kind, tuple(asked), tuple(kept), len(free) + letters, scene)


def _moved(source: Scene, i: int, edit: Edit, subject: int | None, anchor: int | None) -> Thing:
    """Thing i where it is expected after the edit."""
    thing = source.things[i]
    if edit.kind == "swap" and i in (subject, anchor):
        there = source.things[anchor if i == subject else subject]  # type: ignore[index]
        return Thing(thing.shape, thing.color, thing.size, there.x, there.y, thing.radius)
    return thing


def matched(expected: Sequence[Thing], seen: Sequence[Thing]) -> list[int | None]:
    """For each expected thing the seen one that stands there, None where none is near; none is taken twice.

    Of several ways the one with the most things found and the least distance; equal looks break ties.
    """
    if not expected or not seen:
        return [None] * len(expected)
    far = 1e3
    cost = np.full((len(expected), len(seen)), far)
    for row, thing in enumerate(expected):
        for column, other in enumerate(seen):
            away = hypot(thing.x - other.x, thing.y - other.y)
            if away <= NEAR:
                cost[row, column] = away + (thing.shape != other.shape) + (thing.color != other.color)
    found: list[int | None] = [None] * len(expected)
    for row, column in zip(*linear_sum_assignment(cost), strict=True):
        if cost[row, column] < far:
            found[row] = int(column)
    return found


def _unchanged(thing: Thing, seen: Thing | None) -> Check:
    """Whether a thing is as it was expected: the share of shape, color, size and place."""
    name = f"{thing.color} {thing.shape}"
    if seen is None:
        return Check(name, 0.0)
    right = (
        seen.shape == thing.shape,
        seen.color == thing.color,
        _as_large(thing, seen),
        _there(thing, seen),
    )
    return Check(name, sum(right) / 4)


def _exchanged(thing: Thing, seen: Thing | None, other: Thing) -> Check:
    """Whether what stands here looks as the one of two things that belongs here, where the two differ."""
    telling = [
        seen is not None and getattr(seen, look) == getattr(thing, look)
        for look in ("shape", "color")
        if getattr(thing, look) != getattr(other, look)
    ]
    return Check(f"{thing.color} {thing.shape}", sum(telling) / len(telling))


def _measured(thing: Thing, seen: Thing | None) -> Check:
    """Whether a thing is as large as expected, and where it was expected."""
    right = 0.0 if seen is None else (_as_large(thing, seen) + _there(thing, seen)) / 2
    return Check(f"the size and place of the {thing.color} {thing.shape}", right)


def _as_large(thing: Thing, seen: Thing) -> bool:
    return bool(1 / SCALE <= seen.radius / thing.radius <= SCALE)


def _there(thing: Thing, seen: Thing) -> bool:
    return hypot(thing.x - seen.x, thing.y - seen.y) <= STAYS


def _altered(thing: Thing, seen: Thing | None, edit: Edit) -> tuple[list[Check], list[Check]]:
    """What was asked of a thing that stays where it is, and whether its other looks stayed."""
    right = {
        "recolor": seen is not None and seen.color == edit.value,
        "reshape": seen is not None and seen.shape == edit.value,
        "resize": seen is not None and seen.size == edit.value,
    }
    looks = {
        "recolor": seen is not None and seen.color == thing.color,
        "reshape": seen is not None and seen.shape == thing.shape,
        "resize": seen is not None and _as_large(thing, seen),
    }
    # A circle as large as a star is what "turn" asks for; what it would measure as a star says nothing.
    others = [looks[kind] for kind in looks if kind != edit.kind]
    others.append(seen is not None and _there(thing, seen))
    asked = Check(str(edit.value), float(right[edit.kind]))
    return [asked], [Check(f"the rest of the {edit.subject}", sum(others) / len(others))]


def _removed(thing: Thing, free: list[Thing]) -> tuple[list[Check], list[Thing]]:
    """Whether a thing is gone, from its place and from anywhere else."""
    left = [
        other
        for other in free
        if (other.shape, other.color) == (thing.shape, thing.color)
        or hypot(thing.x - other.x, thing.y - other.y) <= NEAR
    ]
    return [Check("gone", float(not left))], [other for other in free if other not in left[:1]]


def _placed(
    thing: Thing | None, free: list[Thing], edit: Edit, anchor: Thing | None
) -> tuple[list[Check], list[Check], list[Thing]]:
    """Whether a thing that moved, or is new, stands where it was asked for; thing: how it looked before.

    Of the things that are left over the one is taken that is most like it.
    """
    color = thing.color if thing else str(edit.subject.color)
    shape = thing.shape if thing else edit.subject.shape

    def likeness(other: Thing) -> float:
        return ((other.shape == shape) + (other.color == color)) / 2

    def stands(other: Thing) -> bool:
        if edit.value in PLACES:
            return placed(other, str(edit.value))
        return anchor is None or relation(other, anchor) == edit.relation

    best = max(free, key=lambda other: (likeness(other), stands(other)), default=None)
    like = likeness(best) if best else 0.0
    where = [Check(edit.relation or str(edit.value), like * stands(best) if best else 0.0)]
    rest = [other for other in free if other is not best]
    if thing is None:
        new = [Check(f"a {edit.subject}", like)]
        return new + (where if edit.relation else []), [], rest
    size = best is not None and _as_large(thing, best)
    return where, [Check(f"the looks of the {edit.subject}", (2 * like + size) / 3)], rest
