"""Actions that another engine drew: how far it was from the policy, and the correction of the loss for it.

An engine that writes faster (vLLM, SGLang) computes in other kernels and at another precision: what it draws
comes from b and not from the policy p that it stands for. Truncated importance weights

    w = min(p / b, cap)

multiply the gain of each token. They are bounded so in IMPALA (arXiv:1802.01561), and for engines of rollouts
by Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training". p is of the
parameters that sampled, as computed here, so that ratios of the update still begin at 1.

Measured over all tokens drawn, with d = log p - log b and w = exp(d) before it is cut:

    gap        mean |d|
    kl         mean exp(d) - 1 - d, the KL from b to p without bias
    ess        (sum w)^2 / (n sum w^2), 1 where both agree
    truncated  share of the tokens with w > cap
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from mmalign.credit import Gather
from mmalign.records import Advantage, Trajectory

FURTHEST = 30.0  # a log-weight above it would overflow; such a token is cut in any case


def importance(log_prob: Tensor, behavior: Tensor, cap: float) -> Tensor:
    """min(p / b, cap) from log-probabilities of equal shape."""
    return (log_prob - behavior).clamp(max=math.log(cap)).exp()


def corrected(advantage: Advantage, trajectory: Trajectory) -> Advantage:
    """The advantage times the importance weights of what another engine drew."""
    assert trajectory.behavior is not None
    drawn = trajectory.behavior
    weight = importance(trajectory.log_prob, drawn.log_prob, drawn.cap)
    return replace(advantage, values=advantage.values * torch.where(trajectory.mask, weight, 1.0))


def mismatch(trajectory: Trajectory, gather: Gather) -> dict[str, float]:
    """How far the engine was from the policy, over all ranks."""
    assert trajectory.behavior is not None
    away = (trajectory.log_prob - trajectory.behavior.log_prob)[trajectory.mask].double().cpu()
    weight = away.clamp(max=FURTHEST).exp()
    cut = (away > math.log(trajectory.behavior.cap)).double()
    sums = torch.stack(
        [torch.ones_like(away), away.abs(), weight - 1 - away, weight, weight.square(), cut], 1
    ).sum(0)
    count, gap, kl, first, second, beyond = gather(sums[None]).sum(0).tolist()
    if not count:
        return {}
    return {
        "rollout/gap": gap / count,
        "rollout/kl": kl / count,
        "rollout/ess": first**2 / (count * second),
        "rollout/truncated": beyond / count,
    }
