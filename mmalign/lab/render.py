"""Scenes to pictures, by signed distances: exact places, one pixel of anti-aliasing, nothing random.

A scene can be drawn in several styles. Its things stay where they are, and as large as they are:
pastel: colors half way to the ground. outlined: a dark rim inside each edge. night: a dark ground.
striped: light diagonal stripes across every color.
"""

import numpy as np

from mmalign.lab.font import ink
from mmalign.lab.scenes import BACKGROUND, CANVAS, COLORS, Scene, Thing

STYLES = ("plain", "pastel", "outlined", "night", "striped")
PALE = 0.5  # share of a color's step away from the ground that pastel keeps
OUTLINE, RIM = (36, 36, 40), 1.8  # color and width in canvas pixels of the rim
NIGHT = (30, 32, 54)  # the ground at night
STRIPES, LIGHT = 6.0, 0.55  # canvas pixels from stripe to stripe, how far a stripe goes toward white

RING_MIDDLE, RING_HALF_WIDTH = 0.875, 0.275
FIFTH = 2 * np.pi / 5


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance of places to a shape of radius 1, negative inside; a lower bound beyond corners."""
    edge: np.ndarray
    if shape == "circle":
        edge = np.hypot(x, y) - 1
    elif shape == "ring":
        edge = np.abs(np.hypot(x, y) - RING_MIDDLE) - RING_HALF_WIDTH
    elif shape == "square":
        edge = np.maximum(np.abs(x), np.abs(y)) - 0.9
    elif shape == "triangle":
        # Base 2.4, height 2.15; the slanted sides meet at the apex (0, -1.1).
        edge = np.maximum(y - 1.05, (2.15 * np.abs(x) - 1.2 * (y + 1.1)) / np.hypot(2.15, 1.2))
    elif shape == "cross":
        x, y = np.abs(x), np.abs(y)
        edge = np.maximum(np.maximum(x, y) - 1.15, np.minimum(x, y) - 0.42)
    elif shape == "star":
        # Folded into half a point, the outline leads from the tip by (-u, v) to the notch.
        angle = np.abs((np.arctan2(x, 0.1 - y) + FIFTH / 2) % FIFTH - FIFTH / 2)
        length = np.hypot(x, y - 0.1)
        u, v = 1.3 - 0.58 * np.cos(FIFTH / 2), 0.58 * np.sin(FIFTH / 2)
        edge = ((length * np.cos(angle) - 1.3) * v + length * np.sin(angle) * u) / np.hypot(u, v)
    else:
        raise ValueError(f"distance: {shape!r} is not a shape of the lab")
    return edge


def fill(color: str, style: str, size: int, x: slice, y: slice) -> np.ndarray:
    """What a thing of this color is filled with at the pixels [y, x] of a picture: [h, w, 3]."""
    full = np.array(COLORS[color], dtype=np.float64)
    rows, columns = np.arange(y.start, y.stop), np.arange(x.start, x.stop)
    if style == "pastel":
        full = np.array(BACKGROUND) + PALE * (full - BACKGROUND)
    ink = np.broadcast_to(full, (len(rows), len(columns), 3))
    if style == "striped":
        phase = 2 * np.pi * (rows[:, None] + columns[None, :] + 1) * CANVAS / size / STRIPES
        stripe = (1.5 * np.sin(phase)).clip(-0.5, 0.5) + 0.5
        ink = ink + LIGHT * stripe[..., None] * (255 - ink)
    return ink


def paint(picture: np.ndarray, thing: Thing, style: str = "plain") -> None:
    """Draws a thing over a float picture [size, size, 3], in place."""
    size = picture.shape[0]
    scale = size / CANVAS
    reach = 1.3 * thing.radius + 2
    x0, x1 = (int(np.clip((thing.x + side * reach) * scale, 0, size)) for side in (-1, 1))
    y0, y1 = (int(np.clip((thing.y + side * reach) * scale, 0, size)) for side in (-1, 1))
    x = ((np.arange(x0, x1) + 0.5) / scale - thing.x) / thing.radius
    y = ((np.arange(y0, y1) + 0.5) / scale - thing.y) / thing.radius
    edge = distance(thing.shape, x[None, :], y[:, None]) * thing.radius * scale
    patch = picture[y0:y1, x0:x1]
    if style == "outlined":
        patch += (0.5 - edge).clip(0, 1)[..., None] * (np.array(OUTLINE) - patch)
        edge = edge + RIM * scale
    patch += (0.5 - edge).clip(0, 1)[..., None] * (
        fill(thing.color, style, size, slice(x0, x1), slice(y0, y1)) - patch
    )


def render(scene: Scene, size: int = CANVAS, style: str = "plain") -> np.ndarray:
    """The picture of a scene, uint8 [size, size, 3]; things are drawn in order, the word last."""
    if style not in STYLES:
        raise ValueError(f"render: style must be one of {', '.join(STYLES)}, got {style!r}")
    picture = np.empty((size, size, 3), dtype=np.float64)
    picture[:] = NIGHT if style == "night" else scene.background
    for thing in scene.things:
        paint(picture, thing, style)
    if scene.word is not None:
        cover, everywhere = ink(scene.word, size), slice(0, size)
        if style == "outlined":
            from scipy import ndimage  # heavy, and only written words have such a rim

            width = 2 * round(size / CANVAS) + 1
            rim = ndimage.maximum_filter(cover, width)[..., None]
            picture += rim * (np.array(OUTLINE) - picture)
        picture += cover[..., None] * (fill(scene.word.color, style, size, everywhere, everywhere) - picture)
    return picture.round().clip(0, 255).astype(np.uint8)
