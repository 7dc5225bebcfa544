"""ClaimDiff-RL: the unit of reward is one difference between caption, reference and image (arXiv:2605.20278).

    J = sum_i,t min(r A_i,t, clip(r, 1 - low, 1 + high) A_i,t) / sum_i,t 1

The paper adds the differences of a caption up to one number R_i (the reward `claimdiff`) and gives every word

    A_i = (R_i - mean R) / std R                                               credit: sequence

Where the reward tells its differences apart (`grain: claim`) and each false claim stands at its words, they
need not be added up first. With the value v_u of each claim, and 1_u(t) for the words t that it consists of,

    A_i,t = sum_u 1_u(t) (v_u - mean v) / std v                                credit: token

over all claims of the group. What is missing has no words and speaks about the whole caption. `both` adds the
two, the second times `located`. `upstream` lets a claim speak about the words before it too, which is
unbiased where early words cause later claims; `token` varies less. Words that no claim speaks about learn
nothing from `token` alone.

The holistic reward that the paper argues against is `grpo` with the reward `holistic`. Differs from the
public code in that there is no entropy bonus (0.001 there).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from mmalign.credit import Credit, Locate, Peers, per_action, zscore
from mmalign.objectives import REFERENCE, ClippedRatio
from mmalign.plans import texts
from mmalign.records import Advantage, RewardSignal, Trajectory
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class ClaimDiffRL:
    """GRPO for captions with the credit of claims: to the whole caption, to their words, or to both."""

    # Who is credited with a claim: every word (sequence), its own words (token), these and all before them
    # (upstream), or sequence and token added up (both).
    credit: Literal["sequence", "token", "upstream", "both"] = "sequence"
    located: float = 1.0  # weight of the words' own credit beside that of the caption, with `both`
    clip: float = 0.2  # how far a probability may fall, as a share of itself
    clip_high: float = 0.28  # how far it may rise; higher keeps rare words alive
    kl: float = 0.0  # pull towards the base model; the paper has none (0.001 where it is on)
    advantage_clip: float = 5.0  # bound on the advantage

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        sequence = Credit(weights, zscore, "total_first", "whole", per_action, self.advantage_clip)
        token = replace(sequence, combine="normalized", reach="local")
        credit = {
            "sequence": sequence,
            "token": token,
            "upstream": replace(token, reach="upstream"),
            "both": Both(**vars(sequence), located=self.located),
        }[self.credit]
        return Algorithm(
            plans=texts(),
            credit=credit,
            objective=ClippedRatio(self.clip, self.clip_high, self.kl),
            noise=Noise(),
            copies={REFERENCE: 1.0} if self.kl else {},
        )


@dataclass(frozen=True)
class Both(Credit):
    """Credit of the caption as a whole, and of its claims at their words."""

    located: float = 1.0

    def __call__(
        self,
        signals: Sequence[RewardSignal],
        trajectory: Trajectory,
        locate: Locate,
        peers: Peers | None = None,
        part: Tensor | None = None,
    ) -> Advantage:
        whole = super().__call__(signals, trajectory, locate, peers, part)
        apart = replace(self, combine="normalized", reach="local")
        words = Credit.__call__(apart, signals, trajectory, locate, peers, part)
        return replace(whole, values=whole.values + self.located * words.values)
