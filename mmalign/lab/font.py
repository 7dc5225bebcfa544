"""The lab's letters: five columns by seven rows, every glyph as wide and as high as its box."""

import numpy as np

from mmalign.lab.scenes import Word

COLUMNS, ROWS = 5, 7
SPACE = 0.9  # between two letters, in columns

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
GLYPHS = {
    letter: np.array([[int(dot) for dot in row] for row in rows.split()], dtype=np.float32)
    for letter, rows in _DRAWN.items()
}


def word_box(word: Word) -> tuple[float, float]:
    """Width and height of a drawn word in pixels of the 64 x 64 picture."""
    letters = len(word.text)
    return (letters * COLUMNS + (letters - 1) * SPACE) * word.cell, ROWS * word.cell


def coverage(edges: np.ndarray, pixels: int) -> np.ndarray:
    """Share of every pixel that lies in every strip [n, 2] given by its two edges: [pixels, n]."""
    left = np.arange(pixels)[:, None]
    overlap = np.minimum(edges[:, 1], left + 1) - np.maximum(edges[:, 0], left)
    return overlap.clip(0, 1)


def ink(word: Word, size: int) -> np.ndarray:
    """Coverage [size, size] of every pixel by the strokes of the word, exact for axis-parallel dots."""
    scale = size / 64
    width, height = word_box(word)
    left, top, cell = (word.x - width / 2) * scale, (word.y - height / 2) * scale, word.cell * scale
    steps = np.arange(ROWS)[:, None] + np.array([0, 1])
    down = coverage(top + cell * steps, size)
    total = np.zeros((size, size), dtype=np.float32)
    for place, letter in enumerate(word.text):
        start = left + cell * place * (COLUMNS + SPACE)
        across = coverage(start + cell * (np.arange(COLUMNS)[:, None] + np.array([0, 1])), size)
        total += down @ GLYPHS[letter] @ across.T
    return total.clip(0, 1)
