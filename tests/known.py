"""Mixtures of Gaussians as policies, and their rewards: everything the loop asks of the real ones, exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmalign.contracts import LoraSettings, PolicySettings
from mmalign.credit import center
from mmalign.data import Prompt, PromptSource
from mmalign.lab.gaussians import GaussianWorld, Mixture, points
from mmalign.pipelines.flow import FlowPolicy
from mmalign.records import Outcome, RewardSignal
from mmalign.sde import Noise
from mmalign.trainer import Algorithm

MEMORYLESS = Noise("flow", 2**0.5, reduction="sum")  # the end is independent of the first noise
TWO = Mixture(torch.tensor([0.7, 0.3]), torch.tensor([[-1.5], [1.5]]), torch.tensor([0.15, 0.1]))


def policy_of(target: Mixture, noise: Noise = MEMORYLESS) -> FlowPolicy:
    """A policy over a target, all of whose parameters are trained."""
    settings = PolicySettings("gaussians", lora=LoraSettings(rank=0))
    return FlowPolicy(GaussianWorld(target), settings, noise, chunk=10**6)


def law_of(policy: FlowPolicy) -> Mixture:
    """The target that a policy has by now."""
    law = policy.adapter.network.law
    return Mixture(law.weight.detach(), law.mean.detach(), law.variance.detach())


@dataclass
class Judge:
    """A reward of points, [n, D] to [n], that can also be differentiated."""

    value: Callable[[Tensor], Tensor]
    name: str = "value"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, self.value(points(outcome.media))[:, None])

    def differentiate(self, outcome: Outcome) -> Tensor:
        return self.value(points(outcome.media))


def unscaled(algorithm: Algorithm) -> Algorithm:
    """The same with the plain distance to the mean for its advantage, so that beta keeps its meaning."""
    return replace(algorithm, credit=replace(algorithm.credit, normalize=center, clip=1e9))


def source(members: int, groups: int = 1) -> PromptSource:
    return PromptSource([Prompt(f"point {i}") for i in range(groups)], groups, members, 0)
