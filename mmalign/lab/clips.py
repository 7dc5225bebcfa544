"""Scenes that move: what a clip of the lab shows, the sentences that ask for it, and its frames.

A clip has `FRAMES` frames of one or two things on the lab's plain ground. A prompt names each thing by color
and shape and says what it does:

    a red circle moves left quickly
    a red circle moves left and a blue square stays
    a red circle appears        a red circle disappears        a red circle turns blue
    a red circle and a blue square collide

What it leaves open (where, how fast, when) is drawn. Places are in pixels of the 64 x 64 canvas of `scenes`,
speeds in those per frame of a clip of `FRAMES`, at any rendered size. A clip of another length shows the same
in more or fewer frames: its times and speeds are stretched to it (`pace`, `switches`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmalign.lab.render import render
from mmalign.lab.scenes import CANVAS, COLORS, SHAPES, Scene, Thing
from mmalign.lab.tasks import BORDER, GAP, apart

FRAMES, SIDE = 9, 32  # frames of a clip, and pixels along the side of one as the lab's video model draws it
RADII = (8.8, 10.0)  # pixels of the canvas
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
SPEEDS = {None: (1.7, 4.4), "slowly": (1.7, 2.3), "quickly": (3.5, 4.4)}
SWITCH = (3, 6)  # of FRAMES, those between which a thing may appear, vanish or turn another color

CATEGORIES = ("motion", "speed", "two_motions", "rest", "event", "collision")
# Shares of the training clips; rare kinds are easier.
MIX = {"motion": 0.3, "speed": 0.24, "two_motions": 0.2, "rest": 0.06, "event": 0.12, "collision": 0.08}
NOUN = re.compile(r"a (\w+) (\w+)(?: (.+))?")


@dataclass(frozen=True)
class Actor:
    """A thing and what it does: moves WAY, stays, appears, disappears, turns COLOR, or collides.

    way: of a move; turned: the color that it takes on; speed: of a move, where the prompt says one.
    """

    color: str
    shape: str
    does: str
    way: str | None = None
    speed: str | None = None
    turned: str | None = None


@dataclass(frozen=True)
class ClipTask:
    """What a prompt asks for: one or two actors, in the order of the sentence."""

    actors: tuple[Actor, ...]

    @property
    def category(self) -> str:
        first = self.actors[0]
        if first.does == "collides":
            return "collision"
        if len(self.actors) > 1:
            return "two_motions"
        if first.does == "moves":
            return "speed" if first.speed else "motion"
        return "rest" if first.does == "stays" else "event"

    @property
    def held_out(self) -> bool:
        """Whether any of its things does what that thing never does in training."""
        return any(map(is_held_out, self.actors))


@dataclass(frozen=True)
class Clip:
    """One scene for each frame; thing i of a scene is actor i, unless it is not there at that moment."""

    frames: tuple[Scene, ...]


def is_held_out(actor: Actor) -> bool:
    """About a seventh of the combinations of color, shape and deed; each part remains in others."""
    deeds = (*WAYS, "stays", "appears", "disappears", "turns", "collides")
    deed = actor.way or actor.does
    return (3 * list(COLORS).index(actor.color) + SHAPES.index(actor.shape) + deeds.index(deed)) % 7 == 0


def sample_clip_task(rng: random.Random, category: str | None = None, split: str = "train") -> ClipTask:
    """A task of one category (None: any, by `MIX`); split: "train" or "heldout"."""
    if split not in ("train", "heldout"):
        raise ValueError(f"sample_clip_task: split is 'train' or 'heldout', got {split!r}")
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"sample_clip_task: category {category!r} is not one of {CATEGORIES}")
    category = category or rng.choices(list(MIX), list(MIX.values()))[0]
    while True:
        task = ClipTask(tuple(_draw(rng, category)))
        if task.held_out == (split == "heldout"):
            return task


def _draw(rng: random.Random, category: str) -> Iterator[Actor]:
    shapes, colors = rng.sample(SHAPES, 2), rng.sample(list(COLORS), 3)
    way = rng.choice(list(WAYS))
    if category == "collision":
        yield from (Actor(colors[i], shapes[i], "collides") for i in (0, 1))
    elif category == "two_motions":
        yield Actor(colors[0], shapes[0], "moves", way)
        other = rng.choice([*WAYS, None])
        yield Actor(colors[1], shapes[1], "moves" if other else "stays", other)
    elif category == "event":
        does = rng.choice(("appears", "disappears", "turns"))
        yield Actor(colors[0], shapes[0], does, turned=colors[1] if does == "turns" else None)
    elif category == "rest":
        yield Actor(colors[0], shapes[0], "stays")
    else:
        speed = rng.choice(("slowly", "quickly")) if category == "speed" else None
        yield Actor(colors[0], shapes[0], "moves", way, speed)


# ---- sentences


def write_clip_prompt(task: ClipTask) -> str:
    """The sentence that asks for a task."""
    if task.category == "collision":
        first, second = task.actors
        return f"a {first.color} {first.shape} and a {second.color} {second.shape} collide"
    return " and ".join(f"a {actor.color} {actor.shape} {_deed(actor)}" for actor in task.actors)


def _deed(actor: Actor) -> str:
    return " ".join(filter(None, (actor.does, actor.way, actor.turned, actor.speed)))


def parse_clip(prompt: str) -> ClipTask:
    """The task that a prompt asks for, the inverse of `write_clip_prompt`.

    Raises ValueError where it is not in the language of clips.
    """
    body, collide, rest = prompt.partition(" collide")
    phrases = body.split(" and ")
    if rest or len(phrases) > 2 or (collide and len(phrases) != 2):
        raise ValueError(f"parse_clip: {prompt!r} is not a sentence about one or two things of a clip")
    return ClipTask(tuple(_actor(phrase, bool(collide), prompt) for phrase in phrases))


def _actor(phrase: str, collides: bool, prompt: str) -> Actor:
    found = NOUN.fullmatch(phrase)
    color, shape, deed = found.groups() if found else ("", "", None)
    if color in COLORS and shape in SHAPES:
        if collides and deed is None:
            return Actor(color, shape, "collides")
        match (deed or "").split():
            case ["moves", way, *speed] if way in WAYS and len(speed) < 2 and {*speed} <= {*SPEEDS}:
                return Actor(color, shape, "moves", way, *speed)
            case ["turns", turned] if turned in COLORS and turned != color:
                return Actor(color, shape, "turns", turned=turned)
            case ["stays" | "appears" | "disappears" as does]:
                return Actor(color, shape, does)
    raise ValueError(f"parse_clip: {phrase!r} says nothing that a thing of a clip can do, in {prompt!r}")


# ---- clips


def pace(frames: int) -> float:
    """What a speed of a clip of `FRAMES` frames is in one of `frames`, so that both lead equally far."""
    return (FRAMES - 1) / max(1, frames - 1)


def switches(frames: int) -> tuple[int, int]:
    """`SWITCH` in a clip of `frames`."""
    first, last = (time * frames // FRAMES for time in SWITCH)
    return first, last


def compose_clip(task: ClipTask, rng: random.Random, frames: int = FRAMES) -> Clip:
    """A clip that shows what the task asks for and nothing else; what it leaves open is drawn.

    Raises ValueError below 4 frames, in which nothing can appear, or meet and part.
    """
    if frames < 4:
        raise ValueError(f"compose_clip: a clip has at least 4 frames, got {frames}")
    if task.category == "collision":
        return _collide(task, rng, frames)
    while True:
        paths = [_path(actor, rng, frames) for actor in task.actors]
        rows = list(zip(*paths, strict=True))
        if all(apart(*row) for row in rows if len(row) == 2 and None not in row):  # type: ignore[arg-type]
            return Clip(tuple(Scene(tuple(thing for thing in row if thing)) for row in rows))


def _path(actor: Actor, rng: random.Random, frames: int) -> list[Thing | None]:
    """The thing in each frame, None where it is not there."""
    thing = Thing(actor.shape, actor.color, "medium", 0.0, 0.0, rng.uniform(*RADII))
    low, high = thing.extent + BORDER, CANVAS - thing.extent - BORDER
    dx, dy = WAYS[actor.way] if actor.way else (0, 0)
    slow, fast = (speed * pace(frames) for speed in SPEEDS[actor.speed])
    speed = rng.uniform(slow, min(fast, (high - low) / (frames - 1))) if actor.way else 0.0

    def start(step: float) -> float:
        """A place from which `step` pixels a frame stay inside."""
        travel = step * (frames - 1)
        return rng.uniform(low - min(travel, 0.0), high - max(travel, 0.0))

    x, y = start(dx * speed), start(dy * speed)
    path: list[Thing | None] = [
        replace(thing, x=x + dx * speed * f, y=y + dy * speed * f) for f in range(frames)
    ]
    switch = rng.randint(*SWITCH) * frames // FRAMES
    if actor.does in ("appears", "disappears"):
        early = actor.does == "disappears"
        return [thing if (f < switch) == early else None for f, thing in enumerate(path)]
    if actor.turned:
        return [replace(t, color=actor.turned) if t and f >= switch else t for f, t in enumerate(path)]
    return path


def _collide(task: ClipTask, rng: random.Random, frames: int) -> Clip:
    """Two things come together along a line, meet, and go back where they came from."""
    radius = rng.uniform(*RADII)
    things = [Thing(actor.shape, actor.color, "medium", 0.0, 0.0, radius) for actor in task.actors]
    touch = sum(thing.extent for thing in things) + GAP
    low, high = max(t.extent for t in things) + BORDER, CANVAS - max(t.extent for t in things) - BORDER
    wide = high - low
    middle, meet = rng.uniform(low + wide / 2 - 3, low + wide / 2 + 3), frames // 2
    gap = min(wide, 2 * min(middle - low, high - middle))  # as far apart as there is room for
    level, sign, across = rng.uniform(low, high), rng.choice((-1, 1)), rng.random() < 0.5
    scenes = []
    for f in range(frames):
        away = (touch + (gap - touch) * abs(f - meet) / meet) / 2 * sign
        spots = [(middle - away, level), (middle + away, level)]
        placed = [
            replace(thing, x=along if across else beside, y=beside if across else along)
            for thing, (along, beside) in zip(things, spots, strict=True)
        ]
        scenes.append(Scene(tuple(placed)))
    return Clip(tuple(scenes))


def render_clip(clip: Clip, size: int = SIDE) -> np.ndarray:
    """The frames of a clip, uint8 [F, size, size, 3]."""
    return np.stack([render(scene, size) for scene in clip.frames])


def training_clip(rng: random.Random, split: str = "train") -> tuple[np.ndarray, str]:
    """A clip uint8 [F, SIDE, SIDE, 3] and the prompt that it satisfies."""
    task = sample_clip_task(rng, split=split)
    return render_clip(compose_clip(task, rng)), write_clip_prompt(task)


def list_clip_prompts(
    count: int, split: str, seed: int = 0, categories: Sequence[str] = CATEGORIES
) -> list[str]:
    """`count` different prompts of a split, the categories by their shares in training."""
    rng = random.Random(f"clip prompts {split} {seed}")
    shares = [MIX[category] for category in categories]
    found: dict[str, None] = {}
    for _ in range(200 * count):
        category = rng.choices(categories, shares)[0]
        found[write_clip_prompt(sample_clip_task(rng, category, split))] = None
        if len(found) == count:
            return list(found)
    raise ValueError(
        f"list_clip_prompts: the {split} split has only {len(found)} prompts, {count} were asked for"
    )
