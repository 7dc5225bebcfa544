"""IGPO: each sentence is paid for what it adds to the chance of the right answer (arXiv:2510.14967).

A reward gives a gain for each sentence k (`information_gain`: p_k - p_{k-1}, where p_k is how likely the
answer is after sentence k), and others may judge the whole text. With all gains of a group in their standard
deviations, r^_k, the words of sentence t get

    A_t = sum_{k >= t} gamma^(k - t) r^_k

so that a sentence answers for what later ones find as well. Each reward is compared with its own kind, and
the advantage of a whole text is added to every word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmalign.credit import Credit, per_action, zscore
from mmalign.objectives import REFERENCE, ClippedRatio
from mmalign.plans import texts
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class IGPO:
    """Token credit by sentences, discounted; sentences are units with a place in the text."""

    gamma: float = 1.0  # share of a later gain that a sentence answers for; 0: only for its own
    clip: float = 0.2  # how far a probability may fall, as a share of itself
    clip_high: float = 0.2  # how far it may rise
    kl: float = 0.001  # pull towards the base model; 0 saves a forward
    advantage_clip: float = 5.0  # bound on the advantage

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        normalize = partial(returns, gamma=self.gamma)
        return Algorithm(
            plans=texts(),
            credit=Credit(weights, normalize, "normalized", "local", per_action, self.advantage_clip),
            objective=ClippedRatio(self.clip, self.clip_high, self.kl),
            noise=Noise(),
            copies={REFERENCE: 1.0} if self.kl else {},
        )


def returns(values: Tensor, valid: Tensor, group: Tensor, aligned: bool, *, gamma: float) -> Tensor:
    """Discounted sums of each unit's and all later ones' distances to their peers, [N, U] in float64.

    Of aligned units, which do not follow one another, only the distance.
    """
    gains = zscore(values, valid, group, aligned)
    if aligned:
        return gains
    out = torch.empty_like(gains)
    later = gains.new_zeros(len(gains))
    for k in reversed(range(gains.shape[1])):
        later = gains[:, k] + gamma * later
        out[:, k] = later
    return out
