"""Questions about pictures that a picture answers and that nothing else does (CapRL, arXiv:2509.22647).

Each question is asked several times, its choices turned by one place each time so that no place pays, once
about its picture and once about a gray one. It is kept if it is answered rightly more often than `seen` with
its picture and less often than `blind` without.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmalign.config import ConfigError
from mmalign.contracts import Writes
from mmalign.evaluation import batches, is_right, listed
from mmalign.records import Prompts

GRAY, SIDE = (128, 128, 128), 64


@dataclass(frozen=True)
class Filter:
    """What is kept: the paper's limits, and how often each question is asked."""

    seen: float = 0.75
    blind: float = 0.25
    tries: int = 4

    def __post_init__(self) -> None:
        if not (0 <= self.seen <= 1 and 0 <= self.blind <= 1) or self.tries < 1:
            raise ConfigError(
                f"--seen and --blind are shares and --tries at least 1, got {self.seen}, {self.blind}, "
                f"{self.tries}"
            )

    def keeps(self, with_picture: float, without: float) -> bool:
        return with_picture > self.seen and without < self.blind


@dataclass(frozen=True)
class Asked:
    """A question of a line, and the shares of the tries in which it was answered rightly."""

    line: int
    place: int
    seen: float
    blind: float


def ask(
    policy: Writes,
    rows: Sequence[Mapping[str, Any]],
    settings: Filter,
    batch: int = 32,
    progress: Callable[[Iterator[int], int], Iterator[int]] = lambda done, count: done,
) -> list[Asked]:
    """Ask the policy every question of the rows, each with `image` (a path) and `questions`."""
    with tempfile.TemporaryDirectory() as folder:
        gray = str(Path(folder) / "gray.png")
        Image.new("RGB", (SIDE, SIDE), GRAY).save(gray)
        put: list[tuple[int, int, str, str, Mapping[str, Any]]] = []
        for line, row in enumerate(rows):
            for place, question in enumerate(row["questions"]):
                for turn in range(settings.tries):
                    choices = turned(question["choices"], turn)
                    text = f"{question['question']} {listed(choices)}?"
                    put += [(line, place, text, image, question) for image in (str(row["image"]), gray)]
        said: list[str] = []
        parts = batches(len(put), batch)
        for index in progress(iter(range(len(parts))), len(parts)):
            chosen = parts[index].tolist()
            prompts = Prompts(
                [put[i][2] for i in chosen],
                torch.tensor(chosen),
                torch.zeros(len(chosen), dtype=torch.int64),
                [{**rows[put[i][0]], "image": put[i][3]} for i in chosen],
            )
            said += policy.texts(prompts, (0, "filter"))
    right: dict[tuple[int, int, bool], int] = {}
    for text, (line, place, _, image, question) in zip(said, put, strict=True):
        key = (line, place, image != gray)
        right[key] = right.get(key, 0) + is_right(text, question["choices"], question["answer"])
    return [
        Asked(
            line, place, right[line, place, True] / settings.tries, right[line, place, False] / settings.tries
        )
        for line, row in enumerate(rows)
        for place in range(len(row["questions"]))
    ]


def turned(choices: Sequence[str], by: int) -> list[str]:
    """The choices with their first `by` at the end."""
    by %= len(choices)
    return [*choices[by:], *choices[:by]]


def read_rows(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of a prompt file as they are, and with the paths of their pictures from where we are.

    Raises ConfigError with the line that has no picture or no questions.
    """
    if not file.is_file():
        raise ConfigError(f"--questions: there is no file {file}")
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            whole = [q["question"] and q["answer"] in q["choices"] for q in row["questions"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}, line {number}: has no questions to filter ({error!r})") from error
        if not isinstance(row.get("image"), str) or not whole or not all(whole):
            raise ConfigError(
                f"{file}, line {number}: needs an image, and questions whose answer is among their choices"
            )
        rows.append(row)
    return rows, [{**row, "image": str(file.parent / row["image"])} for row in rows]


def kept(rows: Sequence[Mapping[str, Any]], asked: Sequence[Asked], settings: Filter) -> list[dict[str, Any]]:
    """The lines with the questions that are kept, each with its shares; lines without any are left out."""
    out = []
    for line, row in enumerate(rows):
        questions = [
            {**row["questions"][one.place], "seen": one.seen, "blind": one.blind}
            for one in asked
            if one.line == line and settings.keeps(one.seen, one.blind)
        ]
        if questions:
            out.append({**row, "questions": questions})
    return out


def run(policy: Writes, file: Path, out: Path, settings: Filter, **how: Any) -> tuple[int, int]:
    """Filter a prompt file; gives how many questions were kept, of how many. `out` is written at once."""
    rows, placed = read_rows(file)
    asked = ask(policy, placed, settings, **how)
    found = kept(rows, asked, settings)
    beside = out.with_suffix(".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    beside.replace(out)
    return sum(len(row["questions"]) for row in found), len(asked)
