"""Prompt files to prompts: the same global batch for any number of ranks, and no position to remember."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmalign.pictures import missing, missing_video
from mmalign.randomness import generator
from mmalign.records import Prompts


class PromptError(ValueError):
    """Prompts that cannot be trained on; the message says where and what would be right."""


@dataclass(frozen=True)
class PromptSettings:
    """Which prompts are trained on, and how many at a time."""

    file: str  # training prompts: .txt, one a line, or .jsonl with a "prompt" and whatever else rewards need
    heldout_file: str | None = None  # prompts for evaluation only
    per_iteration: int = 48  # distinct prompts per iteration; more make steadier updates, fewer faster ones
    # Samples per prompt; below 12 the comparison inside a group gets noisy. 1 where nothing is compared (sft)
    group: int = 24

    def __post_init__(self) -> None:
        if self.group < 1:
            raise PromptError(f"prompts.group must be at least 1, got {self.group}")
        if self.per_iteration < 1:
            raise PromptError(f"prompts.per_iteration must be at least 1, got {self.per_iteration}")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    members: where the samples of the prompt are given, what is known of each beyond `extra`.
    """

    text: str
    extra: Mapping[str, object] = field(default_factory=dict)
    members: tuple[Mapping[str, object], ...] = ()


def read_prompts(file: Path | str) -> list[Prompt]:
    """The prompts of a .txt file, one a line, or of a .jsonl file, one object with a "prompt" a line.

    An object may name a picture under "image", by its path from the folder of the file; a member of a zip is
    `images.zip/0001.png`. A "video" is named likewise: a folder of frames (with "fps"), a file, or a list of
    frames. An object with "chosen" and "rejected" is a pair of pictures, named likewise.
    """
    path = Path(file)
    if path.suffix not in (".txt", ".jsonl"):
        raise PromptError(
            f"{path}: prompts come in .txt or .jsonl, not {path.suffix or 'a file without an ending'!r}"
        )
    if not path.is_file():
        raise PromptError(f"{path}: there is no such prompt file")
    lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    if lines == [""]:
        raise PromptError(f"{path}: the file holds no prompts")
    read = _from_json if path.suffix == ".jsonl" else _from_text
    prompts = [read(line.strip(), f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    found = [_paired(prompt, path, number) for number, prompt in enumerate(prompts, 1)]
    return [_pictured(prompt, path, number) for number, prompt in enumerate(found, 1)]


def _pictured(prompt: Prompt, path: Path, number: int) -> Prompt:
    """A prompt with the whole paths of the pictures that its line names from the folder of the file.

    image, video: what is asked about; a video is a folder, a file, or a list of frames.
    source: one or several to edit, to begin a video with, or to refer to. reference_image: what its subject
    looks like; several for rewards that take several.
    """
    extra = dict(prompt.extra)
    for key in ("image", "source", "reference_image"):
        named = extra.get(key)
        files = [named] if isinstance(named, str) else None if key == "image" else named
        if not isinstance(files, list):
            continue
        whole = [str(path.parent / str(file)) for file in files]
        for reason in filter(None, map(missing, whole)):
            raise PromptError(f"{path}, line {number}: {reason}")
        extra[key] = whole[0] if isinstance(named, str) else whole
    video = extra.get("video")
    if isinstance(video, str | list) and video:
        frames = None if isinstance(video, str) else [str(path.parent / str(frame)) for frame in video]
        place = str(path.parent / str(video)) if frames is None else frames
        lacking = missing_video(place)
        if lacking is not None:
            raise PromptError(f"{path}, line {number}: {lacking}")
        extra["video"] = place
    return Prompt(prompt.text, extra, prompt.members)


def _paired(prompt: Prompt, path: Path, number: int) -> Prompt:
    """A prompt whose line names a chosen and a rejected picture, with both as its members."""
    extra = dict(prompt.extra)
    named = [extra.pop(side, None) for side in ("chosen", "rejected")]
    if named == [None, None]:
        return prompt
    members = []
    for name, preferred in zip(named, (1.0, 0.0), strict=True):
        file = path.parent / str(name)
        if not file.is_file():
            raise PromptError(f"{path}, line {number}: there is no picture {name!r} beside the file")
        members.append({"image": str(file), "preferred": preferred})
    return Prompt(prompt.text, extra, tuple(members))


def _from_text(line: str, place: str) -> Prompt:
    if not line:
        raise PromptError(f"{place}: the prompt is empty")
    return Prompt(line)


def _from_json(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line) if line else {"prompt": ""}
    except json.JSONDecodeError as error:
        raise PromptError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise PromptError(f'{place}: each line must be an object with a text under "prompt", got {line[:80]}')
    if not row["prompt"].strip():
        raise PromptError(f"{place}: the prompt is empty")
    return Prompt(row["prompt"].strip(), {key: value for key, value in row.items() if key != "prompt"})


def _known(prompt: Prompt, member: int) -> Mapping[str, object]:
    """What is known of one sample of a prompt."""
    return {**prompt.extra, **prompt.members[member]} if prompt.members else prompt.extra


class PromptSource:
    """Groups of prompts by iteration: a function of (seed, iteration) alone, however many ranks share the
    work.

    Prompts are shuffled anew in every epoch; an epoch is as many whole iterations as the file allows, so that
    no iteration sees a prompt twice. Group numbers go on counting: iteration * per_iteration + index.
    """

    def __init__(self, prompts: Sequence[Prompt], per_iteration: int, group: int, seed: int) -> None:
        if len(prompts) < per_iteration:
            raise PromptError(
                f"prompts.per_iteration asks for {per_iteration} distinct prompts, there are {len(prompts)}"
            )
        for prompt in prompts:
            if len(prompt.members) not in (0, group):
                raise PromptError(
                    f"prompts.group must be {len(prompt.members)}, as many as the prompt {prompt.text!r} has "
                    f"given samples, got {group}"
                )
        self.prompts, self.per_iteration, self.group, self.seed = list(prompts), per_iteration, group, seed

    @classmethod
    def read(cls, settings: PromptSettings, seed: int) -> PromptSource:
        """The source over the training file of the settings."""
        return cls(read_prompts(settings.file), settings.per_iteration, settings.group, seed)

    def check_split(self, world: int) -> None:
        """Whether each of `world` ranks gets whole groups, or else an equal part of every group."""
        if self.per_iteration % world and self.group % world:
            raise PromptError(
                f"{self.per_iteration} groups of {self.group} cannot be split evenly over {world} processes: "
                f"prompts.per_iteration or prompts.group must be a multiple of {world}"
            )

    def at(self, iteration: int, rank: int = 0, world: int = 1) -> Prompts:
        """What `rank` samples: whole groups if they can be dealt out evenly, else a part of each."""
        self.check_split(world)
        chosen = self._chosen(iteration)
        indices = list(range(self.per_iteration))
        members = list(range(self.group))
        if self.per_iteration % world == 0:
            indices = indices[rank::world]
        else:
            members = members[rank * self.group // world : (rank + 1) * self.group // world]
        rows = [(index, member) for index in indices for member in members]
        first = iteration * self.per_iteration
        return Prompts(
            [chosen[index].text for index, _ in rows],
            torch.tensor([first + index for index, _ in rows], dtype=torch.int64),
            torch.tensor([member for _, member in rows], dtype=torch.int64),
            [_known(chosen[index], member) for index, member in rows],
        )

    def _chosen(self, iteration: int) -> list[Prompt]:
        epoch, place = divmod(iteration, len(self.prompts) // self.per_iteration)
        order = torch.randperm(len(self.prompts), generator=generator(self.seed, "prompts", epoch)).tolist()
        first = place * self.per_iteration
        return [self.prompts[i] for i in order[first : first + self.per_iteration]]
