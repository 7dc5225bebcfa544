"""Clips whose first thing stays itself, or does not: what a judge of identity learns from, exactly labeled.

A clip comes with a picture of its subject, the reference, at the scale of the clip and in its middle:

    kept        the subject of the reference is there from the first frame to the last
    swapped     in a part of the clip, its beginning or its end, another thing is in its place
    vanished    from some frame on there is nothing in its place
    another     another thing is in its place all the time
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmalign.lab.clips import (
    FRAMES,
    MIX,
    RADII,
    SIDE,
    Clip,
    ClipTask,
    compose_clip,
    render_clip,
    sample_clip_task,
    write_clip_prompt,
)
from mmalign.lab.render import render
from mmalign.lab.scenes import CANVAS, COLORS, SHAPES, Scene, Thing

KINDS = ("kept", "swapped", "vanished", "another")
CHANGES = (2, 7)  # the frames at which a swap or a disappearance may begin
# Tasks in which the subject is there all the time, and the same; an event is a change of it.
STEADY = tuple(category for category in MIX if category != "event")
Box = tuple[float, float, float, float]  # left, top, right, bottom, in shares of the frame


@dataclass(frozen=True)
class IdentityClip:
    """A clip with its label.

    frames: uint8 [F, SIDE, SIDE, 3]. reference: uint8 [SIDE, SIDE, 3]. boxes: of what is in the subject's
    place in each frame, None where nothing is.
    """

    frames: np.ndarray
    prompt: str
    reference: np.ndarray
    kind: str
    boxes: tuple[Box | None, ...]

    @property
    def kept(self) -> bool:
        return self.kind == "kept"


def draw_identity_clip(rng: random.Random, kind: str, split: str = "train") -> IdentityClip:
    """A clip of one kind, of a task of the split."""
    if kind not in KINDS:
        raise ValueError(f"draw_identity_clip: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    category = rng.choices(STEADY, [MIX[name] for name in STEADY])[0]
    task = sample_clip_task(rng, category, split)
    clip = compose_clip(task, rng)
    subject = clip.frames[0].things[0]
    shown: list[Thing | None] = [scene.things[0] for scene in clip.frames]
    others = [thing for scene in clip.frames[:1] for thing in scene.things[1:]]
    if kind != "kept":
        other = stranger(rng, [subject, *others])
        shown = changed(shown, kind, other, rng)
        if kind == "another":  # the text tells of what is shown: the reference alone speaks against it
            own = replace(task.actors[0], color=other[0], shape=other[1])
            task = ClipTask((own, *task.actors[1:]))
    frames = tuple(
        Scene(tuple(thing for thing in (own, *scene.things[1:]) if thing))
        for own, scene in zip(shown, clip.frames, strict=True)
    )
    return IdentityClip(
        render_clip(Clip(frames)),
        write_clip_prompt(task),
        reference_picture(subject.color, subject.shape),
        kind,
        tuple(None if thing is None else box_of(thing) for thing in shown),
    )


def changed(
    path: Sequence[Thing | None], kind: str, other: tuple[str, str], rng: random.Random
) -> list[Thing | None]:
    """What is in the subject's place in each frame; other: color and shape of another thing."""
    moment = rng.randint(*CHANGES) * len(path) // FRAMES
    early = kind == "swapped" and rng.random() < 0.5
    found: list[Thing | None] = []
    for frame, thing in enumerate(path):
        gone = kind == "another" or (frame < moment) == early
        if gone and thing is not None:
            thing = None if kind == "vanished" else replace(thing, color=other[0], shape=other[1])
        found.append(thing)
    return found


def stranger(rng: random.Random, things: Sequence[Thing]) -> tuple[str, str]:
    """Color and shape of a thing that is none of these; of the first it may keep one of them."""
    while True:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        keeps = rng.randrange(3)
        found = (things[0].color if keeps == 1 else color, things[0].shape if keeps == 2 else shape)
        if found not in [(thing.color, thing.shape) for thing in things]:
            return found


def reference_picture(color: str, shape: str) -> np.ndarray:
    """A thing alone in the middle, as large as things of clips are, uint8 [SIDE, SIDE, 3]."""
    thing = Thing(shape, color, "medium", CANVAS / 2, CANVAS / 2, sum(RADII) / 2)
    return render(Scene((thing,)), SIDE)


def box_of(thing: Thing) -> Box:
    """The square around a thing, in shares of the frame."""
    reach = thing.extent
    left, top, right, bottom = (
        min(1.0, max(0.0, place / CANVAS))
        for place in (thing.x - reach, thing.y - reach, thing.x + reach, thing.y + reach)
    )
    return left, top, right, bottom


def draw_identity_clips(count: int, split: str, seed: int) -> list[IdentityClip]:
    """As many kept clips as others, and of those equally many of each kind."""
    rng = random.Random(f"identity clips {split} {seed}")
    broken = KINDS[1:]
    return [
        draw_identity_clip(rng, "kept" if i % 2 == 0 else broken[i // 2 % len(broken)], split)
        for i in range(count)
    ]
