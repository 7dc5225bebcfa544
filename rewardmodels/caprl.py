"""CapRL: a caption is worth what a reader can answer from it alone (arXiv:2509.22647, ICLR 2026).

    R = 1/N sum_k [ the reader's choice for the question q_k, its choices shuffled, is right ]

The reader sees the caption and no picture. One more choice says that the caption does not tell, so that
guessing earns nothing. What no question asks for is free, hallucinations among it: watch them beside it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from mmalign.records import Outcome, RewardSignal, Unit
from mmalign.rewardmodels.caption_judges import captions
from mmalign.rewardmodels.inputs import extras, texts
from mmalign.rewardmodels.questions import Question
from mmalign.rewardmodels.readers import LAB, UNKNOWN, Asked, load_reader

Grain = Literal["sample", "criterion"]


@dataclass(eq=False)
class CapRL:
    """The share of questions about the picture that a text-only reader answers rightly from the caption.

    Prompts bring `questions`: [{"question", "choices", "answer"}, ...]. A question that the reader fails on
    is left out of the mean; a caption without any has no verdict.
    """

    reader: str = LAB  # lab, or a causal language model of transformers: folder or hub id
    draws: int = 0  # questions drawn for each caption (paper: 4); 0: all of them, once
    abstain: bool = True  # offer the choice that the caption does not tell
    grain: Grain = "sample"  # criterion: one unit a question, for credit that tells questions apart
    seed: int = 0  # of the draws and of the order of choices
    batch: int = 16  # questions at once that a language model reads
    precision: str = "bf16"  # of a language model: fp32, bf16 or fp16
    name = "caprl"

    def __post_init__(self) -> None:
        if self.grain not in get_args(Grain):
            raise ValueError(f"caprl: grain must be one of {', '.join(get_args(Grain))}, got {self.grain!r}")
        if self.draws < 0 or (self.draws and self.grain == "criterion"):
            raise ValueError(
                f"caprl: draws must be 0 or more, and 0 with grain: criterion (a unit is one question), got "
                f"{self.draws}"
            )
        self._reader = load_reader(self.reader, self.batch, self.precision)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        drawn = self._draw(outcome)
        asked = [
            Asked(caption, question.question, choices)
            for caption, row in zip(captions(self.name, outcome), drawn, strict=True)
            for question, choices in row
        ]
        answers = iter(self._reader.choose(asked))
        verdicts = [[(question, named(choices, next(answers))) for question, choices in row] for row in drawn]
        units = [[right(question, answer) for question, answer in row] for row in verdicts]
        if self.grain == "criterion":
            values = torch.full((len(units), max(map(len, units))), torch.nan)
            for row, found in zip(values, units, strict=True):
                row[: len(found)] = torch.tensor(found)
            unit = Unit.CRITERION
        else:
            values, unit = torch.tensor(units_mean(units))[:, None], Unit.SAMPLE
        return RewardSignal(self.name, values, unit, details=[detail(row) for row in verdicts])

    def _draw(self, outcome: Outcome) -> list[list[tuple[Question, tuple[str, ...]]]]:
        """The questions for each caption, and their choices shuffled; the same for a sample in any batch."""
        names = zip(outcome.prompts.group.tolist(), outcome.prompts.member.tolist(), strict=True)
        rows = [name for name in names for _ in range(outcome.views)]
        drawn = []
        for extra, prompt, (group, member) in zip(extras(outcome), texts(outcome), rows, strict=True):
            known = questions_of(self.name, prompt, extra)
            rng = random.Random(f"caprl {self.seed} {group} {member}")
            picked = [rng.choice(known) for _ in range(self.draws)] if self.draws else known
            drawn.append([(question, self._offered(question, rng)) for question in picked])
        return drawn

    def _offered(self, question: Question, rng: random.Random) -> tuple[str, ...]:
        choices = [*question.choices, UNKNOWN] if self.abstain else list(question.choices)
        return tuple(rng.sample(choices, len(choices)))


def named(choices: Sequence[str], place: int | None) -> str | None:
    """The choice at a place."""
    return None if place is None else choices[place]


def right(question: Question, answer: str | None) -> float:
    """1 for a right choice, 0 for another; NaN where the reader has no verdict."""
    return torch.nan if answer is None else float(answer in question.answers)


def questions_of(name: str, prompt: str, extra: Mapping[str, object]) -> list[Question]:
    """The questions that a prompt brings, at least one."""
    listed = extra.get("questions")
    if not isinstance(listed, Sequence) or not listed:
        raise ValueError(
            f'{name}: the prompt {prompt!r} brings no "questions", each {{"question", "choices", "answer"}}'
        )
    return [Question.read(row) for row in listed]


def units_mean(units: Sequence[Sequence[float]]) -> list[float]:
    """Mean of each row without NaN; NaN where nothing is left."""
    return torch.tensor([torch.tensor(row).nanmean() for row in units]).tolist()


def detail(row: Sequence[tuple[Question, str | None]]) -> Mapping[str, object]:
    """What the logs are told: how much was answered rightly, and how much the caption did not tell."""
    known = [(question, answer) for question, answer in row if answer is not None]
    if not known:
        return {"unread": 1.0}
    return {
        "accuracy": sum(right(*pair) for pair in known) / len(known),
        "untold": sum(answer == UNKNOWN for _, answer in known) / len(known),
        "unread": 1 - len(known) / len(row),
    }
