"""Rewards of captions by what a judge finds: claim differences, one rating on the whole, and the lab's facts.

ClaimDiff-RL (Li et al. 2026, arXiv:2605.20278) lists the differences of a caption and a reference, each held
against the picture, and makes a number of the errors (`mmalign.claim_rewards`). The holistic reward is what
the paper argues against: one rating.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from mmalign.claim_rewards import EVEN, MODES, WEIGHTS, decomposed, hedging, tally
from mmalign.claims import Comparison, Difference
from mmalign.records import Outcome, RewardSignal, Spans, Unit
from mmalign.rewardmodels.caption_judges import CaptionJudge, Judged, Recorded, captions, cases, make_judge

Mode = Literal["decomposed", "relative", "relative_raw", "by_verdicts", "linear", "shaped"]
Grain = Literal["caption", "claim"]


@dataclass(frozen=True)
class ClaimDiff:
    """How few errors a caption makes where it differs from its reference, in 0..1; by claim, in -max..0.

    Details hold the weighted errors apart, `hallucinations` and `omissions`, the number of `differences`, how
    many answers of the judge were unreadable, and the claims themselves.
    """

    judge: str = "lab"  # who compares: see `caption_judges.JUDGES`
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the judge
    mode: Mode = "decomposed"  # how errors become a number; relative is the paper's default
    hallucination: float = 1.0  # weight of what is said wrongly; of mode decomposed and of claims
    omission: float = 1.0  # weight of what is left out; likewise
    severity: bool = False  # whether grave errors count more: 1, 1.25 and 1.6
    hedge: bool = False  # whether leaving things open costs
    grain: Grain = "caption"  # claim: a unit for each difference, at the words that make it
    record: str | None = None  # file that answers are kept in, and taken from when the same case comes again
    replay: bool = False  # take answers from that file alone
    name = "claimdiff"

    def __post_init__(self) -> None:
        for setting, value, known in (("mode", self.mode, Mode), ("grain", self.grain, Grain)):
            if value not in get_args(known):
                raise ValueError(
                    f"claimdiff: {setting} must be one of {', '.join(get_args(known))}, got {value!r}"
                )
        if min(self.hallucination, self.omission) < 0 or self.hallucination + self.omission == 0:
            raise ValueError("claimdiff: hallucination and omission must not be negative, nor both 0")
        object.__setattr__(self, "_judge", judge_of(self.judge, self.settings, self.record, self.replay))

    def __call__(self, outcome: Outcome) -> RewardSignal:
        judge: CaptionJudge = self._judge  # type: ignore[attr-defined]
        asked = cases(self.name, outcome, judge.needs)
        found = judge.compare(asked)
        details = [self._detail(judged) for judged in found]
        if self.grain == "claim":
            return self._by_claim([case.caption for case in asked], found, details)
        values = [
            sum(self.value(look, case.caption) for look in judged.looks) / len(judged.looks)
            if judged.looks
            else torch.nan
            for case, judged in zip(asked, found, strict=True)
        ]
        return RewardSignal(self.name, torch.tensor(values)[:, None], details=details)

    def value(self, comparison: Comparison, caption: str) -> float:
        """One number for a comparison, in 0..1."""
        numbers = tally(comparison, self._weights)
        if self.mode == "decomposed":
            value = decomposed(numbers, self.hallucination, self.omission)
        else:
            value = MODES[self.mode](numbers)
        return value * hedging(caption) if self.hedge else value

    def cost(self, difference: Difference) -> float:
        """What one difference says of the caption: 0, or less for an error of it."""
        fault = difference.error_a
        if fault is None:
            return 0.0
        weight = self.omission if fault.omission else self.hallucination
        return -weight * self._weights[fault.severity] / max(self._weights.values())

    @property
    def _weights(self) -> Mapping[int, float]:
        return WEIGHTS if self.severity else EVEN

    def _by_claim(
        self, texts: Sequence[str], found: Sequence[Judged], details: list[Mapping[str, object]]
    ) -> RewardSignal:
        """A unit a difference of the first look; what is left out or has no words speaks of the whole.

        A caption without any difference has one unit of value 0.
        """
        rows: list[list[tuple[float, int, int]]] = []
        for text, judged in zip(texts, found, strict=True):
            row: list[tuple[float, int, int]] = []
            if judged.looks:
                for difference in judged.looks[0].placed(text).differences:
                    silent = difference.error_a is not None and difference.error_a.omission
                    span = None if silent else difference.span
                    row.append((self.cost(difference), *(span or (0, len(text)))))
                row = row or [(0.0, 0, len(text))]
            rows.append(row)
        units = torch.full((len(rows), max(1, *map(len, rows)), 3), torch.nan)
        for filled, row in zip(units, rows, strict=True):
            if row:
                filled[: len(row)] = torch.tensor(row)
        place = units[..., 1:].nan_to_num().long()
        where = Spans(place[..., 0], place[..., 1])
        return RewardSignal(self.name, units[..., 0], Unit.CLAIM, where=where, details=details)

    def _detail(self, judged: Judged) -> Mapping[str, object]:
        if not judged.looks:
            return {"missing": judged.problem}
        numbers = [tally(look, self._weights) for look in judged.looks]
        first = judged.looks[0]
        return {
            "hallucinations": sum(found.false_a for found in numbers) / len(numbers),
            "omissions": sum(found.omitted_a for found in numbers) / len(numbers),
            "differences": sum(found.differences for found in numbers) / len(numbers),
            "malformed": sum(look.malformed for look in judged.looks),
            "claims": [said(difference) for difference in first.differences],
        }


@dataclass(frozen=True)
class Holistic:
    """One rating of a caption on the whole, in 0..1; the baseline that ClaimDiff-RL argues against."""

    judge: str = "lab"  # who rates: see `caption_judges.JUDGES`
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the judge
    record: str | None = None  # file that answers are kept in, and taken from when the same case comes again
    replay: bool = False  # take answers from that file alone
    name = "holistic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "_judge", judge_of(self.judge, self.settings, self.record, self.replay))

    def __call__(self, outcome: Outcome) -> RewardSignal:
        judge: CaptionJudge = self._judge  # type: ignore[attr-defined]
        found = judge.rate(cases(self.name, outcome, judge.needs))
        values = [torch.nan if isinstance(rating, str) else rating / 10 for rating in found]
        details: list[Mapping[str, object]] = [
            {"missing": rating} if isinstance(rating, str) else {} for rating in found
        ]
        return RewardSignal(self.name, torch.tensor(values)[:, None], details=details)


@dataclass(frozen=True)
class CaptionLength:
    """Words of a caption by `most`: 1 at that length, falling to 0 for none or twice as many."""

    most: int = 40  # words
    name = "caption_length"

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"caption_length: most must be at least 1 word, got {self.most}")

    def __call__(self, outcome: Outcome) -> RewardSignal:
        words = torch.tensor([float(len(text.split())) for text in captions(self.name, outcome)])
        return RewardSignal(self.name, (1 - (words / self.most - 1).abs()).clamp(0, 1)[:, None])


def said(difference: Difference) -> Mapping[str, object]:
    """A difference as logs and pages tell it."""
    fault = difference.error_a
    return {
        "aspect": difference.aspect,
        "said": difference.claim_a,
        "reference": difference.claim_b,
        "judgment": difference.judgment,
        "error": fault.type if fault else None,
        "severity": fault.severity if fault else None,
        "span": difference.span,
    }


def judge_of(judge: str, settings: Mapping[str, Any], record: str | None, replay: bool) -> CaptionJudge:
    """The judge of that name; with `record`, one that keeps its answers."""
    if replay and record is None:
        raise ValueError("replay takes answers from a file: name it as `record`")
    made = make_judge(judge, settings)
    return made if record is None else Recorded(made, record, replay)
