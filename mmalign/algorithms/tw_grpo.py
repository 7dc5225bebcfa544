"""TW-GRPO: words weigh more where the texts of a group part ways (arXiv:2505.24718).

Of the G texts of a prompt, at each position t, over the vocabulary v (a text that has ended is uniform):

    d_i,t(v) = clamp(mean_j log p_j,t(v) - log p_i,t(v), -11, 11)
    K_t      = 1/G sum_i sum_v (exp(d) - d - 1)
    w_t      = 1 + (alpha - 1) (K_t - min K) / (max K - min K)           in [1, alpha], the same for all G
    J        = sum_i,t w_t min(r A_i, clip(r, 1 - low, 1 + high) A_i) / sum_i,t 1

The sum is divided by the number of words and not by that of the weights, so that a larger alpha also makes
larger steps. The weights carry no gradient. They need a forward without gradient for every text more, and
whole groups on a process. Position t means another thing in two texts that have parted before: late words
are loud by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmalign.contracts import Policy, TellsNext
from mmalign.credit import Credit, Peers, per_action, zscore
from mmalign.objectives import REFERENCE, ClippedRatio
from mmalign.plans import texts
from mmalign.records import Advantage, Trajectory
from mmalign.sde import Noise
from mmalign.trainer import Algorithm

BOUND = 11.0  # of the difference of two log-probabilities
EVEN = 1e-6  # a difference of K below it is rounding
COLUMNS = 32  # positions whose distributions are held at a time


@dataclass(frozen=True)
class TWGRPO:
    """GRPO whose words speak the louder the more the group disagrees on what comes next."""

    alpha: float = 1.7  # weight of the position of most disagreement; 1 is GRPO
    clip: float = 0.2  # how far a probability may fall, as a share of itself
    clip_high: float = 0.2  # how far it may rise
    kl: float = 0.0  # pull towards the base model; the paper has none
    advantage_clip: float = 5.0  # bound on the advantage, before it is weighed

    def __post_init__(self) -> None:
        if not self.alpha >= 1:
            raise ValueError(f"alpha must be at least 1, got {self.alpha}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        return Algorithm(
            plans=texts(),
            credit=Credit(weights, zscore, "total_first", "whole", per_action, self.advantage_clip),
            objective=ClippedRatio(self.clip, self.clip_high, self.kl),
            noise=Noise(),
            copies={REFERENCE: 1.0} if self.kl else {},
            refine=self.weigh if self.alpha > 1 else None,
        )

    def weigh(self, policy: Policy, trajectory: Trajectory, advantage: Advantage, peers: Peers) -> Advantage:
        """The advantage of each word times the weight of its position."""
        if not isinstance(policy, TellsNext):
            raise TypeError(
                f"TWGRPO needs a policy that tells its distributions; {type(policy).__name__} does not"
            )
        if not peers.whole():
            raise ValueError(
                "TWGRPO compares the distributions of a group on one process: make prompts.per_iteration a "
                "multiple of the processes"
            )
        loud = torch.ones_like(trajectory.log_prob)
        for one in torch.unique(trajectory.group):
            rows = (trajectory.group == one).nonzero().flatten()
            written = trajectory.mask[rows].any(0)  # up to the end of the longest text
            found = disagreement(policy, trajectory, rows)[written]
            loud[rows[:, None], written.nonzero()[:, 0]] = loudness(found, self.alpha)
        return replace(advantage, values=advantage.values * loud)


def disagreement(policy: TellsNext, trajectory: Trajectory, rows: Tensor) -> Tensor:
    """K_t of the texts of one group at each position, [S]."""
    mask = trajectory.mask[rows]
    found = torch.zeros(mask.shape[1], device=mask.device)
    for at, log_p in policy.distributions(trajectory, rows, COLUMNS):
        log_p = log_p.float()
        uniform = torch.full_like(log_p[0, 0], 1 / log_p.shape[-1]).log()
        log_p = torch.where(mask[:, at, None], log_p, uniform)
        found[at] = spread(log_p)
    return found


def spread(log_p: Tensor) -> Tensor:
    """How far the distributions of a group are from their geometric mean, [s]; log_p: [G, s, V]."""
    d = (log_p.mean(0) - log_p).clamp(-BOUND, BOUND)
    return (d.expm1() - d).sum(-1).mean(0)


def loudness(k: Tensor, alpha: float) -> Tensor:
    """Weights in [1, alpha] from the disagreement at each position, both [s]; 1 where it is even."""
    low, high = k.min(), k.max()
    return 1 + (alpha - 1) * torch.where(high - low > EVEN, (k - low) / (high - low), 0.0)
