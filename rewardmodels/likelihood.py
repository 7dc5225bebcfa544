"""How likely the right answers are to a reader of the caption: rewards without a verifier.

With l_1 ... l_L the log-probabilities of the tokens of an answer after the caption, the measures are

    log_prob        sum_l l_l                  (arXiv:2602.03979)
    mean_log_prob   1/L sum_l l_l
    prob            exp(sum_l l_l)             (VeriFree, arXiv:2505.21493)
    geometric       exp(1/L sum_l l_l)         (IGPO, arXiv:2510.14967)
    mean_prob       1/L sum_l exp(l_l)         (RLPR, arXiv:2506.18254)

each averaged over the answers. The reader is frozen, so no gradient flows through the reward, and a caption
cannot be made likely by changing the reader.

By sentence (`grain: sentence`) a unit is what a sentence adds: the measure after it less that before it,
starting from no caption at all. The gains of a caption add up to its measure less that of no caption; the
algorithm `igpo` gives them to the words of their sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from mmalign.records import Outcome, RewardSignal, Spans, Unit
from mmalign.rewardmodels.caprl import questions_of
from mmalign.rewardmodels.caption_judges import captions
from mmalign.rewardmodels.inputs import extras, texts
from mmalign.rewardmodels.readers import LAB, Told, load_reader

Measure = Literal["log_prob", "mean_log_prob", "prob", "geometric", "mean_prob"]
MEASURES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "log_prob": lambda log_p: log_p.sum(),
    "mean_log_prob": lambda log_p: log_p.mean(),
    "prob": lambda log_p: log_p.sum().exp(),
    "geometric": lambda log_p: log_p.mean().exp(),
    "mean_prob": lambda log_p: log_p.exp().mean(),
}
_SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|$)|\n|$)", re.S)


@dataclass(eq=False)
class Likelihood:
    """How likely a frozen text-only reader of the caption finds what is right."""

    reader: str = LAB  # lab, or a causal language model of transformers: folder or hub id
    target: Literal["answers", "reference"] = "answers"  # to the prompt's questions, or its reference caption
    measure: Measure = "mean_log_prob"  # of an answer's tokens; the logarithms alone tell long answers apart
    # How much more likely than without a caption; of a probability, cut to [0, 1] (RLPR).
    relative: bool = False
    grain: Literal["sample", "sentence"] = "sample"  # sentence: what each sentence adds, at its place
    batch: int = 16  # answers at once that a language model reads
    precision: str = "bf16"  # of a language model: fp32, bf16 or fp16
    name = "likelihood"

    def __post_init__(self) -> None:
        for setting, value, known in (
            ("target", self.target, ("answers", "reference")),
            ("measure", self.measure, get_args(Measure)),
            ("grain", self.grain, ("sample", "sentence")),
        ):
            if value not in known:
                raise ValueError(f"likelihood: {setting} must be one of {', '.join(known)}, got {value!r}")
        self._reader = load_reader(self.reader, self.batch, self.precision)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        written = captions(self.name, outcome)
        wanted = [self._wanted(*row) for row in zip(texts(outcome), extras(outcome), strict=True)]
        if self.grain == "sentence":
            return self._gains(written, wanted)
        values = self._measured(list(zip(written, wanted, strict=True)))
        if self.relative:
            without = self._measured([("", targets) for targets in wanted])
            values = values - without
            values = values if self.measure.endswith("log_prob") else values.clamp(0, 1)
        return RewardSignal(self.name, values[:, None])

    def _gains(self, written: Sequence[str], wanted: Sequence[tuple[Told, ...]]) -> RewardSignal:
        """What each sentence adds, [B, U], and where it stands."""
        places = [sentences(text) for text in written]
        prefixes = [
            (text[:end], targets)
            for text, found, targets in zip(written, places, wanted, strict=True)
            for end in [0, *(end for _, end in found)]
        ]
        measured = torch.split(self._measured(prefixes), [len(found) + 1 for found in places])
        units = max(1, *map(len, places))
        values = torch.full((len(places), units), torch.nan)
        start, end = torch.zeros(2, len(places), units, dtype=torch.int64)
        for row, (found, after) in enumerate(zip(places, measured, strict=True)):
            values[row, : len(found)] = after.diff()
            if found:
                start[row, : len(found)], end[row, : len(found)] = torch.tensor(found).T
        details: list[Mapping[str, object]] = [
            {"reached": after[-1].item(), "sentences": len(found)}
            for after, found in zip(measured, places, strict=True)
        ]
        return RewardSignal(self.name, values, Unit.CLAIM, where=Spans(start, end), details=details)

    def _wanted(self, prompt: str, extra: Mapping[str, object]) -> tuple[Told, ...]:
        """What a reader should find likely, without its caption."""
        if self.target == "reference":
            reference = extra.get("reference")
            if not isinstance(reference, str) or not reference.strip():
                raise ValueError(f'likelihood: the prompt {prompt!r} brings no "reference"')
            return (Told("", "", reference),)
        return tuple(
            Told("", question.question, answer, question.choices)
            for question in questions_of(self.name, prompt, extra)
            for answer in question.answers
        )

    def _measured(self, asked: Sequence[tuple[str, tuple[Told, ...]]]) -> Tensor:
        """The measure of each caption, averaged over what it should make likely, [n]; each is asked once."""
        told = [replace(one, caption=caption) for caption, targets in asked for one in targets]
        distinct = list(dict.fromkeys(told))
        known = dict(zip(distinct, self._reader.likelihood(distinct), strict=True))
        measure = MEASURES[self.measure]
        found = torch.stack([measure(known[one].double()) for one in told])
        parts = torch.split(found, [len(targets) for _, targets in asked])
        return torch.stack([part.mean() for part in parts]).float()


def sentences(text: str) -> list[tuple[int, int]]:
    """The characters [start, end) of each sentence of a text."""
    return [found.span() for found in _SENTENCE.finditer(text) if found[0].strip()]
