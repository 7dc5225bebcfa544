"""Rewards that are differentiated through: the objective draws on by itself, and asks them where it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from mmalign.contracts import DifferentiableReward, DrawsOn, LatentReward, Policy, Reward
from mmalign.records import Minibatch, Outcome, Plan

R = TypeVar("R")


@dataclass
class Differentiated:
    """The weighted sum of rewards as a function of clean latents, which are decoded for them; differentiable.

    weights: by the rewards' names; 0 is watched, not trained on. cost: forwards that an action takes in the
    update under a plan. The trainer hands the models over before the first update.
    """

    weights: Mapping[str, float]
    cost: Callable[[Plan], int]
    models: list[tuple[float, DifferentiableReward]] = field(default_factory=list)

    def meet(self, rewards: Sequence[Reward]) -> None:
        """Take the rewards; TypeError if one of them has no gradient."""
        kind: Any = DifferentiableReward  # a protocol, which a checker takes for no class
        self.models = weighted(rewards, self.weights, kind, "be differentiated", "differentiate")

    def __call__(
        self, policy: DrawsOn, batch: Minibatch, latents: Tensor, words: Callable[[str], str] | None = None
    ) -> Tensor:
        """The reward [n] of clean latents [n, *latent]; words: changes the prompts that rewards are told."""
        prompts = batch.trajectory.outcome.prompts.take(batch.pick.rows.cpu())
        if words is not None:
            prompts = replace(prompts, text=[words(text) for text in prompts.text])
        outcome = Outcome(prompts, policy.decode(latents))
        parts = [weight * reward.differentiate(outcome) for weight, reward in self.models]
        return sum(parts[1:], parts[0])


@dataclass
class OnLatents:
    """The weighted sum of rewards as a function of noisy latents, which are never decoded; differentiable.

    weights, cost: as of `Differentiated`.
    """

    weights: Mapping[str, float]
    cost: Callable[[Plan], int]
    models: list[tuple[float, LatentReward]] = field(default_factory=list)

    def meet(self, rewards: Sequence[Reward]) -> None:
        """Take the rewards; TypeError if one of them does not read latents."""
        kind: Any = LatentReward
        self.models = weighted(rewards, self.weights, kind, "read latents", "on_latents")

    def __call__(self, batch: Minibatch, z: Tensor, sigma: Tensor) -> Tensor:
        """The reward [n] of latents z [n, *latent] at the noise level sigma (scalar)."""
        prompts = batch.trajectory.outcome.prompts.take(batch.pick.rows.cpu())
        parts = [weight * reward.on_latents(prompts, z, sigma) for weight, reward in self.models]
        return sum(parts[1:], parts[0])


def weighted(
    rewards: Sequence[Reward], weights: Mapping[str, float], kind: type[R], deed: str, method: str
) -> list[tuple[float, R]]:
    """The rewards that are trained on, with their weights; TypeError where one is not of the kind."""
    found: list[tuple[float, R]] = []
    for reward in rewards:
        if weight := weights[reward.name]:
            if not isinstance(reward, kind):
                raise TypeError(
                    f"reward {reward.name!r} cannot {deed}, and this algorithm needs it to: "
                    f"give it weight 0 to watch it, and train on one that has `{method}`"
                )
            found.append((weight, reward))
    if not found:
        raise ValueError(f"at least one reward needs a weight other than 0, got {dict(weights)}")
    return found


def drawing_on(policy: Policy) -> DrawsOn:
    """The policy, if it can be differentiated through."""
    if not isinstance(policy, DrawsOn):
        raise TypeError(f"{type(policy).__name__} cannot be differentiated through: it lacks `halted`")
    return policy
