"""The soft reward of TW-GRPO for questions with several right answers (arXiv:2505.24718).

    R = |Y^| / |Y|   if Y^ is a subset of Y,   else 0;        plus `format` times whether it is well-formed

Y^: what the text chooses, Y: the right choices. One wrong choice earns nothing, so that naming all of them
does not pay; one that is sure earns its share, so a policy may learn to say too little.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.caption_judges import captions
from mmalign.rewardmodels.inputs import extras, texts
from mmalign.rewardmodels.questions import LETTERS, Question

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.S | re.I)
_WELL_FORMED = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.S | re.I)
_LISTED = re.compile(r"[,;/\n]|\band\b|\bor\b")


@dataclass(frozen=True)
class Choices:
    """Which choices a text names, held against the right ones, from 0 to 1.

    The prompt is the question, and its line brings "choices" and "answer", or "answers" if several are right.
    """

    format: float = 0.0  # reward of <think>...</think><answer>...</answer>; the paper has 1
    name = "choices"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        values: list[float] = []
        details: list[Mapping[str, object]] = []
        rows = zip(captions(self.name, outcome), texts(outcome), extras(outcome), strict=True)
        for text, prompt, extra in rows:
            question = Question.read({"question": prompt, **extra})
            named = chosen(text, question.choices)
            soft = soft_share(named, set(question.answers))
            form = float(_WELL_FORMED.fullmatch(text) is not None)
            values.append(soft + self.format * form)
            exact = float(named == set(question.answers))
            detail = {"soft": soft, "exact": exact, "named": len(named)}
            details.append(detail | ({"format": form} if self.format else {}))
        return RewardSignal(self.name, torch.tensor(values)[:, None], details=details)


def soft_share(named: set[str], right: set[str]) -> float:
    """|Y^| / |Y| where nothing is wrong, else 0."""
    return len(named) / len(right) if named <= right else 0.0


def chosen(text: str, choices: tuple[str, ...]) -> set[str]:
    """What a text chooses: the choices or their letters in its list, and whatever else stands there.

    The list is what <answer> holds, or else the whole text.
    """
    tagged = _TAGGED.search(text)
    left, found = (tagged[1] if tagged else text), set()
    for choice in sorted(choices, key=len, reverse=True):
        left, times = re.subn(rf"(?<!\w){re.escape(choice)}(?!\w)", ",", left, flags=re.I)
        if times:
            found.add(choice)
    labels = dict(zip(LETTERS, choices, strict=False))
    for item in _LISTED.split(left):
        if plain := item.strip(" .:()\"'"):
            found.add(labels.get(plain.upper(), plain))
    return found
