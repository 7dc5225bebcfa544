"""Damage of the kinds that generators make, drawn at known places: what an artifact detector learns from.

Every kind takes a picture [S, S, 3] in [0, 1], a generator and a strength in (0, 1]; it gives a damaged copy.
Lengths are in pixels of a 64 x 64 picture and grow with it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

Rng = np.random.Generator
CANVAS = 64
VISIBLE = 0.06  # change of a channel from which a place counts as damaged
LEAST = 0.004  # share of the picture that must be damaged; a draw that damages less is drawn again
TRIES = 12
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Corrupted:
    """A damaged picture [S, S, 3] in [0, 1], the kind of damage, and where it is: mask [S, S] bool."""

    picture: np.ndarray
    kind: str
    mask: np.ndarray


def corrupt(picture: np.ndarray, kind: str, rng: Rng, strength: float | None = None) -> Corrupted:
    """The picture with one kind of damage, visibly; strength None draws one from 0.3 to 1.

    picture: [S, S, 3] in [0, 1].
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"corrupt: kind must be one of {', '.join(CORRUPTIONS)}, got {kind!r}")
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.shape[0] != picture.shape[1]:
        raise ValueError(f"corrupt: expected a square picture [S, S, 3], got {picture.shape}")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"corrupt: strength must lie in (0, 1], got {strength}")
    picture = np.asarray(picture, dtype=np.float64)
    damaged, mask = picture, np.zeros(picture.shape[:2], dtype=bool)
    for _ in range(TRIES):
        amount = rng.uniform(0.3, 1) if strength is None else strength
        damaged = CORRUPTIONS[kind](picture, rng, amount).clip(0, 1)
        mask = np.abs(damaged - picture).max(-1) > VISIBLE
        if mask.mean() >= LEAST:
            break
    return Corrupted(damaged, kind, mask)


def blobs(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """One to three soft lumps of a color that has no business there."""
    damaged = picture
    for _ in range(rng.integers(1, 4)):
        reach, angle = _polar(picture, *_place(picture, rng))
        wobble = sum(rng.uniform(-0.25, 0.25) * np.cos(k * angle + rng.uniform(0, 7)) for k in (2, 3, 5))
        radius = (2.5 + 5 * strength) * rng.uniform(0.7, 1.2) * _unit(picture)
        cover = (1.2 - reach / (radius * (1 + wobble))).clip(0, 0.5) * 2
        damaged = damaged + cover[..., None] * (rng.uniform(0, 1, 3) - damaged)
    return damaged


def seams(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """One side of a straight line slips along it, as where two tiles do not fit."""
    turned = picture.transpose(1, 0, 2) if rng.random() < 0.5 else picture
    line = _place(turned, rng)[0]
    slip = round((2 + 6 * strength) * _unit(picture)) * rng.choice([-1, 1])
    damaged = turned.copy()
    damaged[line:] = np.roll(turned[line:], slip, axis=1)
    shade = 0.25 * strength * rng.choice([-1, 1])
    damaged[line : line + max(1, round(_unit(picture)))] += shade
    return damaged if turned is picture else damaged.transpose(1, 0, 2)


def bleeding(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """Color runs over the edges while light and dark stay where they are."""
    luma = (picture @ LUMA)[..., None]
    spread = (1.5 + 4.5 * strength) * rng.uniform(0.8, 1.2) * _unit(picture)
    shift = rng.normal(0, 2 * strength * _unit(picture), 2)
    chroma = ndimage.gaussian_filter(picture - luma, (spread, spread, 0), mode="nearest")
    chroma = ndimage.shift(chroma, (*shift, 0), order=1, mode="nearest")
    run: np.ndarray = luma + (1 + 0.8 * strength) * chroma
    return run


def oversharpening(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """Halos along every edge, by far too much unsharp masking."""
    width = rng.uniform(0.8, 2.2) * _unit(picture)
    soft = ndimage.gaussian_filter(picture, (width, width, 0), mode="nearest")
    sharp: np.ndarray = picture + (0.8 + 3.2 * strength) * (picture - soft)
    return sharp


def checkerboard(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """The pattern that strided upsampling leaves, over a part or the whole of the picture."""
    period = max(1, round(rng.integers(1, 4) * _unit(picture)))
    rows, columns = np.indices(picture.shape[:2]) // period
    sign = np.where((rows + columns) % 2, 1.0, -1.0)
    tint = rng.uniform(0.4, 1, 3) * (0.06 + 0.2 * strength)
    window = _window(picture, rng, 0.35, 1.0)
    patterned: np.ndarray = picture + (sign * window)[..., None] * tint * np.where(picture > 0.5, -1, 1)
    return patterned


def broken(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """A square around something is turned, mirrored or torn, so that a shape no longer holds together."""
    size = len(picture)
    half = max(2, round((3.5 + 5 * strength) * rng.uniform(0.8, 1.2) * _unit(picture)))
    row, column = (int(np.clip(place, half, size - half)) for place in _place(picture, rng))
    at = np.s_[row - half : row + half, column - half : column + half]
    patch, how = picture[at], rng.integers(4)
    if how < 2:
        patch = np.rot90(patch, int(how) + 1)
    elif how == 2:
        patch = patch[:, ::-1].transpose(1, 0, 2)
    else:
        strips = np.array_split(np.arange(2 * half), 4)
        patch = np.concatenate(
            [np.roll(patch[strip], rng.integers(-half, half + 1), axis=1) for strip in strips]
        )
    damaged = picture.copy()
    damaged[at] = patch
    return damaged


def ghost(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """A faint second picture, shifted."""
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(4, 14) * _unit(picture)
    shift = (round(length * np.sin(angle)), round(length * np.cos(angle)))
    doubled: np.ndarray = picture + (0.25 + 0.3 * strength) * (np.roll(picture, shift, (0, 1)) - picture)
    return doubled


def grain(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """Colored noise over a part of the picture."""
    noise = rng.normal(0, 0.06 + 0.25 * strength, picture.shape)
    noisy: np.ndarray = picture + noise * _window(picture, rng, 0.3, 1.0)[..., None]
    return noisy


def smear(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """Motion in one direction over a part of the picture."""
    length = max(3, round((5 + 12 * strength) * _unit(picture)))
    moved = ndimage.uniform_filter1d(picture, length, axis=int(rng.integers(2)), mode="nearest")
    moving: np.ndarray = picture + _window(picture, rng, 0.4, 1.0)[..., None] * (moved - picture)
    return moving


def holes(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """Hard rectangles of one shade where something should be."""
    damaged = picture.copy()
    for _ in range(rng.integers(1, 4)):
        height, width = (max(2, round(rng.uniform(3, 5 + 9 * strength) * _unit(picture))) for _ in "hw")
        row, column = _place(picture, rng)
        damaged[max(0, row - height // 2) :, max(0, column - width // 2) :][:height, :width] = rng.random()
    return damaged


def streaks(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """Rows or columns that are lighter or darker than they should be."""
    lines = np.zeros(len(picture))
    count = max(1, round(rng.integers(2, 9) * _unit(picture)))
    lines[rng.choice(len(picture), count, replace=False)] = rng.normal(0, 0.15 + 0.35 * strength, count)
    streaked: np.ndarray = picture + (lines[:, None] if rng.random() < 0.5 else lines[None, :])[..., None]
    return streaked


def blocks(picture: np.ndarray, rng: Rng, strength: float) -> np.ndarray:
    """The blocks and rings of a JPEG file of far too low a quality."""
    from PIL import Image

    file = io.BytesIO()
    quality = round(14 - 12 * strength + rng.uniform(-1, 1))
    Image.fromarray((255 * picture).round().astype(np.uint8)).save(file, "JPEG", quality=max(1, quality))
    return np.asarray(Image.open(file).convert("RGB")) / 255


# Kinds that detectors are trained on, and kinds that only tests show them.
SEEN = ("blobs", "seams", "bleeding", "oversharpening", "checkerboard", "broken")
UNSEEN = ("ghost", "grain", "smear", "holes", "streaks", "blocks")
CORRUPTIONS: dict[str, Callable[[np.ndarray, Rng, float], np.ndarray]] = {
    "blobs": blobs,
    "seams": seams,
    "bleeding": bleeding,
    "oversharpening": oversharpening,
    "checkerboard": checkerboard,
    "broken": broken,
    "ghost": ghost,
    "grain": grain,
    "smear": smear,
    "holes": holes,
    "streaks": streaks,
    "blocks": blocks,
}


def _unit(picture: np.ndarray) -> float:
    """Pixels of this picture for one of a 64 x 64 picture."""
    return len(picture) / CANVAS


def _place(picture: np.ndarray, rng: Rng) -> tuple[int, int]:
    """Row and column of a place near an edge of something; anywhere where there is nothing."""
    edges = sum(ndimage.sobel(picture.mean(-1), axis) ** 2 for axis in (0, 1)).ravel()
    edges = edges + 1e-6 + 1e-3 * edges.max()
    place = rng.choice(len(edges), p=edges / edges.sum())
    return int(place // len(picture)), int(place % len(picture))


def _polar(picture: np.ndarray, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance and direction of every pixel from a place, [S, S] each."""
    y, x = np.indices(picture.shape[:2]) - np.array([row, column])[:, None, None]
    return np.hypot(x, y), np.arctan2(y, x)


def _window(picture: np.ndarray, rng: Rng, low: float, high: float) -> np.ndarray:
    """1 inside a rectangle around a place, else 0; its sides are `low` to `high` of the picture's."""
    row, column = _place(picture, rng)
    height, width = rng.uniform(low, high, 2) * len(picture)
    y, x = np.indices(picture.shape[:2])
    inside: np.ndarray = (np.abs(y - row) <= height / 2) & (np.abs(x - column) <= width / 2)
    return inside.astype(np.float64)
