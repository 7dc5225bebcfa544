"""Scenes to pictures, by signed distances: exact places, one pixel of anti-aliasing, nothing random."""

import numpy as np

from mmalign.lab.font import ink
from mmalign.lab.scenes import CANVAS, COLORS, Scene, Thing

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


def paint(picture: np.ndarray, thing: Thing) -> None:
    """Draws a thing over a float picture [size, size, 3], in place."""
    size = picture.shape[0]
    scale = size / CANVAS
    reach = 1.3 * thing.radius + 2
    x0, x1 = (int(np.clip((thing.x + side * reach) * scale, 0, size)) for side in (-1, 1))
    y0, y1 = (int(np.clip((thing.y + side * reach) * scale, 0, size)) for side in (-1, 1))
    x = ((np.arange(x0, x1) + 0.5) / scale - thing.x) / thing.radius
    y = ((np.arange(y0, y1) + 0.5) / scale - thing.y) / thing.radius
    edge = distance(thing.shape, x[None, :], y[:, None]) * thing.radius * scale
    cover = (0.5 - edge).clip(0, 1)[..., None]
    patch = picture[y0:y1, x0:x1]
    patch += cover * (np.array(COLORS[thing.color]) - patch)


def render(scene: Scene, size: int = CANVAS) -> np.ndarray:
    """The picture of a scene, uint8 [size, size, 3]; things are drawn in order, the word last."""
    picture = np.empty((size, size, 3), dtype=np.float64)
    picture[:] = scene.background
    for thing in scene.things:
        paint(picture, thing)
    if scene.word is not None:
        picture += ink(scene.word, size)[..., None] * (np.array(COLORS[scene.word.color]) - picture)
    return picture.round().clip(0, 255).astype(np.uint8)
