"""Units of captions of the lab, cut and verified exactly, for `dcscore`."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.lab.caption_check import check
from mmalign.lab.scenes import Scene
from mmalign.rewardmodels.caption_judges import Case
from mmalign.rewardmodels.caption_units import CaptionUnit
from mmalign.rewardmodels.lab_judge import scene_of


class ExactUnits:
    """Every claim of a caption is a unit; what is known is what the reference states rightly."""

    needs = ("reference", "scene")

    def units(
        self, asked: Sequence[Case], facts: Sequence[Sequence[str]]
    ) -> list[list[tuple[list[CaptionUnit], int]] | str]:
        """Facts in words are not looked at: the scene tells them all."""
        return [self._one(case) for case in asked]

    def _one(self, case: Case) -> list[tuple[list[CaptionUnit], int]] | str:
        scene = scene_of(case.scene)
        if not isinstance(scene, Scene):
            return str(scene)
        known = [fact for fact, right in check(case.reference, scene).stated.items() if right]
        units = [
            CaptionUnit(
                claim.said,
                bool(claim.holds),
                known.index(claim.fact) if claim.fact in known else None,
            )
            for claim in check(case.caption, scene).judged
        ]
        return [(units, len(known))]
