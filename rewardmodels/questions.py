"""Questions with choices: how a prompt brings them, how they are asked, and how they are turned around."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_VERBS = ["is", "are", "was", "were", "do", "does", "did", "has", "have", "had", "could", "would", "should"]
AUXILIARIES = {**{verb: f"{verb}n't" for verb in _VERBS}, "can": "can't", "will": "won't"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A question with distinct choices, of which at least one is right; `answers` are in their order."""

    question: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("a question must not be empty")
        if len(set(self.choices)) < max(2, len(self.choices)) or len(self.choices) > len(LETTERS):
            raise ValueError(
                f"{self.question!r} needs 2 to {len(LETTERS)} distinct choices, got {list(self.choices)}"
            )
        if not self.answers or not set(self.answers) <= set(self.choices):
            raise ValueError(f"{self.question!r}: {list(self.answers)} are not among {list(self.choices)}")

    @classmethod
    def read(cls, row: object) -> Question:
        """From `{"question", "choices", "answer"}`, or "answers" where several are right."""
        if not isinstance(row, Mapping) or not {"question", "choices"} <= row.keys():
            raise ValueError(f'a question is {{"question", "choices", "answer"}}, got {str(row)[:80]}')
        right: Any = row.get("answers", [row["answer"]] if "answer" in row else [])
        choices = tuple(str(choice) for choice in row["choices"])
        right = {str(answer) for answer in right}
        if lost := right - set(choices):
            raise ValueError(f"{row['question']!r}: {sorted(lost)} are not among {list(choices)}")
        return cls(str(row["question"]), choices, tuple(choice for choice in choices if choice in right))


def ask(question: str, choices: Sequence[str]) -> str:
    """The question with its choices, each after a letter, as a text model is asked it."""
    return "\n".join(
        [question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))]
    )


def negated(question: str) -> str | None:
    """The question that asks for the opposite: its first auxiliary verb is negated; None where there is none.

    A verb that is negated already loses its negation.
    """
    for found in re.finditer(r"\b[a-z]+(?:['’]t)?", question, re.I):
        word = found[0].lower().replace("’", "'")
        other = AUXILIARIES.get(word) or next((v for v, no in AUXILIARIES.items() if no == word), None)
        if other is not None:
            said = other.capitalize() if found[0][0].isupper() else other
            return question[: found.start()] + said + question[found.end() :]
    return None


def inverted(question: Question, rng: random.Random) -> Question | None:
    """TW-GRPO's question-answer inversion (arXiv:2505.24718): the wrong choices become the right ones.

    A random number of them stays, at least one, beside all that were right; None where the question has no
    auxiliary verb or no wrong choice.
    """
    text = negated(question.question)
    wrong = [choice for choice in question.choices if choice not in question.answers]
    if text is None or not wrong:
        return None
    kept = set(rng.sample(wrong, rng.randint(1, len(wrong))))
    choices = tuple(choice for choice in question.choices if choice in kept or choice in question.answers)
    return Question(text, choices, tuple(choice for choice in choices if choice in kept))
