"""Whether a picture spells the text that its prompt quotes, as in Flow-GRPO (arXiv:2505.05470).

    reward = 1 - min(edits, n) / n      edits between what is read and what is asked, of n letters

Letters are compared without case and spaces. What is read is joined from top to bottom, and the part of it
that is closest counts, so that other writing in the picture does no harm.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.inputs import pictures, texts

QUOTED = re.compile(r"[\"“”]([^\"“”]+)[\"“”]")
Reader = Callable[[Tensor], str]  # a picture [3, H, W] in [0, 1] to what is written there


@dataclass(eq=False)
class OcrAccuracy:
    """How well the quoted text of the prompt can be read in the picture, 0 to 1; pip install 'mmalign[ocr]'.

    A prompt without a quoted text has no verdict.
    """

    smallest: int = 256  # pixels of the shorter side that small pictures are made larger to; readers need it
    name = "ocr"
    reader: str | None = (
        None  # path of a function of your own, my_pkg.my_file:read; null: PP-OCRv4 by rapidocr
    )

    def __post_init__(self) -> None:
        if self.smallest < 1:
            raise ValueError(f"ocr: smallest must be at least 1 pixel, got {self.smallest}")
        self._read = named_reader(self.reader) if self.reader else rapid_reader()

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        images = pictures(self.name, outcome, "cpu")
        values: list[float] = []
        details: list[dict[str, object]] = []
        for image, prompt in zip(images, texts(outcome), strict=True):
            wanted = " ".join(QUOTED.findall(prompt))
            if not plain(wanted):
                values.append(torch.nan)
                details.append({"missing": "the prompt quotes no text"})
                continue
            found = self._read(self._enlarged(image))
            values.append(accuracy(found, wanted))
            details.append({"read": found})
        return RewardSignal(self.name, torch.tensor(values)[:, None], details=list(details))

    def _enlarged(self, image: Tensor) -> Tensor:
        factor = -(-self.smallest // min(image.shape[-2:]))
        return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2) if factor > 1 else image


def named_reader(path: str) -> Reader:
    """The function at `module:name`: from a picture [3, H, W] in [0, 1] to what is written there."""
    module, _, name = path.partition(":")
    try:
        reader: Reader = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"ocr: reader must be a path like my_pkg.my_file:read, got {path!r}: {error}"
        ) from None
    return reader


def rapid_reader() -> Reader:
    """Reads with PP-OCRv4, whose weights lie inside the package."""
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError:
        raise ImportError("ocr needs rapidocr: pip install 'mmalign[ocr]'") from None
    engine: Any = RapidOCR()

    def read(image: Tensor) -> str:
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        found, _ = engine(np.ascontiguousarray(pixels[:, :, ::-1]))
        return " ".join(line[1] for line in found or [])

    return read


def plain(text: str) -> str:
    """Letters and digits alone, in lower case."""
    return "".join(letter for letter in text.lower() if letter.isalnum())


def accuracy(found: str, wanted: str) -> float:
    """1 less the edits between the wanted text and the closest part of what was found, by its length."""
    asked, read = plain(wanted), plain(found)
    return 1 - min(closest(asked, read), len(asked)) / len(asked)


def closest(wanted: str, found: str) -> int:
    """Insertions, deletions and exchanges that make `wanted` of some part of `found` (Sellers 1980)."""
    row = [0] * (len(found) + 1)
    for i, letter in enumerate(wanted, 1):
        before, row = row, [i] + [0] * len(found)
        for j, other in enumerate(found, 1):
            row[j] = min(before[j - 1] + (letter != other), before[j] + 1, row[j - 1] + 1)
    return min(row)
