"""BranchGRPO: members of a group grow as a tree, judged depth by depth (arXiv:2509.06040).

All steps are stochastic; members start as one and split `ways` ways at some of them. Siblings draw noises
that resemble each other, each of them standard normal, so that the density of every step is the one drawn
from:

    xi_b = (xi_0 + s eta_b) / sqrt(1 + s^2)         correlation 1 / (1 + s^2)
    V(n) = sum over leaves l of n of w_l R_l,       w = softmax over l of beta log p(l | n)
    A(n) = (V(n) - mean of the depth) / std of the depth
    J    = mean over edges of min(r A, clip(r) A)   the edge that enters n carries A(n); no KL

Pruning leaves out edges of the update alone. Width: below each parent of the last split only the best leaf
is kept, or of each tree only the best and the worst; an edge stays if a kept leaf is behind it. Depth: only
depths in a window that moves on now and then.

P prompts of W = ways^|splits| leaves, T steps: step t is taken from n_t = ways^(splits before t) states, so
sampling costs P sum over t < T of n_t forwards, training P sum over t < T - 1 of n_t, less what is pruned;
twice with guidance.

Differs from the paper in that the last step follows the ODE, and from the public code in the noise of a
split, which there is scaled but scored as if it were not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mmalign.credit import Credit, Peers, per_action, zscore
from mmalign.objectives import ClippedRatio
from mmalign.records import Plan, RewardSignal, Steps, Trajectory, Unit
from mmalign.sde import Noise
from mmalign.trainer import Algorithm

Width = Literal["all", "top", "extremes"]


@dataclass(frozen=True)
class BranchGRPO:
    """Many leaves for the price of few rollouts, and an advantage for every depth."""

    steps: int = 20  # denoising steps in training
    splits: tuple[int, ...] = (0, 3, 6, 9)  # steps at which members split; early and dense ones do best
    ways: int = 2  # into so many; prompts.group must be ways to the power of the number of splits
    spread: float = 4.0  # own noise of siblings over their common noise; lower makes them alike
    beta: float = 1.0  # how much more likely leaves count in a node's value; 0: the plain mean
    width: Width = "all"  # leaves that are learned from; top is stable, extremes explores, both cost less
    depth: int = 0  # depths that are learned from at a time, 4 in the paper; 0: all
    depth_stay: int = 30  # iterations before these move on by one
    depth_stop: int = 9  # where they come to a stand; what lies below is then never learned
    clip: float = 1e-3  # trust region of the ratio; made for log-probabilities that are means over the latent
    advantage_clip: float = 5.0  # bound on the advantage
    noise: Noise = field(default_factory=lambda: Noise("dance", 0.3))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("BranchGRPO needs noise to learn from: noise.level must be above 0 (usual: 0.3)")
        if not self.splits:
            raise ValueError("splits must name at least one step")
        if not (self.spread > 0 and self.beta >= 0):
            raise ValueError(f"spread must be positive and beta not negative, got {self.spread}, {self.beta}")
        if not 0 <= self.depth <= self.steps - 1 or self.depth_stay < 1 or self.depth_stop < self.depth - 1:
            raise ValueError(
                f"depth must lie in 0..{self.steps - 1} and within depth_stop, depth_stay be at least 1, got "
                f"depth={self.depth}, depth_stay={self.depth_stay}, depth_stop={self.depth_stop}"
            )
        _ = self.plan(0)

    def plan(self, iteration: int) -> Plan:
        learned = None
        if self.depth:
            last = min(self.depth_stop, self.steps - 2)
            first = min(iteration // self.depth_stay, last + 1 - self.depth)
            learned = tuple(range(first, first + self.depth))
        return Plan(
            self.steps,
            tuple(range(self.steps - 1)),
            share_noise=True,
            splits=self.splits,
            ways=self.ways,
            correlation=1 / (1 + self.spread**2),
            learned=learned,
        )

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        return Algorithm(
            plans=lambda iteration, seed: [self.plan(iteration)],
            credit=Credit(
                weights,
                zscore,
                "total_first",
                weigh=per_action,
                clip=self.advantage_clip,
                read=partial(fuse, self.beta),
                select=partial(edges, self.width),
            ),
            objective=ClippedRatio(self.clip, self.clip),
            noise=self.noise,
        )


def tree(trajectory: Trajectory) -> Plan:
    """The plan of a trajectory, which knows who is in which node."""
    if trajectory.plan is None:
        raise TypeError("BranchGRPO needs a policy that tells the plan it followed")
    return trajectory.plan


def fuse(beta: float, signal: RewardSignal, trajectory: Trajectory, peers: Peers) -> RewardSignal:
    """The value of the node after each action, from the leaves behind it: [B, 1] to [B, S].

    A leaf without a verdict is behind no node, and its own row says nothing.
    """
    plan, valid = tree(trajectory), signal.valid
    assert valid is not None  # filled in by RewardSignal
    reward, known = peers.all(signal.values.double())[:, 0], peers.all(valid.long())[:, 0].bool()
    log_prob = trajectory.log_prob.double().cpu()
    likely = peers.all(log_prob.reshape(*log_prob.shape[:2], -1).mean(2))
    ahead = likely.sum(1, keepdim=True) - likely.cumsum(1)  # [N, S], of the actions after each
    value = torch.stack(
        [
            _mean(reward, _softmax(beta * ahead[:, column], known, node), node)
            for column, node in enumerate(_nodes(plan, peers))
        ],
        1,
    )[peers.mine]
    index = torch.arange(value.shape[1]).expand(len(value), -1)
    return replace(
        signal,
        values=value,
        valid=valid.expand(value.shape),
        unit=Unit.STEP,
        where=Steps(index),
        details=None,
    )


def edges(width: Width, advantage: Tensor, counted: Tensor, trajectory: Trajectory, peers: Peers) -> Tensor:
    """The share of its edge that each action of a leaf stands for, [B, S]: edges count alike.

    advantage: [K, B, S, *site]; counted: [B], leaves with a verdict.
    """
    plan, last = tree(trajectory), advantage.sum(0)[:, -1]
    kept = peers.all(counted.long()).bool()
    if width != "all":
        step = plan.splits[-1] if width == "top" else 0
        family = _numbered(peers.group, plan.kin(peers.member, step))
        kept = _best(peers.all(last.reshape(len(last), -1).mean(1)), kept, family, worst=width == "extremes")
    share = [
        kept
        / torch.zeros(len(peers), dtype=torch.float64).index_add_(0, node, kept.double())[node].clamp(min=1)
        for node in _nodes(plan, peers)
    ]
    return torch.stack(share, 1)[peers.mine]


def _nodes(plan: Plan, peers: Peers) -> list[Tensor]:
    """For each action the number of the node that each sample of all ranks is in after it, [N]."""
    return [_numbered(peers.group, plan.heirs(peers.member, step)) for step in plan.sde_steps]


def _numbered(group: Tensor, kin: Tensor) -> Tensor:
    names: Tensor = torch.unique(torch.stack([group, kin], 1), dim=0, return_inverse=True)[1]
    return names


def _softmax(score: Tensor, known: Tensor, node: Tensor) -> Tensor:
    """Within each node, over the samples that are known; 0 for others."""
    score = torch.where(known, score, -torch.inf)
    most = torch.full_like(score, -torch.inf).scatter_reduce_(0, node, score, "amax")[node]
    share = torch.where(known, (score - most).exp(), 0.0)
    return share / torch.zeros_like(share).index_add_(0, node, share)[node].clamp(min=torch.finfo().tiny)


def _mean(value: Tensor, share: Tensor, node: Tensor) -> Tensor:
    return torch.zeros_like(value).index_add_(0, node, value * share)[node]


def _best(value: Tensor, known: Tensor, family: Tensor, worst: bool) -> Tensor:
    """Which samples are the best, or the best and the worst, of their family: [N] bool."""
    kept = torch.zeros_like(known)
    for one in torch.unique(family[known]):
        rows = ((family == one) & known).nonzero().flatten()
        kept[rows[value[rows].argmax()]] = True
        if worst:
            kept[rows[value[rows].argmin()]] = True
    return kept
