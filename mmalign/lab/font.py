"""The lab's letters: five columns by seven rows of dots, every glyph as wide and as high as its box."""

import numpy as np

from mmalign.lab.scenes import CANVAS, Word

COLUMNS, ROWS = 5, 7
FINE = 8  # points per dot and side that glyphs are drawn with
BOLD = 1  # points a stroke is thickened by on every side, so that diagonals hold together
WIDTH, HEIGHT = COLUMNS + 2 * BOLD / FINE, ROWS + 2 * BOLD / FINE  # of a letter, in dots
SPACE = 0.95  # between two letters, in dots

_DRAWN = {
    "a": "01110 10001 10001 11111 10001 10001 10001",
    "c": "01111 10000 10000 10000 10000 10000 01111",
    "e": "11111 10000 10000 11110 10000 10000 11111",
    "h": "10001 10001 10001 11111 10001 10001 10001",
    "l": "10000 10000 10000 10000 10000 10000 11111",
    "n": "10001 11001 11001 10101 10011 10011 10001",
    "o": "01110 10001 10001 10001 10001 10001 01110",
    "p": "11110 10001 10001 11110 10000 10000 10000",
    "r": "11110 10001 10001 11110 10100 10010 10001",
    "s": "01111 10000 10000 01110 00001 00001 11110",
    "t": "11111 00100 00100 00100 00100 00100 00100",
    "u": "10001 10001 10001 10001 10001 10001 01110",
}


def _drawn(rows: str) -> np.ndarray:
    dots = np.array([[dot == "1" for dot in row] for row in rows.split()])
    points = np.pad(dots.repeat(FINE, axis=0).repeat(FINE, axis=1), 2 * BOLD)
    around = np.lib.stride_tricks.sliding_window_view(points, (2 * BOLD + 1, 2 * BOLD + 1))
    return np.asarray(around.any(axis=(2, 3)), dtype=np.float32)


GLYPHS = {letter: _drawn(rows) for letter, rows in _DRAWN.items()}


def word_box(word: Word) -> tuple[float, float]:
    """Width and height of a drawn word in pixels of the 64 x 64 picture."""
    letters = len(word.text)
    return (letters * WIDTH + (letters - 1) * SPACE) * word.cell, HEIGHT * word.cell


def coverage(start: float, step: float, count: int, pixels: int) -> np.ndarray:
    """Share of every pixel in each of `count` strips of width `step` from `start` on: [pixels, count]."""
    left = np.arange(pixels)[:, None]
    edges = start + step * np.arange(count + 1)
    overlap: np.ndarray = np.minimum(edges[1:], left + 1) - np.maximum(edges[:-1], left)
    return overlap.clip(0)


def ink(word: Word, size: int) -> np.ndarray:
    """Share of every pixel [size, size] that the strokes of the word cover."""
    scale = size / CANVAS
    width, height = word_box(word)
    left, top = (word.x - width / 2) * scale, (word.y - height / 2) * scale
    step, pitch = word.cell * scale / FINE, word.cell * scale * (WIDTH + SPACE)
    total = np.zeros((size, size))
    for place, letter in enumerate(word.text):
        glyph = GLYPHS[letter]
        down = coverage(top, step, glyph.shape[0], size)
        across = coverage(left + place * pitch, step, glyph.shape[1], size)
        total += down @ glyph @ across.T
    return total.clip(0, 1)
