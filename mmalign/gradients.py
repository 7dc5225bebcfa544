"""Rewards that are differentiated through: the objective draws the end of the way itself and asks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from mmalign.contracts import DifferentiableReward, DrawsOn, Policy, Reward
from mmalign.records import Minibatch, Outcome, Plan


@dataclass
class Differentiated:
    """The weighted sum of rewards as a function of latents, differentiable.

    weights: by the rewards' names; 0 is watched, not trained on. cost: forwards that an action takes in the
    update under a plan. The trainer hands the models over before the first update.
    """

    weights: Mapping[str, float]
    cost: Callable[[Plan], int]
    models: list[tuple[float, DifferentiableReward]] = field(default_factory=list)

    def meet(self, rewards: Sequence[Reward]) -> None:
        """Take the rewards; TypeError if one of them has no gradient."""
        self.models = []
        for reward in rewards:
            if weight := self.weights[reward.name]:
                if not isinstance(reward, DifferentiableReward):
                    raise TypeError(
                        f"reward {reward.name!r} cannot be differentiated, and this algorithm has to: "
                        "give it weight 0 to watch it, and train on one that has `differentiate`"
                    )
                self.models.append((weight, reward))
        if not self.models:
            raise ValueError(f"at least one reward needs a weight other than 0, got {dict(self.weights)}")

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


def drawing_on(policy: Policy) -> DrawsOn:
    """The policy, if it can be differentiated through."""
    if not isinstance(policy, DrawsOn):
        raise TypeError(f"{type(policy).__name__} cannot be differentiated through: it lacks `halted`")
    return policy
