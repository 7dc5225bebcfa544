"""From the differences that a judge found to one number: the rewards of ClaimDiff-RL, and one of ours.

Every formula is a function of the same few numbers of a comparison (`Tally`) and gives 0..1, more is better,
as in the paper (Li et al. 2026, arXiv:2605.20278): E is the sum of weighted errors of a side, D the number of
differences, w the largest weight.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mmalign.claims import Comparison, Side

WEIGHTS: Mapping[int, float] = MappingProxyType({1: 1.0, 2: 1.25, 3: 1.6})  # of the severities
EVEN: Mapping[int, float] = MappingProxyType({1: 1.0, 2: 1.0, 3: 1.0})  # where they do not count


@dataclass(frozen=True)
class Tally:
    """What every reward is made of: numbers of one comparison, hallucinations and omissions kept apart.

    differences: D, all entries, also where both are supported. false_x, omitted_x: weighted errors of side x
    that say something wrong, and that leave something out; their sum is the paper's E. wins_x: judgments for
    that side. winner: 1 if A is better on the whole, -1 if B is. heaviest: w.
    """

    differences: int
    false_a: float = 0.0
    omitted_a: float = 0.0
    false_b: float = 0.0
    omitted_b: float = 0.0
    wins_a: int = 0
    wins_b: int = 0
    winner: int = 0
    heaviest: float = 1.0

    @property
    def errors_a(self) -> float:
        return self.false_a + self.omitted_a

    @property
    def errors_b(self) -> float:
        return self.false_b + self.omitted_b


def tally(comparison: Comparison, weights: Mapping[int, float] = EVEN) -> Tally:
    """The numbers of a comparison; weights: of the severities 1, 2 and 3."""

    def total(side: Side, omission: bool) -> float:
        faults = [difference.fault(side) for difference in comparison.differences]
        return sum(weights[f.severity] for f in faults if f is not None and f.omission == omission)

    judged = Counter(difference.judgment for difference in comparison.differences)
    return Tally(
        len(comparison.differences),
        total("A", False),
        total("A", True),
        total("B", False),
        total("B", True),
        judged["A"],
        judged["B"],
        {"A": 1, "B": -1, "Tie": 0}[comparison.winner],
        max(weights.values()),
    )


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def relative(found: Tally) -> float:
    """How much fewer errors A makes than B, by the number of differences; 0.5 without any."""
    x = (found.errors_a - found.errors_b) / (found.heaviest * max(found.differences, 1))
    return 0.5 - 0.5 * clip(x, -1, 1)


def relative_raw(found: Tally) -> float:
    """How many fewer errors A makes than B, up to 10."""
    return 0.5 - 0.05 * clip(found.errors_a - found.errors_b, -10, 10)


def by_verdicts(found: Tally) -> float:
    """How many more differences are judged for A than for B, and a tenth for the better caption.

    0.5 without any difference, whoever is better.
    """
    if found.differences == 0:
        return 0.5
    share = (found.wins_a - found.wins_b) / found.differences
    return 0.5 + 0.5 * clip(share + 0.1 * found.winner, -1, 1)


def linear(found: Tally) -> float:
    """How few errors A makes, up to 10, whatever B does."""
    most = 10 * found.heaviest
    return 1 - min(found.errors_a, most) / most


def shaped(found: Tally) -> float:
    """A's error density, squared; less for many errors, and for a caption that shows few differences.

    It jumps: 1 without any difference, 0.79 with one that is no error of A. `decomposed` does not.
    """
    if found.differences == 0:
        return 1.0
    density = clip(found.errors_a / (found.heaviest * found.differences), 0, 1)
    base = 0.05 + 0.95 * (1 - density) ** 2
    shown = min(1.0, math.log1p(found.differences) / math.log1p(10))
    return base * math.exp(-found.errors_a / found.heaviest / 4) * (0.7 + 0.3 * shown)


def decomposed(found: Tally, hallucination: float = 1.0, omission: float = 1.0) -> float:
    """One less A's error density, with weights for what is wrong and for what is left out.

    With both weights 1 it is the paper's "hallucination plus missing". Weights of our own make the choice
    between faithfulness and coverage one of two numbers.
    """
    errors = hallucination * found.false_a + omission * found.omitted_a
    return 1 - clip(errors / (found.heaviest * max(found.differences, 1)), 0, 1)


MODES: Mapping[str, Callable[[Tally], float]] = MappingProxyType(
    {
        "relative": relative,
        "relative_raw": relative_raw,
        "by_verdicts": by_verdicts,
        "linear": linear,
        "shaped": shaped,
    }
)

_HEDGES = re.compile(
    r"\b(?:and/or|possibly|appears? to|might be|could be|likely|or)\b|(?<=\w)/(?=\w)", re.IGNORECASE
)


def hedging(caption: str) -> float:
    """A factor in (0, 1] for captions that leave things open more often than once in 90 words."""
    words = len(caption.split())
    return math.exp(-0.1 * max(0.0, len(_HEDGES.findall(caption)) - words / 90))
