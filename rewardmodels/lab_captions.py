"""What captions of the lab tell of their scenes, claim by claim, which takes a known truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmalign.lab.caption_check import check
from mmalign.lab.scenes import Scene
from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.caption_judges import cases
from mmalign.rewardmodels.lab_judge import scene_of, shares


@dataclass(frozen=True)
class CaptionFacts:
    """How well a caption tells the facts of a scene of the lab: F1 of its claims, in 0..1, exactly checked.

    Details: `hallucination`, the share of its claims that are wrong; `omission`, the share of the facts that
    it says nothing about; `objects_invented`, the share of its things that are not there (CHAIR,
    arXiv:1809.02156); `claims_made`; `words`; and the same two shares for each aspect.
    """

    name = "caption_facts"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        values: list[float] = []
        details: list[Mapping[str, object]] = []
        for case in cases(self.name, outcome, ("scene",)):
            scene = scene_of(case.scene)
            if not isinstance(scene, Scene):
                values.append(torch.nan)
                details.append({"missing": scene})
                continue
            value, detail = facts_of(case.caption, scene)
            values.append(value)
            details.append(detail)
        return RewardSignal(self.name, torch.tensor(values)[:, None], details=details)


def facts_of(caption: str, scene: Scene) -> tuple[float, Mapping[str, object]]:
    """F1 of the claims of a caption, and the rates of `CaptionFacts`."""
    reading = check(caption, scene)
    right, covered = shares(reading)
    judged, wrong, omitted = reading.judged, reading.wrong, reading.omitted
    objects = [claim for claim in judged if claim.aspect == "object"]
    detail: dict[str, object] = {
        "hallucination": len(wrong) / max(1, len(judged)),
        "omission": len(omitted) / max(1, len(reading.facts)),
        "objects_invented": sum(claim.fact is None for claim in objects) / max(1, len(objects)),
        "claims_made": len(judged),
        "words": len(caption.split()),
    }
    for aspect in sorted({claim.aspect for claim in judged}):
        own = [claim for claim in judged if claim.aspect == aspect]
        detail[f"hallucination_{aspect}"] = sum(not claim.holds for claim in own) / len(own)
    for aspect in sorted({fact[0] for fact in reading.facts}):
        known = [fact for fact in reading.facts if fact[0] == aspect]
        detail[f"omission_{aspect}"] = sum(fact in omitted for fact in known) / len(known)
    detail["claims"] = [
        {"aspect": c.aspect, "said": c.said, "span": (c.start, c.end), "holds": c.holds} for c in judged
    ]
    return 2 * right * covered / max(right + covered, 1e-12), detail
