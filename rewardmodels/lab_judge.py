"""The lab's exact judge of captions: it knows the scene, reads both captions, and errs in nothing.

Every fact that one caption states and the other does not is a difference of its own, so that naming a thing
without its color is better than not naming it. An invented thing is one difference whatever is said of it.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmalign.claims import Comparison, Difference, Fault, Judgment, Winner
from mmalign.lab.caption_check import Claim, Fact, Reading, check
from mmalign.lab.captions import CARELESS, describe, from_json, spoil, write
from mmalign.lab.scenes import Scene
from mmalign.rewardmodels.caption_judges import Case, Judged

# Severities: a wrong or missing thing is worse than its color, and that worse than its size or place.
SEVERITY = {"object": 3, "text": 3, "count": 2, "color": 2, "size": 1, "position": 1, "relation": 1}
ERRORS = {"count": "count_mismatch", "relation": "spatial_relation_error"}  # otherwise <aspect>_hallucination


@dataclass(frozen=True)
class LabJudge:
    """Compares captions of the lab's scenes exactly.

    faithfulness: how much being right counts in a rating on the whole, the rest being coverage. A rating is
    a whole number, as from a model that is asked for one.
    """

    faithfulness: float = 0.7
    name = "lab"
    needs = ("reference", "scene")

    def __post_init__(self) -> None:
        if not 0 <= self.faithfulness <= 1:
            raise ValueError(f"faithfulness is a share in 0..1, got {self.faithfulness}")

    def compare(self, cases: Sequence[Case]) -> list[Judged]:
        return [
            Judged((compare(case.caption, case.reference, scene),))
            if isinstance(scene, Scene)
            else Judged(problem=scene)
            for case, scene in ((case, scene_of(case.scene)) for case in cases)
        ]

    def rate(self, cases: Sequence[Case]) -> list[float | str]:
        found: list[float | str] = []
        for case in cases:
            scene = scene_of(case.scene)
            if isinstance(scene, Scene):
                right, covered = shares(check(case.caption, scene))
                found.append(
                    float(round(10 * (self.faithfulness * right + (1 - self.faithfulness) * covered)))
                )
            else:
                found.append(scene)
        return found


def scene_of(found: Mapping[str, Any] | None) -> Scene | str:
    """The scene of a prompt line, or why there is none."""
    try:
        return from_json(found or {})
    except ValueError as error:
        return str(error)


def shares(reading: Reading) -> tuple[float, float]:
    """Share of the claims that hold, 0 where nothing is claimed, and of the facts that are stated rightly."""
    judged, stated = reading.judged, reading.stated
    right = 1 - len(reading.wrong) / len(judged) if judged else 0.0
    return right, sum(stated.get(fact, False) for fact in reading.facts) / max(len(reading.facts), 1)


@lru_cache(maxsize=65536)
def compare(caption: str, reference: str, scene: Scene) -> Comparison:
    """Every difference of the captions, held against the scene."""
    actor, anchor = check(caption, scene), check(reference, scene)
    known = set(actor.facts)
    order = dict.fromkeys([*actor.stated, *anchor.stated])
    found = [d for fact in order if (d := about_fact(fact, fact in known, actor, anchor, caption, reference))]
    found += unfounded(actor, anchor, caption, reference)
    lost_a, lost_b = (
        sum(f.severity for d in found if (f := d.fault(side)) is not None) for side in ("A", "B")
    )
    winner: Winner = "Tie" if lost_a == lost_b else "A" if lost_a < lost_b else "B"
    return Comparison(tuple(found), winner)


def about_fact(
    fact: Fact, asked: bool, actor: Reading, anchor: Reading, caption: str, reference: str
) -> Difference | None:
    """The difference in what the captions say of one fact of the scene, if there is one.

    asked: whether a complete caption states it. Otherwise leaving it out is no error.
    """
    a, b = claims_on(fact, actor), claims_on(fact, anchor)
    right_a, right_b = actor.stated.get(fact), anchor.stated.get(fact)
    if right_a == right_b and (right_a or {claim.said for claim in a} == {claim.said for claim in b}):
        return None
    error_a = fault(fact[0], right_a, right_b, b, asked)
    error_b = fault(fact[0], right_b, right_a, a, asked)
    return Difference(
        fact[0], words(a, caption), words(b, reference), judged(error_a, error_b), error_a, error_b, span(a)
    )


def fault(
    aspect: str, mine: bool | None, theirs: bool | None, others: Sequence[Claim], asked: bool
) -> Fault | None:
    """What is wrong with one side, given whether it and the other are right; None: the side is silent."""
    if mine is False:
        said = others[0].said if theirs else ""
        kind = ERRORS.get(aspect, f"{aspect}_hallucination")
        return Fault(kind, f"is {said}" if said else "", SEVERITY[aspect])
    if mine is None and theirs and asked:
        return Fault(f"{aspect}_omission", others[0].said, SEVERITY[aspect])
    return None


def judged(error_a: Fault | None, error_b: Fault | None) -> Judgment:
    if error_a and error_b:
        return "both_wrong"
    return "B" if error_a else "A" if error_b else "both_supported"


def unfounded(actor: Reading, anchor: Reading, caption: str, reference: str) -> Iterator[Difference]:
    """The claims of one side alone that speak of nothing in the scene, or that say something again."""
    loose = [[claim for claim in r.wrong if claim.fact is None or claim.repeated] for r in (actor, anchor)]
    both = Counter((c.aspect, c.said) for c in loose[0]) & Counter((c.aspect, c.said) for c in loose[1])
    for side, claims, text in (("A", loose[0], caption), ("B", loose[1], reference)):
        shared = both.copy()
        for claim in claims:
            if shared[claim.aspect, claim.said] > 0:
                shared[claim.aspect, claim.said] -= 1
                continue
            if claim.repeated:
                error = Fault("repetition_error", "said before", 1)
            else:
                error = Fault(f"{claim.aspect}_hallucination", "there is none", SEVERITY[claim.aspect])
            said = text[claim.start : claim.end]
            if side == "A":
                yield Difference(claim.aspect, said, "", "B", error, None, (claim.start, claim.end))
            else:
                yield Difference(claim.aspect, "", said, "A", None, error)


def claims_on(fact: Fact, reading: Reading) -> list[Claim]:
    return [c for c in reading.claims if c.fact == fact and c.holds is not None and not c.repeated]


def words(claims: Sequence[Claim], caption: str) -> str:
    return ", ".join(caption[claim.start : claim.end] for claim in claims)


def span(claims: Sequence[Claim]) -> tuple[int, int] | None:
    """The characters of the first wrong claim, or else of the first."""
    chosen = next((claim for claim in claims if not claim.holds), claims[0] if claims else None)
    return None if chosen is None else (chosen.start, chosen.end)


def labelled(file: Path, count: int, seed: int = 0) -> list[tuple[Case, Comparison]]:
    """Cases with their exact verdicts: references of a caption file of the lab, beside careless captions.

    Raises ValueError where the file has fewer lines.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:count]]
    if len(rows) < count or count < 1:
        raise ValueError(f"{file} has {len(rows)} lines, {count} cases were asked for")
    rng = random.Random(f"judge {seed}")
    found = []
    for row in rows:
        scene = from_json(row["scene"])
        caption = write(spoil(describe(scene), CARELESS, rng))
        case = Case(caption, row["reference"], str(file.parent / row["image"]), row["scene"])
        found.append((case, compare(caption, row["reference"], scene)))
    return found
