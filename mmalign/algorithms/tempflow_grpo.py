"""TempFlow-GRPO: branches at single steps, weighed by their noise (arXiv:2508.04324).

Trajectory branching: the ODE from the initial noise to step k, one stochastic step with a noise for each
member, and the ODE to the end, so that the reward of a branch is the reward of its action at step k. Seed
grouping: only members that start from the same noise are compared. Noise-aware weighting: the gradient of a
Gaussian log-ratio goes like 1 / std, which is largest where least is decided; it is made even by

    w_k = std_k / mean over the trained steps of std
    J   = E sum_k w_k min(r A, clip(r) A) - kl KL

The steps take turns, `width` of them an iteration. P prompts of G members from s starts, T steps, branches at
k in M with the last at K: sampling costs P s (K + 1) + P G sum over k in M of (T - 1 - k) forwards, training
P s |M|, as much again of the reference where kl > 0; twice with guidance.

The paper does not say how its branching steps are drawn; here they take turns. Its public repository holds no
training code. w multiplies the advantage, and so the gain but not the KL, as in the formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from mmalign.credit import Credit, zscore
from mmalign.objectives import REFERENCE, ClippedRatio, KLForm
from mmalign.plans import in_turn
from mmalign.records import Plan, Trajectory
from mmalign.sde import Noise, schedule
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class TempFlowGRPO:
    """A process reward without a reward model of the process: noise at one step, and its outcome."""

    steps: int = 10  # denoising steps in training
    trained: tuple[int, ...] = ()  # steps that take turns; empty: all but the last, which draws no noise
    width: int = 1  # of them in an iteration; each costs as many completions and pictures again
    starts: int = 4  # initial noises of a prompt; prompts.group / starts members branch from each
    seed_grouping: bool = True  # compare members of one start; false: all members of a prompt
    clip: float = 1e-4  # trust region of the ratio; made for log-probabilities that are means over the latent
    kl: float = 0.04  # pull towards the base model; raise it to keep quality and diversity, 0 saves a forward
    kl_form: KLForm = "gaussian"  # gaussian, per_step (Flow-GRPO's early code) or velocity
    advantage_clip: float = 5.0  # bound on the advantage, before it is weighed
    noise: Noise = field(default_factory=lambda: Noise("flow", 0.7))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError(
                "TempFlowGRPO needs noise to learn from: noise.level must be above 0 (usual: 0.7)"
            )
        if not 1 <= self.width <= len(self.among):
            raise ValueError(f"width must lie in 1..{len(self.among)}, the trained steps, got {self.width}")
        _ = self.plan(self.among)

    @property
    def among(self) -> tuple[int, ...]:
        return self.trained or tuple(range(self.steps - 1))

    def plan(self, branches: tuple[int, ...]) -> Plan:
        return Plan(self.steps, branches, share_noise=True, starts=self.starts, singular=True)

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        return Algorithm(
            plans=in_turn(self.among, self.width, self.plan),
            credit=Credit(
                weights,
                zscore,
                "total_first",
                clip=self.advantage_clip,
                compare="start" if self.seed_grouping else "group",
                scale=partial(noise_aware, self.noise, self.among),
            ),
            objective=ClippedRatio(self.clip, self.clip, self.kl, self.kl_form),
            noise=self.noise,
            copies={REFERENCE: 1.0} if self.kl else {},
        )


def noise_weights(sigmas: Tensor, noise: Noise, among: Sequence[int]) -> Tensor:
    """The std of every step of a schedule [T + 1] over their mean at the steps `among`, [T]."""
    std = schedule(sigmas, noise).std.flatten()
    return std / std[list(among)].mean()


def noise_aware(noise: Noise, among: Sequence[int], trajectory: Trajectory) -> Tensor:
    """How far the advantage of each action carries, [B, S]."""
    if trajectory.plan is None or trajectory.sigmas is None:
        raise TypeError("TempFlowGRPO needs a policy that denoises, and tells its plan and schedule")
    weights = noise_weights(trajectory.sigmas, noise, among)
    return weights[list(trajectory.plan.sde_steps)].expand(len(trajectory), -1)
