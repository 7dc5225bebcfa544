"""The exact judge of edits of the lab by their plans, for `edit_consistency`."""

from __future__ import annotations

from collections.abc import Sequence

from mmalign.lab.edit_verifier import score_edit
from mmalign.lab.edits import parse_plan
from mmalign.rewardmodels.edit_consistency import TOP, PlannedEdit
from mmalign.rewardmodels.lab_edit import source_of


class ExactJudge:
    """Reads the scene off the edited picture; prompts need the "scene" of their sources."""

    def rate(self, edits: Sequence[PlannedEdit]) -> list[float | str]:
        """From 0 to 10 for each, or why there is no rating."""
        return [self._one(edit) for edit in edits]

    def _one(self, edit: PlannedEdit) -> float | str:
        known = source_of(edit.extra)
        if isinstance(known, str):
            return known
        try:
            planned = parse_plan(edit.plan)
        except ValueError as error:
            return str(error)
        for referent in filter(None, (planned.subject, planned.anchor)):
            new = planned.kind == "add" and referent is planned.subject
            if not new and sum(map(referent.means, known.things)) != 1:
                return 0.0  # nobody can have done what the plan says
        return float(TOP * score_edit(edit.after, known, planned).soft)
