"""How good a judge of captions is: its verdicts against labelled ones, its taste for a place, what it costs.

Labels are comparisons as `claims.record` writes them, or those of the lab's exact judge on captions with
planted mistakes. A difference of the judge meets one of the label where both see an error of the caption of
the same nature (something false, something left out) about the same aspect.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmalign.claims import Comparison, Fault, recall
from mmalign.config import ConfigError
from mmalign.rewardmodels.caption_judges import CaptionJudge, Case

FALSE, LEFT_OUT = "false", "left_out"
Label = tuple[Case, Comparison]


@dataclass(frozen=True)
class Agreement:
    """Errors of one kind: how many the judge found rightly, how many it found, how many there are."""

    right: int
    found: int
    labelled: int

    @property
    def precision(self) -> float | None:
        return self.right / self.found if self.found else None

    @property
    def recall(self) -> float | None:
        return self.right / self.labelled if self.labelled else None


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    kinds: agreement by nature, and by aspect and nature, as `color/false`. severities: (labelled, found) ->
    how often, of errors that met. winner: share of the cases whose better caption is the labelled one.
    consistent: share of the cases that keep their winner where the captions change places. first_bias: share
    that favors the first caption both times, less the share that favors the second. missing: share of the
    cases without a verdict; malformed: differences that could not be read.
    """

    cases: int
    missing: float
    malformed: int
    kinds: dict[str, Agreement]
    severities: dict[tuple[int, int], int]
    winner: float | None
    consistent: float | None
    first_bias: float | None
    calls: float
    tokens: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "missing": self.missing,
            "malformed": self.malformed,
            "kinds": {
                name: {"precision": one.precision, "recall": one.recall, "found": one.found}
                | {"labelled": one.labelled}
                for name, one in self.kinds.items()
            },
            "severities": {f"{label} as {found}": n for (label, found), n in sorted(self.severities.items())},
            "winner": self.winner,
            "consistent": self.consistent,
            "first_bias": self.first_bias,
            "per_caption": {"calls": self.calls, "tokens": self.tokens, "seconds": self.seconds},
        }


def read_labels(file: Path) -> list[Label]:
    """Labelled cases: a line each with caption, reference, label and what the judge needs (image, scene).

    Paths of images are taken from the folder of the file. Raises ConfigError with the line that is wrong.
    """
    if not file.is_file():
        raise ConfigError(f"--cases: there is no file {file}")
    found: list[Label] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image = row.get("image")
            case = Case(
                row["caption"],
                row["reference"],
                None if image is None else str(file.parent / image),
                row.get("scene"),
            )
            found.append((case, recall(row["label"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"--cases: {file}, line {number}: is no labelled case ({error!r})") from error
    if not found:
        raise ConfigError(f"--cases: {file} holds no cases")
    return found


def evaluate(judge: CaptionJudge, labels: Sequence[Label], swap: bool = True) -> Evaluation:
    """Ask the judge about every case, and once more with the captions exchanged unless `swap` is False."""
    cases = [case for case, _ in labels]
    began = time.perf_counter()
    judged = judge.compare(cases)
    seconds = time.perf_counter() - began
    right: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    there: Counter[str] = Counter()
    severities: Counter[tuple[int, int]] = Counter()
    agreed = known = 0
    for (_, label), said in zip(labels, judged, strict=True):
        if not said.looks:
            continue
        known += 1
        look = said.looks[0]
        agreed += look.winner == label.winner
        mine, theirs = faults(look), faults(label)
        for kind in {*mine, *theirs}:
            met = min(len(mine[kind]), len(theirs[kind]))
            for name in (kind, kind.partition("/")[2]):
                right[name] += met
                seen[name] += len(mine[kind])
                there[name] += len(theirs[kind])
            severities.update(zip(sorted(theirs[kind])[:met], sorted(mine[kind])[:met], strict=True))
    kept, first, second, both = (0, 0, 0, 0)
    if swap:
        turned = judge.compare([replace(c, caption=c.reference, reference=c.caption) for c in cases])
        for said, other in zip(judged, turned, strict=True):
            if said.looks and other.looks:
                one, two = said.looks[0].winner, other.looks[0].winner
                both += 1
                kept += other.looks[0].swapped.winner == one
                first += one == two == "A"
                second += one == two == "B"
    count = len(labels)
    return Evaluation(
        cases=count,
        missing=1 - known / count,
        malformed=sum(look.malformed for said in judged for look in said.looks),
        kinds={name: Agreement(right[name], seen[name], there[name]) for name in sorted({*seen, *there})},
        severities=dict(severities),
        winner=agreed / known if known else None,
        consistent=kept / both if both else None,
        first_bias=(first - second) / both if both else None,
        calls=sum(said.calls for said in judged) / count,
        tokens=sum(said.tokens for said in judged) / count,
        seconds=seconds / count,
    )


def faults(comparison: Comparison) -> defaultdict[str, list[int]]:
    """The severities of the caption's errors by aspect and nature, as `color/false`."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for difference in comparison.differences:
        if (fault := difference.error_a) is not None:
            found[f"{aspect_of(fault)}/{LEFT_OUT if fault.omission else FALSE}"].append(fault.severity)
    return found


def aspect_of(fault: Fault) -> str:
    """What an error is about: the first word of its type, `color` of `color_hallucination`."""
    return fault.type.lower().partition("_")[0]


def table(found: Evaluation) -> str:
    """The evaluation as text."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    lines = [f"{'errors':<24}{'labelled':>9}{'found':>7}{'precision':>11}{'recall':>8}"]
    lines += [
        f"{name:<24}{one.labelled:>9}{one.found:>7}{share(one.precision):>11}{share(one.recall):>8}"
        for name, one in found.kinds.items()
    ]
    graded = "  ".join(f"{a} as {b}: {n}" for (a, b), n in sorted(found.severities.items()))
    return "\n".join(
        [
            *lines,
            "",
            f"cases {found.cases}, without a verdict {found.missing:.1%}, unreadable differences "
            f"{found.malformed}",
            f"better caption as labelled {share(found.winner)}, kept where they change places "
            f"{share(found.consistent)}, taste for the first {share(found.first_bias)}",
            f"severities {graded or '-'}",
            f"a caption costs {found.calls:.1f} calls, {found.tokens:.0f} tokens, {found.seconds:.3f} s",
        ]
    )
