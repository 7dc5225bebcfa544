"""Does a clip show what its prompt asks for? Checked frame by frame, and over time.

Each frame is read as a picture of the lab is (`reading`), whatever was drawn, and its things are followed
through the clip. What a frame is told:

    there      each thing asked for is there, of its color and shape (or rightly not yet, or no more)
    does       it does what it is asked: the step from the frame before leads the asked way, as fast as asked;
               a thing that is to rest rests; an event happens once and for good
    frame      (mean of both over the things) * purity, which falls with things that nobody asked for

A clip in which nothing moves though something should is `static`: the usual way to please judges of single
frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from mmalign.lab.clips import WAYS, Actor, ClipTask, pace, switches
from mmalign.lab.reading import read_scene
from mmalign.lab.scenes import CANVAS, EXTENT, Scene, Thing

# Steps are those of a clip of 9 frames: `_steps` brings those of other lengths to them.
STEP = 1.2  # pixels of the canvas a frame from which a move counts as one in full; prompts mean 1.7 or more
STRAIGHT = 0.97  # cosine to the asked way from which a step leads it in full
STILL = 0.8  # up to which a thing rests
QUICK = 2.9  # pixels a frame that part slow from quick
STATIC = 4.0  # pixels that something must come along in the whole clip where a move is asked for
NEAR = 5.0  # pixels between the boxes of things that have met


@dataclass(frozen=True)
class ActorVerdict:
    """What one actor does in each frame.

    there, does: [F] in [0, 1]; track: its places [F, 2], NaN where it is not seen.
    """

    there: np.ndarray
    does: np.ndarray
    track: np.ndarray


@dataclass(frozen=True)
class ClipVerdict:
    """What was seen, held against what was asked; frames: the score of each, in [0, 1]."""

    category: str
    frames: tuple[float, ...]
    actors: tuple[ActorVerdict, ...]
    extras: tuple[int, ...]  # things of each frame that nobody asked for
    static: bool  # a move was asked for, and nothing of it moves
    direction: float | None  # share of the asked moves that lead the asked way; None where none is asked for

    @property
    def soft(self) -> float:
        return float(np.mean(self.frames))

    @property
    def strict(self) -> bool:
        """Everything is there in every frame and does what was asked, and nothing else is there."""
        return min(self.frames) == 1


def read_clip(clip: Any) -> list[Scene]:
    """What the frames of a clip show, from floats [F, 3, H, W] in [0, 1] or uint8 [F, H, W, 3].

    Frames are square; their side divides the canvas or is a multiple of it. Raises ValueError else.
    """
    if hasattr(clip, "detach"):
        clip = clip.detach().float().cpu().numpy()
    frames = np.asarray(clip)
    if frames.ndim != 4:
        raise ValueError(f"read_clip: a clip is [F, 3, H, W] or [F, H, W, 3], got {frames.shape}")
    if frames.dtype == np.uint8:
        frames = frames.transpose(0, 3, 1, 2) / 255
    side = frames.shape[-1]
    if side < CANVAS:
        if CANVAS % side or frames.shape[-2] != side:
            raise ValueError(
                f"read_clip: frames must be square with a side that divides {CANVAS}, got {frames.shape}"
            )
        zoom = CANVAS // side
        frames = np.stack([_enlarged(frame, zoom) for frame in frames])
    return [read_scene(frame.astype(np.float64)) for frame in frames]


def _enlarged(frame: np.ndarray, zoom: int) -> np.ndarray:
    """A frame [3, h, w] enlarged linearly; places keep their meaning."""
    for axis in (1, 2):
        size = frame.shape[axis]
        at = ((np.arange(size * zoom) + 0.5) / zoom - 0.5).clip(0, size - 1)
        low = np.floor(at).astype(int)
        high, share = np.minimum(low + 1, size - 1), at - low
        shape = [1, 1, 1]
        shape[axis] = -1
        share = share.reshape(shape)
        frame = frame.take(low, axis) * (1 - share) + frame.take(high, axis) * share
    return frame


def judge_clip(scenes: Sequence[Scene], task: ClipTask) -> ClipVerdict:
    """The verdict on a clip that was already read."""
    taken: list[set[int]] = [set() for _ in scenes]
    found = [_follow(scenes, actor, taken) for actor in task.actors]
    extras = tuple(
        max(0, len(scene.things) - len(used)) + bool(scene.word)
        for scene, used in zip(scenes, taken, strict=True)
    )
    if task.category == "collision":
        actors = _collision(task.actors, found)
    else:
        actors = tuple(_judge(actor, things) for actor, things in zip(task.actors, found, strict=True))
    asked = len(task.actors)
    purity = [(asked / (asked + more)) ** 2 for more in extras]
    marks = np.mean([(actor.there + actor.does) / 2 for actor in actors], 0) * purity
    moving = [(a, v) for a, v in zip(task.actors, actors, strict=True) if a.does == "moves"]
    return ClipVerdict(
        task.category,
        tuple(marks.tolist()),
        actors,
        extras,
        bool(moving) and all(_travel(verdict.track) < STATIC for _, verdict in moving),
        float(np.mean([_way(a, v.track) for a, v in moving])) if moving else None,
    )


def score_clip(clip: Any, task: ClipTask) -> ClipVerdict:
    """The verdict on a clip; see `read_clip` for what that may be."""
    return judge_clip(read_clip(clip), task)


def _follow(scenes: Sequence[Scene], actor: Actor, taken: Sequence[set[int]]) -> list[Thing | None]:
    """The thing that is meant in each frame; what is taken is not another actor's.

    It is of the actor's shape and color, else of one of them (a shape counts more); of equals that which is
    nearest to where it was.
    """
    last: Thing | None = None
    found: list[Thing | None] = []
    for scene, used in zip(scenes, taken, strict=True):
        worth = {i: _worth(thing, actor, last) for i, thing in enumerate(scene.things) if i not in used}
        best = max(worth, key=lambda i: worth[i], default=None)
        if best is None or worth[best][0] == 0:
            found.append(None)
            continue
        used.add(best)
        last = scene.things[best]
        found.append(last)
    return found


def _worth(thing: Thing, actor: Actor, last: Thing | None) -> tuple[int, float]:
    alike = 2 * (thing.shape == actor.shape) + (thing.color in (actor.color, actor.turned))
    return alike, 0.0 if last is None else -float(np.hypot(thing.x - last.x, thing.y - last.y))


def _judge(actor: Actor, things: Sequence[Thing | None]) -> ActorVerdict:
    track = _track(things)
    shape = np.array([t is not None and t.shape == actor.shape for t in things], float)
    color = np.array([t is not None and t.color == actor.color for t in things], float)
    seen = np.array([t is not None for t in things], float)
    if actor.does in ("appears", "disappears"):
        there = (shape + color) / 2
        late = actor.does == "appears"
        wanted, does = _switched(1 - seen if late else seen, seen if late else 1 - seen)
        absent = ~wanted if not late else wanted
        return ActorVerdict(np.where(absent, 1 - seen, there), does, track)
    if actor.turned:
        other = np.array([t is not None and t.color == actor.turned for t in things], float)
        early, does = _switched(color, other)
        return ActorVerdict((shape + np.where(early, color, other)) / 2, does, track)
    return ActorVerdict((shape + color) / 2, _moves(actor, track), track)


def _switched(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which frames lie before the switch that fits best [F] bool, and how far each fits it [F]."""
    frames = len(before)
    first, last = switches(frames)
    times = range(max(1, first - 1), min(frames - 1, last + 1) + 1)
    fits = {t: np.concatenate([before[:t], after[t:]]) for t in times}
    best = max(fits, key=lambda t: float(fits[t].sum()))
    return np.arange(frames) < best, fits[best]


def _track(things: Sequence[Thing | None]) -> np.ndarray:
    return np.array([(t.x, t.y) if t is not None else (np.nan, np.nan) for t in things])


def _steps(track: np.ndarray) -> np.ndarray:
    """The step that leads to each frame [F, 2], to the first ones that which leads from them; 0 where unseen.

    In pixels a frame of a clip of 9 frames. In long clips it is measured over two frames: what a thing
    moves in one of them is little beside how exactly it is read.
    """
    span = max(1, round(1 / pace(len(track))))
    steps = (track[span:] - track[:-span]) / (span * pace(len(track)))
    found: np.ndarray = np.nan_to_num(np.concatenate([steps[:span], steps]), nan=0.0)
    return found


def _travel(track: np.ndarray) -> float:
    """Pixels between the two places of a track that are furthest from each other."""
    known = track[~np.isnan(track[:, 0])]
    return float(np.linalg.norm(known[:, None] - known[None], axis=-1).max()) if len(known) else 0.0


def _way(actor: Actor, track: np.ndarray) -> np.ndarray:
    """For each frame the share of a full step that leads the asked way, less for what leads aside, [F]."""
    steps = _steps(track)
    along = steps @ np.array(WAYS[actor.way or ""])
    length = np.linalg.norm(steps, axis=1).clip(1e-6)
    led = (along / STEP).clip(0, 1) * (along / length).clip(0, 1)
    return np.where(led > STRAIGHT, 1.0, led)


def _moves(actor: Actor, track: np.ndarray) -> np.ndarray:
    """How far each frame moves, or rests, as asked."""
    steps = np.linalg.norm(_steps(track), axis=1)
    if actor.does == "stays":
        return np.where(np.isnan(track[:, 0]), 0.0, (2 - steps / STILL).clip(0, 1))
    way = _way(actor, track)
    if actor.speed is None:
        return way
    right = steps < QUICK if actor.speed == "slowly" else steps >= QUICK
    smooth = ndimage.uniform_filter1d(right.astype(float), 3, mode="nearest")
    return way * np.where(smooth > 0.5, 1.0, 0.5)


def _collision(actors: Sequence[Actor], found: Sequence[Sequence[Thing | None]]) -> tuple[ActorVerdict, ...]:
    """Two things meet and part again: up to their meeting each step closes the gap, then it opens."""
    tracks = [_track(things) for things in found]
    gap = np.abs(tracks[0] - tracks[1]).max(1)  # between centers, along the axis that parts them
    does = np.zeros(len(gap))
    if not np.isnan(gap).all():
        meet = int(np.nanargmin(gap))
        radii = [next(t.radius for t in things if t) for things in found]
        reach = sum(EXTENT[a.shape] * radius for a, radius in zip(actors, radii, strict=True))
        met = float(np.nanmin(gap)) <= reach + NEAR
        change = np.nan_to_num(np.diff(gap), nan=0.0) / pace(len(gap))
        change = np.concatenate([change[:1], change])
        wanted = np.where(np.arange(len(gap)) <= meet, -1, 1)
        inside = 0 < meet < len(gap) - 1
        does = ((change * wanted) / (STEP / 2)).clip(0, 1) * (1.0 if met and inside else 0.25)
    return tuple(
        ActorVerdict(
            np.array(
                [
                    (t is not None) * ((t.shape == a.shape) + (t.color == a.color)) / 2 if t else 0.0
                    for t in things
                ]
            ),
            does,
            track,
        )
        for a, things, track in zip(actors, found, tracks, strict=True)
    )
