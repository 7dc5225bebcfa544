"""SAGE-GRPO: exact noise, steps of equal pull, and two trust regions (arXiv:2603.21872).

    J   = E 1/(G S) sum_i sum_s min(r e_s A_i, clip(r, 1 - clip, 1 + clip) e_s A_i)
          - anchor_kl KL(policy | anchor) - step_kl KL(policy | last)
    e_s = (std_s / |d mean_s / d v|) / mean over the steps of the same

The noise integrates its rate over each step (`mmalign.sde`, kind sage). e_s gives the log-ratio of every step
the same pull on the velocity. The anchor is a copy that takes over the policy after every `move_every`
iterations, so that it may wander, but not fast; `last` is the policy that the iteration began with, so that
no update leads far. KL is the exact one of the Gaussian steps.

Costs what Flow-GRPO costs: N samples of T steps N T forwards to sample, N (T - 1) to train and as many of the
anchor where anchor_kl > 0, and of `last` but for the first update where step_kl > 0; twice with guidance.

The paper leaves open the weights of the two regions, how often the anchor moves and how the equalizer is
normalized; the defaults here are ours. No code is public.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from mmalign.contracts import Policy
from mmalign.copies import renewed
from mmalign.credit import Credit, zscore
from mmalign.objectives import LAST, Measures, clipped_gain, divergence, frozen, ratio_measures, summed
from mmalign.plans import every_step
from mmalign.records import Minibatch, Trajectory
from mmalign.sde import Noise, schedule
from mmalign.trainer import Algorithm

ANCHOR = "anchor"


@dataclass(frozen=True)
class SAGEGRPO:
    """Explores close to the data, and moves on in steps that are bounded twice."""

    steps: int = 10  # denoising steps in training
    share_noise: bool = False  # one initial noise per group: cheaper, but explores less
    clip: float = 1e-4  # trust region of the ratio; made for log-probabilities that are means over the latent
    equalize: bool = True  # give every step the same pull on the velocity; else late steps dominate
    anchor_kl: float = 0.01  # pull towards the anchor; raise it to wander less, 0 saves a forward
    move_every: int = 20  # iterations after which the anchor takes over the policy; too few bound nothing
    step_kl: float = 0.01  # pull towards the policy that sampled; raise it where updates are unsteady
    advantage_clip: float = 5.0  # bound on the advantage, before it is equalized
    noise: Noise = field(default_factory=lambda: Noise("sage", 0.7))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("SAGEGRPO needs noise to learn from: noise.level must be above 0 (usual: 0.7)")
        if self.anchor_kl < 0 or self.step_kl < 0 or self.move_every < 1:
            raise ValueError(
                f"anchor_kl and step_kl must not be negative, move_every at least 1, got {self.anchor_kl}, "
                f"{self.step_kl}, {self.move_every}"
            )

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        regions = {ANCHOR: self.anchor_kl, LAST: self.step_kl}
        rules: dict[str, float | Callable[[int], float]] = {
            ANCHOR: partial(renewed, self.move_every),
            LAST: 0.0,
        }
        return Algorithm(
            plans=every_step(self.steps, self.share_noise),
            credit=Credit(
                weights,
                zscore,
                "total_first",
                "whole",
                clip=self.advantage_clip,
                scale=partial(equalized, self.noise) if self.equalize else None,
            ),
            objective=TrustRegions(self.clip, {name: kl for name, kl in regions.items() if kl}),
            noise=self.noise,
            copies={name: rule for name, rule in rules.items() if regions[name]},
        )


def equalized(noise: Noise, trajectory: Trajectory) -> Tensor:
    """How far the advantage of each action carries, [B, S]: against the pull of its log-ratio."""
    if trajectory.plan is None or trajectory.sigmas is None:
        raise TypeError("SAGEGRPO needs a policy that denoises, and tells its plan and schedule")
    moved = schedule(trajectory.sigmas, noise)
    weights = (moved.std / moved.slope).flatten()[list(trajectory.plan.sde_steps)]
    return (weights / weights.mean()).expand(len(trajectory), -1)


@dataclass(frozen=True)
class TrustRegions:
    """The clipped ratio, and a pull towards each of some copies."""

    clip: float
    regions: Mapping[str, float]  # copy -> weight of the divergence from it

    @property
    def clip_range(self) -> float | None:
        return self.clip

    @property
    def idle_at_zero(self) -> bool:
        return not self.regions

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        # On fresh samples the policy is still its last one: neither distance nor gradient.
        there = {
            name: frozen(policy, batch, name) for name in self.regions if not (batch.fresh and name == LAST)
        }
        new = policy.evaluate(batch.trajectory, batch.pick)
        log_ratio = new.log_prob - batch.log_prob
        gained = clipped_gain(log_ratio, batch.advantage, self.clip, self.clip)
        measures = ratio_measures(log_ratio, self.clip, self.clip)
        penalty: Tensor | float = 0.0
        for name, copy in there.items():
            away = divergence(new, copy).expand_as(log_ratio)
            measures[f"kl/{name}"] = away.detach()
            penalty = penalty + self.regions[name] * away
        return summed(-gained, penalty, batch.weight), measures
