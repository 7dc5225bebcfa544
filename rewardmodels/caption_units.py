"""DCScore: a caption unit by unit, held against the picture and against known facts (arXiv:2503.07906).

    precision = verified / units
    recall    = (sum over verified units that tell a known fact of 1 / units that tell it  +  new)
                / (known facts + new)             new: verified units that tell no known fact
    DCScore   = (F1 of all units + F1 of those that describe) / 2

A true detail that nobody listed enlarges both parts of the recall, so that a caption may be richer than the
list. Facts are a prompt's `facts`, or the sentences of its `reference`.

Differs from the published protocol in that units are cut, matched and verified by one answer, averaged over
`looks`, where there are three passes of which each is repeated.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean
from typing import Any, Literal, Protocol

import torch

from mmalign.pictures import open_picture
from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.asking import answers, open_client
from mmalign.rewardmodels.caption_judges import Case, cases
from mmalign.rewardmodels.endpoint import Question, said, shown
from mmalign.rewardmodels.inputs import extras

ASK = """Facts that are known of the picture:
{facts}
A description of it: {caption}
Cut the description into its smallest units of information, one claim each. For every unit say whether it
describes the picture (rather than comment on it), the number of the known fact that it tells, or null, and
whether the picture shows it to be right. Answer with a JSON list alone, of objects
{{"unit": TEXT, "describes": true or false, "fact": NUMBER or null, "right": true or false}}."""
LIST = re.compile(r"\[.*\]", re.DOTALL)
SENTENCE = re.compile(r"(?<=[.!?;])\s+")


@dataclass(frozen=True)
class CaptionUnit:
    """One claim of a caption. fact: the known fact that it tells, if it tells one."""

    text: str
    right: bool
    fact: int | None = None
    describes: bool = True


@dataclass(frozen=True)
class UnitScores:
    """All in [0, 1]; 0 where there is nothing to count."""

    precision: float
    recall: float
    f1: float


def scored(units: Sequence[CaptionUnit], facts: int) -> UnitScores:
    """Precision, recall and F1 of units against so many known facts."""
    right = [unit for unit in units if unit.right]
    told = Counter(unit.fact for unit in units if unit.fact is not None)
    new = sum(unit.fact is None for unit in right)
    matched = sum(1 / told[unit.fact] for unit in right if unit.fact is not None)
    precision = len(right) / len(units) if units else 0.0
    recall = (matched + new) / (facts + new) if facts + new else 0.0
    both = precision + recall
    return UnitScores(precision, recall, 2 * precision * recall / both if both else 0.0)


def dc_score(units: Sequence[CaptionUnit], facts: int) -> float:
    """The mean of F1 over all units and over those that describe."""
    return mean(scored(part, facts).f1 for part in (units, [unit for unit in units if unit.describes]))


class UnitJudge(Protocol):
    """Cuts captions into units and holds them against picture and facts.

    needs: what a case must have beside its caption, as named in `Case`.
    """

    needs: tuple[str, ...]

    def units(
        self, asked: Sequence[Case], facts: Sequence[Sequence[str]]
    ) -> list[list[tuple[list[CaptionUnit], int]] | str]:
        """For each case its units and the number of facts they were held against, once a look; or why not."""
        ...


def read_units(answer: str, facts: int) -> list[CaptionUnit]:
    """The units in an answer; ValueError where it holds no list of them."""
    found = LIST.search(answer)
    if not found:
        raise ValueError(f"the answer holds no list of units: {answer[:80]!r}")
    try:
        rows = json.loads(found[0])
    except json.JSONDecodeError as error:
        raise ValueError(f"the list of units is no JSON: {error}") from None
    units = []
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(k), bool) for k in ("describes", "right")):
            raise ValueError(f"a unit says whether it describes and is right, got {str(row)[:80]}")
        fact = row.get("fact")
        if fact is not None and (type(fact) is not int or not 1 <= fact <= facts):
            raise ValueError(f"a unit names a fact from 1 to {facts}, got {fact!r}")
        units.append(CaptionUnit(str(row.get("unit", "")), row["right"], fact, row["describes"]))
    return units


@dataclass
class ChatUnits:
    """A vision-language model, here or behind an address."""

    judge: str
    model: str
    url: str = ""
    looks: int = 1
    side: int = 1024
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = field(default=("image",), init=False)

    def __post_init__(self) -> None:
        self.client = open_client(self.judge, self.model, self.url, self.settings)

    def units(
        self, asked: Sequence[Case], facts: Sequence[Sequence[str]]
    ) -> list[list[tuple[list[CaptionUnit], int]] | str]:
        found: list[list[tuple[list[CaptionUnit], int]] | str] = []
        heat = 0.7 if self.looks > 1 else 0.0
        for case, known in zip(asked, facts, strict=True):
            try:
                picture = shown(open_picture(str(case.image)), self.side)
            except ValueError as error:
                found.append(str(error))
                continue
            listed = "\n".join(f"{number}. {fact}" for number, fact in enumerate(known, 1))
            content = [picture, said(ASK.format(facts=listed, caption=case.caption))]
            message = [{"role": "user", "content": content}]
            questions = [Question(message, heat, look * 1000) for look in range(self.looks)]
            count = len(known)
            replies = answers(self.client, questions, lambda text, count=count: read_units(text, count))
            read = [(value, count) for value, *_ in replies if isinstance(value, list)]
            found.append(read or next(str(value) for value, *_ in replies))
        return found


@dataclass(eq=False)
class DCScore:
    """How right and how complete a caption is, unit by unit, from 0 to 1."""

    judge: Literal["lab", "endpoint", "local"] = "lab"  # lab: exact, for pictures of the lab
    model: str = ""  # of the judge: name at the endpoint; local folder or hub id
    url: str = ""  # of the endpoint, up to and with the version
    looks: int = 1  # answers about one caption, over which scores are averaged
    side: int = 1024  # pixels of a picture that the judge is shown, at most
    settings: dict[str, Any] = field(default_factory=dict)  # further ones of the endpoint or the local model
    name = "dcscore"

    def __post_init__(self) -> None:
        if self.judge not in ("lab", "endpoint", "local"):
            raise ValueError(f"dcscore: judge must be lab, endpoint or local, got {self.judge!r}")
        if self.looks < 1 or self.side < 1:
            raise ValueError(f"dcscore: looks and side must be at least 1, got {self.looks}, {self.side}")

    @cached_property
    def cutter(self) -> UnitJudge:
        """Who cuts and verifies."""
        if self.judge == "lab":
            from mmalign.rewardmodels.lab_units import ExactUnits

            exact: UnitJudge = ExactUnits()
            return exact
        return ChatUnits(self.judge, self.model, self.url, self.looks, self.side, self.settings)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        asked = cases(self.name, outcome, self.cutter.needs)
        facts = [facts_of(extra, case.reference) for extra, case in zip(extras(outcome), asked, strict=True)]
        values: list[float] = []
        details: list[Mapping[str, object]] = []
        for found in self.cutter.units(asked, facts):
            if isinstance(found, str):
                values.append(math.nan)
                details.append({"missing": found})
                continue
            values.append(mean(dc_score(units, count) for units, count in found))
            whole = [scored(units, count) for units, count in found]
            details.append(
                {
                    "precision": mean(one.precision for one in whole),
                    "recall": mean(one.recall for one in whole),
                    "units": mean(len(units) for units, _ in found),
                }
            )
        return RewardSignal(self.name, torch.tensor(values)[:, None], details=details)


def facts_of(extra: Mapping[str, object], reference: str) -> list[str]:
    """The facts that a prompt line lists, or the sentences of its reference."""
    listed = extra.get("facts")
    if isinstance(listed, list) and listed:
        return [str(fact) for fact in listed]
    return [part.strip() for part in SENTENCE.split(reference) if part.strip()]
