"""What lies in each cell of a scene: the coarse truth that pretraining lets a flow model name.

A picture's latent places and the words of its prompt meet nowhere in the flow-matching loss but through the
velocity. Letting the middle of the network also say what each place will show teaches it what words mean many
times earlier (after REPA, Yu et al. 2025, arXiv:2410.06940, with the known truth in place of the features of
another model).
"""

import numpy as np

from mmalign.lab.font import SPACE, WIDTH, word_box
from mmalign.lab.scenes import CANVAS, COLORS, LETTERS, SHAPES, Scene, Thing, Word

KINDS = ("ground", *SHAPES, *LETTERS)
SHADES = ("ground", *COLORS)
REACH = 1.0  # a cell belongs to a thing whose box holds the cell's center, widened by so many pixels


def layout(scene: Scene, side: int) -> np.ndarray:
    """Kind and color of what each of side x side cells shows, uint8 [2, side, side], of KINDS and SHADES."""
    cells = np.zeros((2, side, side), dtype=np.uint8)
    centers = (np.arange(side) + 0.5) * CANVAS / side
    for thing in scene.things:
        down, across = _within(centers, thing.y, thing.extent), _within(centers, thing.x, thing.extent)
        cells[:, down[:, None] & across] = _mark(thing)
    if scene.word:
        _spell(cells, centers, scene.word)
    return cells


def _within(centers: np.ndarray, middle: float, half: float) -> np.ndarray:
    inside: np.ndarray = np.abs(centers - middle) <= half + REACH
    return inside


def _mark(thing: Thing) -> np.ndarray:
    return np.array([[KINDS.index(thing.shape)], [SHADES.index(thing.color)]])


def _spell(cells: np.ndarray, centers: np.ndarray, word: Word) -> None:
    width, height = word_box(word)
    rows = _within(centers, word.y, height / 2)
    place = (centers - (word.x - width / 2)) / ((WIDTH + SPACE) * word.cell)
    for column in np.flatnonzero(_within(centers, word.x, width / 2)):
        letter = word.text[int(np.clip(place[column], 0, len(word.text) - 1))]
        cells[0, rows, column], cells[1, rows, column] = KINDS.index(letter), SHADES.index(word.color)
