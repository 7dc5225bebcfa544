"""Captions of a folder of pictures, by a captioner with or without trained weights: a JSON line each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmalign.config import ConfigError
from mmalign.evaluation import batches
from mmalign.pictures import STILLS, stills_in
from mmalign.pipelines.captioner import CaptionPolicy
from mmalign.records import Prompts
from mmalign.subjects import Subject, open_policy
from mmalign.tracking import write_whole

DESCRIBE = "Describe the picture."


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder and of those inside it, sorted; ConfigError where there are none."""
    if not folder.is_dir():
        raise ConfigError(f"--images: there is no folder {folder}")
    found = stills_in(folder)
    if not found:
        raise ConfigError(f"--images: {folder} holds no pictures ({', '.join(STILLS)})")
    return found


def written(out: Path) -> set[tuple[str, int]]:
    """What a file of captions holds already, as (image, seed); a last line that was cut off is taken away."""
    if not out.is_file():
        return set()
    lines = out.read_text(encoding="utf-8").splitlines()
    known: set[tuple[str, int]] = set()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            known.add((row["image"], row["seed"]))
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ConfigError(f"--out: {out}, line {number} is no caption; name another file") from error
            write_whole(out, "".join(f"{kept}\n" for kept in lines[:-1]))
    return known


def caption(
    subject: Subject,
    images: Sequence[Path],
    out: Path,
    prompt: str = DESCRIBE,
    seeds: int = 1,
    batch: int = 32,
    temperature: float | None = None,
    progress: Callable[[Iterator[int], int], Iterator[int]] = lambda done, count: done,
) -> int:
    """Write a line for each picture and seed, and go on where an earlier call ended; gives how many are new.

    temperature: None is the policy's own; near 0 takes the likeliest token.
    """
    policy = open_policy(subject)
    if not isinstance(policy, CaptionPolicy):
        raise ConfigError(f"{subject.policy.model} draws pictures; captions take a captioner")
    if subject.trained is not None:
        policy.load(subject.trained)
    text = policy.text if temperature is None else replace(policy.text, temperature=temperature)
    known = written(out)
    asked = [(n, str(file), seed) for n, file in enumerate(images) for seed in range(seeds)]
    asked = [row for row in asked if row[1:] not in known]
    parts = [[asked[i] for i in rows.tolist()] for rows in batches(len(asked), batch)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as lines:
        for index in progress(iter(range(len(parts))), len(parts)):
            part = parts[index]
            prompts = Prompts(
                [prompt] * len(part),
                torch.tensor([n for n, _, _ in part]),
                torch.tensor([seed for _, _, seed in part]),
                [{"image": file} for _, file, _ in part],
            )
            said = policy.texts(prompts, (0, "caption"), text)
            for (_, file, seed), words in zip(part, said, strict=True):
                row = {"image": file, "seed": seed, "prompt": prompt, "caption": words}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
    return len(asked)
