"""Pairs of clips, one closer to the prompt than the other, with the exact reasoning that says so.

A clip may be at fault in the dimensions

    appearance   a thing has another color or shape than asked
    direction    it moves another way
    speed        it moves slowly where quickly was asked, or the other way round
    identity     it turns another color on its way, or vanishes

and of a pair the clip without a fault is chosen; equal faults are a tie. The reasoning says what is seen of
each thing in some frames (color, shape, column and row in eighths of the picture), what it does, and then a
verdict for each dimension:

    red circle 1 4, red circle 3 4, blue circle 6 4: moves right quickly, changes.
    <answer>appearance: 1, direction: 1, speed: 1, identity: 0</answer>
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mmalign.lab.clip_verifier import QUICK
from mmalign.lab.clips import (
    FRAMES,
    WAYS,
    Actor,
    Clip,
    ClipTask,
    compose_clip,
    sample_clip_task,
    write_clip_prompt,
)
from mmalign.lab.scenes import CANVAS, COLORS, SHAPES, Scene, Thing

DIMENSIONS = ("appearance", "direction", "speed", "identity")
CATEGORIES = {"motion": 0.35, "speed": 0.45, "two_motions": 0.2}  # of prompts, with their shares
TIES = 0.1  # share of them; half of them are two clips of the same fault
EIGHTH = CANVAS / 8
LEFT = {"slowly": "quickly", "quickly": "slowly"}


@dataclass(frozen=True)
class Judged:
    """A clip, what it shows, and the dimensions in which it is at fault with what was asked."""

    clip: Clip
    shown: ClipTask
    faults: frozenset[str]

    @property
    def scores(self) -> dict[str, int]:
        """1 for each dimension that is as asked, else 0."""
        return {name: int(name not in self.faults) for name in DIMENSIONS}


@dataclass(frozen=True)
class ClipPair:
    """Two clips for one prompt. kind: the fault by which they differ; "" for a tie, of either order."""

    prompt: str
    chosen: Judged
    rejected: Judged
    kind: str

    @property
    def tie(self) -> bool:
        return not self.kind


def draw_pair(rng: random.Random, split: str = "train") -> ClipPair:
    """A pair for a prompt of one split, "train" or "heldout"."""
    category = rng.choices(list(CATEGORIES), list(CATEGORIES.values()))[0]
    asked = sample_clip_task(rng, category, split)
    prompt = write_clip_prompt(asked)
    kinds = [kind for kind in DIMENSIONS if kind != "speed" or category == "speed"]
    kind = rng.choice(kinds)
    if rng.random() < TIES:
        faults = [kind] if rng.random() < 0.5 else []
        return ClipPair(prompt, draw_judged(asked, faults, rng), draw_judged(asked, faults, rng), "")
    return ClipPair(prompt, draw_judged(asked, [], rng), draw_judged(asked, [kind], rng), kind)


def draw_judged(asked: ClipTask, faults: Sequence[str], rng: random.Random) -> Judged:
    """A clip with these faults; of two things that move, one is at fault."""
    movers = [i for i, actor in enumerate(asked.actors) if actor.does == "moves"]
    at = rng.choice(movers)
    actor = asked.actors[at]
    for fault in faults:
        actor = spoiled(actor, fault, asked.actors, rng)
    shown = ClipTask((*asked.actors[:at], actor, *asked.actors[at + 1 :]))
    return Judged(compose_clip(shown, rng), shown, frozenset(faults))


def spoiled(actor: Actor, fault: str, among: Sequence[Actor], rng: random.Random) -> Actor:
    """A moving actor with one fault; a new color or shape is that of none `among` those asked for."""
    colors = [c for c in COLORS if c not in {actor.color, actor.turned, *(a.color for a in among)}]
    if fault == "direction":
        return replace(actor, way=rng.choice([way for way in WAYS if way != actor.way]))
    if fault == "speed" and actor.speed:
        return replace(actor, speed=LEFT[actor.speed])
    if fault == "appearance":
        shapes = [s for s in SHAPES if s not in {actor.shape, *(a.shape for a in among)}]
        if rng.random() < 0.5:
            return replace(actor, shape=rng.choice(shapes))
        return replace(actor, color=rng.choice(colors))
    if fault == "identity":
        if rng.random() < 0.5:
            return replace(actor, does="disappears")
        return replace(actor, turned=rng.choice(colors))
    raise ValueError(f"spoiled: {fault!r} is no fault of an actor that moves at speed {actor.speed}")


# ---- reasoning


def looked_at(count: int, frames: int = FRAMES) -> list[int]:
    """`count` frames of a clip, evenly over its length with both ends."""
    return [int(number) for number in np.linspace(0, frames - 1, min(count, frames)).round()]


def reason(judged: Judged, frames: Sequence[int]) -> str:
    """The exact reasoning about a clip, as seen at these frames, with its verdicts."""
    seen = " ".join(tell(actor, judged.clip, frames) for actor in judged.shown.actors)
    return f"{seen} {write_answer(judged.scores)}"


def write_answer(scores: dict[str, int]) -> str:
    told = ", ".join(f"{name}: {score}" for name, score in scores.items())
    return f"<answer>{told}</answer>"


def tell(actor: Actor, clip: Clip, frames: Sequence[int]) -> str:
    """What one actor is seen to do."""
    things = [of_actor(actor, scene) for scene in clip.frames]
    places = ", ".join(place(things[number]) for number in frames)
    known = [thing for thing in things if thing]
    steps = [np.hypot(b.x - a.x, b.y - a.y) for a, b in pairwise(known)]
    deed = "stays"
    if actor.way:
        deed = f"moves {actor.way} {'quickly' if np.mean(steps) >= QUICK else 'slowly'}"
    fate = "vanishes" if None in things else "changes" if actor.turned else "lasts"
    return f"{places}: {deed}, {fate}."


def of_actor(actor: Actor, scene: Scene) -> Thing | None:
    """The thing of a scene that is this actor."""
    own = (thing for thing in scene.things if thing.shape == actor.shape)
    return next((thing for thing in own if thing.color in (actor.color, actor.turned)), None)


def place(thing: Thing | None) -> str:
    """`red circle 3 5`: column and row in eighths of the picture."""
    if thing is None:
        return "none"
    return f"{thing.color} {thing.shape} {int(thing.x // EIGHTH)} {int(thing.y // EIGHTH)}"
