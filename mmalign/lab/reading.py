"""Pictures to scenes: ink by color, connected pieces, and for every piece the template most like it.

Made for generated pictures: soft edges and slightly wrong colors are read as what they resemble, specks are
left out, and a piece that resembles nothing is a thing of shape "blob" (or color "other"): something extra.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import ndimage

from mmalign.lab.font import GLYPHS, HEIGHT, SPACE, WIDTH, ink
from mmalign.lab.render import distance
from mmalign.lab.scenes import BACKGROUND, CANVAS, COLORS, SHAPES, SIZES, Scene, Thing, Word, size_of

BLOB, OTHER = "blob", "other"
INK = 0.4  # share of a full color from which a pixel is ink
SPECK = 24  # pixels; smaller pieces are dirt. The smallest thing there is, a small star, has about 100
# Cosine between a piece and its template below which it is a blob. Rendered things have 0.99, also blurred.
# Raise it to accept only what is drawn well, lower it for models that draw badly.
LIKENESS = 0.95
RADII = (5.0, 14.5)  # pixels; a thing smaller or larger is a blob
NAMELESS = 0.8  # step away from the background that is full in no color of the lab's
HUE = 0.95  # cosine between a pixel's and a color's step away from the background; below, it is another color

GROUND = np.array(BACKGROUND) / 255
NAMES = (*COLORS, OTHER)
AWAY = np.array(list(COLORS.values())) / 255 - GROUND
LETTER_WIDTH, LETTER_HEIGHT, LETTER_GAP = WIDTH * Word.cell, HEIGHT * Word.cell, SPACE * Word.cell
LINE = 6.0  # pixels by which the heights and levels of letters on one line may differ
VIEW = np.linspace(-1.5, 1.5, 28)  # where a piece is sampled around its center, in square roots of its area


@dataclass(frozen=True)
class Piece:
    """One connected patch of ink: `cover` [64, 64] is the ink of it alone, `pixels` its size by color."""

    pixels: Mapping[str, int]
    cover: np.ndarray
    top: int
    bottom: int
    left: int
    right: int
    parts: tuple["Piece", ...] = ()  # the patches of one color it consists of, if it has several

    @property
    def color(self) -> str:
        """The color of most of it."""
        return max(self.pixels, key=lambda color: self.pixels[color])

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def middle(self) -> float:
        """Its level, half way between top and bottom."""
        return (self.top + self.bottom) / 2

    @property
    def is_line_high(self) -> bool:
        """Whether it is about as high as a letter, with room for blur and bad drawing."""
        return abs(self.bottom - self.top - LETTER_HEIGHT) < LINE


@dataclass(frozen=True)
class Template:
    """What a shape or letter looks like to `sample`; `offset` leads from its centroid to its center."""

    name: str
    radius: float
    area: float
    offset: tuple[float, float]
    view: np.ndarray


@dataclass(frozen=True)
class Reading:
    """The thing and the letter a piece resembles most, and how much (cosines)."""

    piece: Piece
    thing: Thing
    letter: str
    as_letter: float
    as_shape: float


def as_picture(image: Any) -> np.ndarray:
    """A float picture [64, 64, 3] from floats [3, H, W] in [0, 1] or uint8 [H, W, 3], with H = W = k * 64."""
    if hasattr(image, "detach"):  # a torch tensor, without importing torch; numpy has no bfloat16
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    picture = np.asarray(image)
    if picture.ndim == 3 and picture.dtype == np.uint8 and picture.shape[2] == 3:
        picture = picture / 255
    elif picture.ndim == 3 and picture.dtype.kind == "f" and picture.shape[0] == 3:
        picture = picture.transpose(1, 2, 0).astype(np.float64)
        if not np.isfinite(picture).all():
            raise ValueError("read_scene: the picture has NaN or infinite values")
        if picture.min() < -1e-3 or picture.max() > 1 + 1e-3:
            low, high = picture.min(), picture.max()
            raise ValueError(f"read_scene: values must lie in [0, 1], got [{low:.3g}, {high:.3g}]")
    else:
        raise ValueError(
            f"read_scene: expected floats [3, H, W] or uint8 [H, W, 3], got {picture.dtype} {picture.shape}"
        )
    side, other = picture.shape[:2]
    if side != other or side % CANVAS or not side:
        raise ValueError(f"read_scene: side must be a multiple of {CANVAS}, got {side} x {other}")
    step = side // CANVAS
    return picture if step == 1 else picture.reshape(CANVAS, step, CANVAS, step, 3).mean((1, 3))


def read_scene(image: Any) -> Scene:
    """What a picture shows, things ordered from left to right; see `as_picture` for what a picture may be."""
    word, rest = read_word([read(piece) for piece in pieces(as_picture(image))])
    things = []
    for reading in rest:
        things += [read(part).thing for part in reading.piece.parts] or [reading.thing]
    return Scene(tuple(sorted(things, key=lambda thing: (thing.x, thing.y))), word)


def pieces(picture: np.ndarray) -> list[Piece]:
    """The connected patches of ink in a picture [64, 64, 3], specks left out."""
    color, cover = steps(picture)
    return [cut(mask, cover, color) for mask in patches(cover > INK)]


def steps(picture: np.ndarray, ground: np.ndarray = GROUND) -> tuple[np.ndarray, np.ndarray]:
    """Which color each pixel steps toward from the ground, len(COLORS) for none, and how far: [64, 64] each.

    1 is the full color.
    """
    full, moved = AWAY + GROUND - ground, picture - ground
    # Colors are judged on 3 x 3 pixels: mixing with the background keeps the direction, noise averages out.
    calm = ndimage.uniform_filter(moved, (3, 3, 1))
    likeness = calm @ (full / np.linalg.norm(full, axis=1, keepdims=True)).T
    color = likeness.argmax(-1)
    strength = np.linalg.norm(calm, axis=-1)
    color[likeness.max(-1) < HUE * strength] = len(COLORS)
    along = [moved @ (full / (full**2).sum(1, keepdims=True)).T, strength[..., None] / NAMELESS]
    return color, np.take_along_axis(np.concatenate(along, -1), color[..., None], -1)[..., 0]


def patches(ink: np.ndarray) -> Iterator[np.ndarray]:
    """A mask for each connected patch, specks left out; diagonals connect, as noise breaks thin strokes."""
    labels, _ = ndimage.label(ink, np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    yield from (labels == label for label in range(1, len(areas)) if areas[label] >= SPECK)


def cut(mask: np.ndarray, cover: np.ndarray, color: np.ndarray) -> Piece:
    """The piece under a mask with its soft rim, and its parts if several colors are more than specks."""
    areas = np.bincount(color[mask], minlength=len(NAMES))
    parts: list[Piece] = []
    if (areas >= SPECK).sum() > 1:
        masks = [part for k in np.flatnonzero(areas >= SPECK) for part in patches(mask & (color == k))]
        parts = [cut(part, cover * ((color == color[part][0]) | ~mask), color) for part in masks]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return Piece(
        {name: int(area) for name, area in zip(NAMES, areas, strict=True) if area},
        (cover * ndimage.binary_dilation(mask)).clip(0, 1),
        *(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1),
        tuple(parts),
    )


def sample(cover: np.ndarray) -> tuple[np.ndarray, float, tuple[float, float]]:
    """A patch scaled to unit area around its centroid, as a unit vector [28 * 28]; its area and centroid."""
    area = cover.sum()
    places = np.arange(CANVAS) + 0.5
    x, y = (cover.sum(0) @ places) / area, (cover.sum(1) @ places) / area
    across, down = interpolation(x + VIEW * np.sqrt(area)), interpolation(y + VIEW * np.sqrt(area))
    view = (down @ cover @ across.T).ravel()
    return view / np.linalg.norm(view), float(area), (float(x), float(y))


def interpolation(places: np.ndarray) -> np.ndarray:
    """Weights [places, 64] that read a line of pixels at the given places, linearly; 0 outside."""
    away: np.ndarray = np.abs(places[:, None] - (np.arange(CANVAS) + 0.5))
    return (1 - away).clip(0, None)


@cache
def templates() -> tuple[list[Template], np.ndarray]:
    """Every shape and letter in its sizes, sharp and blurred; their views stacked [templates, 28 * 28]."""
    bank = []
    middle = CANVAS / 2
    places = np.arange(CANVAS) + 0.5 - middle
    for blur in (0.0, 0.9, 1.6):
        for shape in SHAPES:
            for low, high in SIZES.values():
                radius = (low + high) / 2
                edge = distance(shape, places[None] / radius, places[:, None] / radius) * radius
                bank.append(_template(shape, radius, (0.5 - edge).clip(0, 1), blur))
        drawn = {letter: ink(Word(letter, "red", middle, middle), CANVAS) for letter in GLYPHS}
        bank += [_template(letter, 0.0, cover, blur) for letter, cover in drawn.items()]
    return bank, np.stack([template.view for template in bank])


def _template(name: str, radius: float, cover: np.ndarray, blur: float) -> Template:
    cover = ndimage.gaussian_filter(cover, blur) if blur else cover
    view, area, (x, y) = sample(cover * ndimage.binary_dilation(cover > INK))
    return Template(name, radius, area, (CANVAS / 2 - x, CANVAS / 2 - y), view)


def read(piece: Piece) -> Reading:
    """What a piece is, taken as a thing and as letters."""
    view, area, (x, y) = sample(piece.cover)
    bank, views = templates()
    likeness = views @ view
    shapes = np.array([template.radius > 0 for template in bank])
    best = int(np.where(shapes, likeness, 0).argmax())
    letter = int(np.where(shapes, 0, likeness).argmax())
    shape, scale = bank[best], np.sqrt(area / bank[best].area)
    radius = shape.radius * scale
    proper = likeness[best] >= LIKENESS and RADII[0] <= radius <= RADII[1]
    thing = Thing(
        shape.name if proper else BLOB,
        piece.color,
        size_of(radius),
        x + shape.offset[0] * scale,
        y + shape.offset[1] * scale,
        radius,
    )
    return Reading(piece, thing, bank[letter].name, float(likeness[letter]), float(likeness[best]))


def read_word(readings: Sequence[Reading]) -> tuple[Word | None, list[Reading]]:
    """The word of a picture, and the readings that are not part of it.

    A word is what stands on one line beside a piece that is certainly writing; there is one. Its color is
    that of most of its ink, as thin strokes are the first to lose theirs.
    """
    spelled = [(r, letters(r)) for r in readings if r.piece.is_line_high]
    written = [(r, text) for r, text in spelled if r.thing.shape == BLOB or is_writing(r, text)]
    lines = [
        [(r, text) for r, text in written if abs(r.piece.middle - start.piece.middle) < LINE]
        for start, text in written
        if is_writing(start, text)
    ]
    if not lines:
        return None, list(readings)
    line = max(lines, key=lambda line: sum(r.piece.width for r, _ in line))
    line.sort(key=lambda part: part[0].piece.left)
    parts = [r.piece for r, _ in line]
    pixels: Counter[str] = sum((Counter(piece.pixels) for piece in parts), Counter())
    color, most = pixels.most_common(1)[0]
    word = Word(
        "".join(letter.letter for _, text in line for letter in text),
        color if 2 * most >= pixels.total() else OTHER,
        (parts[0].left + parts[-1].right) / 2,
        float(np.mean([piece.middle for piece in parts])),
    )
    return word, [r for r in readings if all(r.piece is not piece for piece in parts)]


def is_writing(reading: Reading, spelled: Sequence[Reading]) -> bool:
    """Whether a piece looks more like the letters it may be cut into than like any shape."""
    return float(np.mean([letter.as_letter for letter in spelled])) > reading.as_shape


def letters(reading: Reading) -> list[Reading]:
    """A piece as letters: one, or as many as fit its width, cut apart."""
    piece = reading.piece
    count = round((piece.width + LETTER_GAP) / (LETTER_WIDTH + LETTER_GAP))
    if count < 2 or (reading.thing.shape != BLOB and not piece.parts):
        return [reading]
    columns = np.arange(CANVAS)
    edges = np.linspace(piece.left, piece.right, count + 1).round()
    cuts = [(columns >= left) & (columns < right) for left, right in pairwise(edges)]
    return [read(replace(piece, cover=piece.cover * cut)) for cut in cuts]
