"""Does an edit agree with the plan that was made for it? The reward of Meta-CoT (arXiv:2604.24625).

A model that reasons before it edits often carries out something else than it said. A judge sees the picture
before, the plan (the task, its target) and the picture after, and rates from 0 to 10 how well the edit is
what the plan says. A wrong plan that is followed is rewarded as well: train with a reward of the instruction
beside it.

A judge that only reads the plan and nods is of no use. Ratings of people, in a file, are the gate: the
correlation and the error that the paper asks for, and ratings that fall where the plans are exchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mmalign.pictures import open_picture
from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.asking import answers, open_client
from mmalign.rewardmodels.endpoint import Question, said, shown
from mmalign.rewardmodels.inputs import extras, pictures
from mmalign.rewardmodels.vlm_judge import rating
from mmalign.rewardmodels.vlm_score import picture_of

TOP = 10.0
RULES = """The first picture was edited into the second by this plan:
{plan}
Rate from 0 to 10 whether the second picture is what the plan says: the planned change was made, to the
planned target, and nothing else was changed. Judge by the pictures, not by how sensible the plan is: 10 for
exactly what it says, 5 for a part of it, 0 for no change or another one. Answer with the number alone."""


@dataclass(frozen=True)
class PlannedEdit:
    """One edit to be rated.

    before: file of the source. after: [3, H, W] in [0, 1]. extra: what its prompt brings along.
    """

    before: str
    after: Tensor
    plan: str
    extra: Mapping[str, object] = field(default_factory=dict)


class PlanJudge(Protocol):
    """Rates how well edits follow their plans."""

    def rate(self, edits: Sequence[PlannedEdit]) -> list[float | str]:
        """From 0 to 10 for each, or why there is no rating."""


@dataclass
class ChatJudge:
    """A vision-language model, here or behind an address.

    looks: how often each edit is rated, with a temperature where more than once; the mean counts, which makes
    a coarse scale finer.
    """

    judge: str
    model: str
    url: str = ""
    looks: int = 1
    side: int = 1024
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.client = open_client(self.judge, self.model, self.url, self.settings)

    def rate(self, edits: Sequence[PlannedEdit]) -> list[float | str]:
        heat = 0.7 if self.looks > 1 else 0.0
        rows: list[int] = []
        asked: list[Question] = []
        problems: dict[int, str] = {}
        for number, edit in enumerate(edits):
            try:
                shown_ = [
                    shown(open_picture(edit.before), self.side),
                    shown(picture_of(edit.after), self.side),
                ]
            except (OSError, ValueError) as error:
                problems[number] = str(error)
                continue
            content = [*shown_, said(RULES.format(plan=edit.plan))]
            for look in range(self.looks):
                rows.append(number)
                asked.append(Question([{"role": "user", "content": content}], heat, look * 1000))
        found: list[list[float | str]] = [[] for _ in edits]
        for number, (value, *_) in zip(rows, answers(self.client, asked, rating), strict=True):
            found[number].append(value)
        return [problems.get(number) or _mean(values) for number, values in enumerate(found)]


def _mean(values: Sequence[float | str]) -> float | str:
    numbers = [value for value in values if isinstance(value, float)]
    return mean(numbers) if numbers else next((str(value) for value in values), "there was no answer")


@dataclass(frozen=True)
class Agreement:
    """How a judge's ratings go with those of people.

    pearson: correlation. error: mean absolute difference, of 10. exchanged: by how much ratings fall, in the
    mean, where every edit is given the plan of another. t: that fall in units of its standard error.
    missing: edits without a rating.
    """

    pearson: float
    error: float
    exchanged: float
    t: float
    missing: int


def agreement(judge: PlanJudge, edits: Sequence[PlannedEdit], ratings: Sequence[float]) -> Agreement:
    """Of the judge with ratings from 0 to 10, on the same edits; also where their plans are exchanged.

    Each edit takes the plan of the next with another one. ValueError with fewer than 3 edits that are rated.
    """
    others = [_other_plan(edits, i) for i in range(len(edits))]
    given = judge.rate(edits)
    control = judge.rate(
        [PlannedEdit(e.before, e.after, plan, e.extra) for e, plan in zip(edits, others, strict=True)]
    )
    pairs = [(g, r) for g, r in zip(given, ratings, strict=True) if isinstance(g, float)]
    falls = [
        g - c for g, c in zip(given, control, strict=True) if isinstance(g, float) and isinstance(c, float)
    ]
    if len(pairs) < 3 or len(falls) < 3:
        why = next((g for g in given if isinstance(g, str)), "too few edits")
        raise ValueError(f"edit_consistency: calibration needs at least 3 edits that are rated: {why}")
    mine, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    spread = stdev(falls) / math.sqrt(len(falls))
    return Agreement(
        correlation(mine, theirs),
        mean(abs(a - b) for a, b in pairs),
        mean(falls),
        mean(falls) / spread if spread else math.copysign(math.inf, mean(falls)) if mean(falls) else 0.0,
        len(edits) - len(pairs),
    )


def _other_plan(edits: Sequence[PlannedEdit], i: int) -> str:
    later = [edits[(i + step) % len(edits)].plan for step in range(1, len(edits))]
    return next((plan for plan in later if plan != edits[i].plan), edits[i].plan)


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    norm = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / norm if norm else 0.0


def read_ratings(file: Path | str) -> tuple[list[PlannedEdit], list[float]]:
    """Rated edits: one object a line with "source", "edited" (paths from the file), "plan" and "rating"."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"edit_consistency: calibration {path} is no file")
    edits, ratings = [], []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(text)
            value = float(row["rating"])
            before, after = (str(path.parent / str(row[key])) for key in ("source", "edited"))
            pixels = torch.from_numpy(np.array(open_picture(after))).permute(2, 0, 1).float() / 255
            edit = PlannedEdit(before, pixels, str(row["plan"]), row)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'{path}, line {number}: expected "source", "edited", "plan" and a "rating" ({error})'
            ) from error
        if not 0 <= value <= TOP:
            raise ValueError(f"{path}, line {number}: a rating lies in 0..10, got {value}")
        edits.append(edit)
        ratings.append(value)
    return edits, ratings


@dataclass(eq=False)
class EditConsistency:
    """How well edited pictures follow the "plan" of their prompts, from 0 to 1.

    A prompt needs its "source" too. A judge that gives no rating leaves a missing reward.
    """

    judge: Literal["lab", "endpoint", "local"] = "lab"  # lab: exact, for pictures of the lab
    model: str = ""  # of the judge: name at the endpoint; local folder or hub id
    url: str = ""  # of the endpoint, up to and with the version
    looks: int = 1  # ratings of one edit, whose mean counts
    side: int = 1024  # pixels of a picture that the judge is shown, at most
    settings: dict[str, Any] = field(default_factory=dict)  # further ones of the endpoint or the local model
    calibration: str | None = None  # .jsonl of edits with ratings by people; the judge has to agree with them
    pearson: float = 0.8  # correlation that it must reach there
    error: float = 2.5  # mean absolute difference that it may have there, of 10
    name = "edit_consistency"

    def __post_init__(self) -> None:
        if self.judge not in ("lab", "endpoint", "local"):
            raise ValueError(f"edit_consistency: judge must be lab, endpoint or local, got {self.judge!r}")
        if self.looks < 1 or self.side < 1:
            raise ValueError(
                f"edit_consistency: looks and side must be at least 1, got {self.looks}, {self.side}"
            )
        if self.calibration is not None:
            self.check(agreement(self.rater, *read_ratings(self.calibration)))

    @cached_property
    def rater(self) -> PlanJudge:
        if self.judge == "lab":
            from mmalign.rewardmodels.lab_plan import ExactJudge

            exact: PlanJudge = ExactJudge()
            return exact
        return ChatJudge(self.judge, self.model, self.url, self.looks, self.side, self.settings)

    def check(self, found: Agreement) -> None:
        """ValueError where the judge does not agree with people well enough to be trained against."""
        wrong = []
        if found.pearson < self.pearson:
            wrong.append(f"its correlation with them is {found.pearson:.2f}, less than {self.pearson}")
        if found.error > self.error:
            wrong.append(f"it is off by {found.error:.2f} in the mean, more than {self.error}")
        if found.exchanged <= 0:
            wrong.append(f"it rates edits with plans of others no lower (by {found.exchanged:.2f})")
        if wrong:
            raise ValueError(
                f"edit_consistency: the judge does not agree with the ratings in {self.calibration}: "
                f"{'; '.join(wrong)}. Take another judge or more looks, or lower pearson and error"
            )

    def __call__(self, outcome: Outcome) -> RewardSignal:
        images = pictures(self.name, outcome, "cpu")
        edits = [self._edit(image, extra) for image, extra in zip(images, extras(outcome), strict=True)]
        found = self.rater.rate(edits)
        values = torch.tensor([[value / TOP if isinstance(value, float) else math.nan] for value in found])
        where = outcome.media.device if isinstance(outcome.media, Tensor) else "cpu"
        details: list[Mapping[str, object]] = [
            {"rating": value} if isinstance(value, float) else {"missing": value} for value in found
        ]
        return RewardSignal(self.name, values.to(where), details=details)

    def _edit(self, image: Tensor, extra: Mapping[str, object]) -> PlannedEdit:
        source = extra.get("source")
        before = source[0] if isinstance(source, list) and source else source
        plan = extra.get("plan")
        if not isinstance(before, str) or not isinstance(plan, str) or not plan:
            raise ValueError(
                f'{self.name}: each prompt needs a "source" and the "plan" of its edit; put them into its '
                "line of the prompt file"
            )
        return PlannedEdit(before, image, plan, extra)
