"""Which of the lab's styles a picture is in, and the same picture as it would be in the plain one.

Both go by color alone: the ground, the dark rims, and how far things step away from the ground toward their
color. So they hold for generated pictures too, whose edges are soft, and for those between two styles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage

from mmalign.lab.reading import AWAY, GROUND, NAMELESS, as_picture, steps
from mmalign.lab.render import LIGHT, NIGHT, PALE
from mmalign.lab.scenes import COLORS

# Styles that can be repainted. Rims of outlined pictures hide the color of thin things, such as small rings.
READABLE = ("plain", "pastel", "night", "striped")

# What brings a style's fullest color to the full one.
GAIN = {"pastel": 1 / PALE, "striped": 1 / (1 - LIGHT)}

DARK = np.array(NIGHT) / 255
INSIDE = 0.25  # share of a full color from which a pixel belongs to a thing of any style
BLACK = 0.5  # every channel below it: a rim; every color has a channel of 0.64 or more
RIMMED = 0.12  # share of the pixels of things that are rims, from which a picture is outlined
UNEVEN = 0.2  # how far light and full places of things lie apart, from which it is striped
FULL = 0.75  # half way between the full colors of plain and the half ones of pastel


def style_of(image: Any) -> str:
    """The style that a picture is in or nearest to; a blank one is plain, or night by its ground.

    image: as for `read_scene`.
    """
    picture = as_picture(image)
    ground = np.median(picture.reshape(-1, 3), axis=0)
    if np.linalg.norm(ground - DARK) < np.linalg.norm(ground - GROUND):
        return "night"
    rims = (picture.max(-1) < BLACK).sum()
    color, cover = steps(picture)
    inside = (cover > INSIDE) & (color < len(COLORS))
    if rims > RIMMED * max(1, inside.sum() + rims):
        return "outlined"
    deep = ndimage.binary_erosion(inside, np.ones((3, 3)))
    shown = cover[deep if deep.sum() > 8 else inside]
    if not len(shown):
        return "plain"
    low, high = np.quantile(shown, [0.2, 0.8])
    if high - low > UNEVEN:
        return "striped"
    return "plain" if high > FULL else "pastel"


def as_plain(image: Any, style: str) -> np.ndarray:
    """A picture [64, 64, 3] of that style repainted in the plain one, so that `read_scene` can read it."""
    picture = as_picture(image)
    if style == "plain":
        return picture
    if style not in READABLE:
        raise ValueError(f"as_plain: style must be one of {', '.join(READABLE)}, got {style!r}")
    color, cover = steps(picture, DARK if style == "night" else GROUND)
    cover = (cover * GAIN.get(style, 1.0)).clip(0, 1)
    full = np.concatenate([AWAY, np.full((1, 3), -NAMELESS / 3**0.5)])
    repainted: np.ndarray = (GROUND + cover[..., None] * full[color]).clip(0, 1)
    return repainted
