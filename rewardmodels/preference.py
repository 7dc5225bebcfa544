"""The verdict that came with the data: which picture of a pair a person preferred.

It judges pictures that a file names, not those that a policy draws; it goes with `algorithm.pairs: given`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmalign.records import Outcome, RewardSignal


@dataclass(frozen=True)
class Preference:
    """1 for the chosen picture of a pair, 0 for the rejected one, as the prompt file says."""

    name = "preference"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        said = [extra.get("preferred") for extra in outcome.prompts.extra for _ in range(outcome.views)]
        values = [float(value) if isinstance(value, bool | int | float) else torch.nan for value in said]
        return RewardSignal(self.name, torch.tensor(values)[:, None])
