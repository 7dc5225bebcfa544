"""G2RPO: all noise of a group in one step, judged at several granularities (Granular GRPO, arXiv:2510.01982).

Singular stochastic sampling: one ODE per prompt is the anchor; at each trained step k every member i leaves
it by one stochastic step of its own, so that the members of (prompt, k) differ by that noise alone.
Multi-granularity advantage integration: each is finished by the ODE on grids of several strides, and the
advantages of its completions are added:

    x_{k+1}^i = mean(x_k) + std_k z_i         x_k of the anchor, one for the group; steps count from the noise
    grid      = k + 1, k + 2, then every lambda-th step, and the end
    A_k^i     = sum over lambda of (R_{k,lambda}^i - mean_i) / (std_i + epsilon)
    J         = E 1/G sum_i min(r A, clip(r, 1 - clip, 1 + clip) A)        no KL; one update for each k

P prompts of G members, T steps, trained steps M with the last at K, strides L. Sampling costs, in forwards,

    P (K + 1)  +  P G sum over k in M of [min(2, T - 1 - k) + sum over lambda in L of max(0, n - 1)]

with n = ceil((T - 2 - k) / lambda), because completions share their first two forwards; training costs P |M|:
one forward at each shared state serves the group. Twice as much with guidance. P G |M| |L| pictures are
judged.

Differs from the public script in cost alone: there each of the anchor's velocities is computed again for
every member, completions share nothing, and all run one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from mmalign.credit import Credit, zscore
from mmalign.objectives import ClippedRatio
from mmalign.records import Plan
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class G2RPO:
    """Credit for single steps without a guess: what differs in a group is the noise of one step."""

    steps: int = 16  # denoising steps in training
    trained: tuple[int, ...] = ()  # steps that noise is drawn at, one at a time; empty: the first half
    strides: tuple[int, ...] = (1, 2, 3)  # granularities; each makes advantages surer and costs completions
    apart: bool = True  # an update for each trained step, as published; false: one for all of them
    clip: float = 1e-4  # trust region of the ratio; made for log-probabilities that are means over the latent
    epsilon: float = 1e-8  # added to the std of a group; raise it where coarse completions hardly differ
    advantage_clip: float = 5.0  # bound on the advantage
    noise: Noise = field(default_factory=lambda: Noise("flow", 0.7))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("G2RPO needs noise to learn from: noise.level must be above 0 (usual: 0.7)")
        if len(set(self.strides)) < len(self.strides):
            raise ValueError(f"strides must differ from each other, got {self.strides}")
        _ = self.plan

    @property
    def plan(self) -> Plan:
        trained = self.trained or tuple(range(self.steps // 2))
        return Plan(self.steps, trained, share_noise=True, strides=self.strides, singular=True)

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        return Algorithm(
            plans=lambda iteration, seed: [self.plan],
            credit=Credit(weights, partial(zscore, epsilon=self.epsilon), clip=self.advantage_clip),
            objective=ClippedRatio(self.clip, self.clip),
            noise=self.noise,
            apart=self.apart,
        )
