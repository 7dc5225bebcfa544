"""DDPO: policy gradients on the chain of denoising steps (Black et al. 2023, arXiv:2305.13301).

    DDPO-IS  max  E sum_s min(r A, clip(r, 1 - clip, 1 + clip) A)       r from the steps as they were taken
    DDPO-SF  max  E sum_s log p(x_(s-1) | x_s) A                        clip: null, training.updates: 1

With kl > 0 either is held near the base model, - kl KL(step | step of the base model) at each step of the
samples, as in DPOK (arXiv:2305.16381), whose learned baseline is `dpok.py`.

    A = (R - mean) / std of the prompt's own samples, bounded by advantage_clip

With a buffer these are the prompt's latest rewards, those of this iteration among them, also of iterations
before; a prompt with too few of them yet takes mean and std of the whole batch. That is how the public code
compares samples of which each iteration draws few of a prompt, or one.

A ratio without a clip has the gradient of DDPO-SF while it is 1, as it is in the first update of an
iteration. Steps are those of DDIM with eta = noise.level, on models that predict noise as on flow models. N
samples of T steps cost N T forwards to sample and N (T - 1) to train, twice as many with guidance, plus
N (T - 1) of the reference where kl > 0.

Differs from the public code in that the buffer is off by default, for groups are drawn whole here, and in
that the last step draws no noise and is no action.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmalign.credit import Credit, Peers, zscore
from mmalign.objectives import REFERENCE, ClippedRatio
from mmalign.plans import every_step
from mmalign.randomness import seed_of
from mmalign.records import RewardSignal, Trajectory
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class DDPO:
    """Every step but the last is an action; rewards are compared with those of the same prompt."""

    steps: int = 50  # denoising steps in training; fewer are faster
    clip: float | None = 1e-4  # trust region of the ratio; null: none, which is REINFORCE in one update
    kl: float = 0.0  # pull towards the base model (usual: 0.01 to 0.1); raise it to keep quality
    advantage_clip: float = 5.0  # bound on the advantage
    # Latest rewards of each prompt, of all iterations, that it is compared with (published: 32); 0: its group
    buffer: int = 0
    least: int = 16  # of them, below which a prompt is compared with the whole batch
    noise: Noise = field(default_factory=lambda: Noise("ddim", 1.0))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("DDPO needs noise to learn from: noise.level must be above 0 (usual: 1.0)")
        if self.buffer and not 2 <= self.least <= self.buffer:
            raise ValueError(f"least must lie in 2..{self.buffer}, the size of the buffer, got {self.least}")

    @property
    def alone(self) -> bool:
        """Whether prompts.group may be 1: past samples of the prompt stand in for its group."""
        return self.buffer > 0

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        clip = math.inf if self.clip is None else self.clip
        credit = Credit(weights, zscore, "total_first", "whole", clip=self.advantage_clip)
        memory = None
        if self.buffer:
            memory = PastRewards(self.buffer, self.least)
            credit = Remembered(
                weights, zscore, "total_first", "whole", clip=self.advantage_clip, past=memory
            )
        return Algorithm(
            plans=every_step(self.steps),
            credit=credit,
            objective=ClippedRatio(clip, clip, self.kl),
            noise=self.noise,
            copies={REFERENCE: 1.0} if self.kl else {},
            alone=self.alone,
            memory=memory,
        )


class PastRewards:
    """The latest rewards of each prompt, by a number of its line."""

    def __init__(self, size: int, least: int) -> None:
        self.size, self.least = size, least
        self.rewards: dict[int, list[float]] = {}

    def compare(self, values: Tensor, valid: Tensor, prompt: Tensor, epsilon: float = 1e-4) -> Tensor:
        """Take in a batch, and give its advantages; all are [N], prompt: int64."""
        for number in torch.unique(prompt).tolist():
            new = values[(prompt == number) & valid].tolist()
            self.rewards[number] = [*self.rewards.get(number, []), *new][-self.size :]
        out = torch.zeros(len(values), dtype=torch.float64)
        for number in torch.unique(prompt).tolist():
            past, rows = self.rewards[number], (prompt == number) & valid
            peers = torch.tensor(past).double() if len(past) >= self.least else values[valid].double()
            if len(peers) > 1 and peers.max() > peers.min():
                spread = peers.std(correction=0) + epsilon
                out[rows] = (values[rows].double() - peers.mean()) / spread
        return out

    def observe(
        self, signals: Sequence[RewardSignal], trajectory: Trajectory, peers: Peers
    ) -> dict[str, float]:
        """The credit has taken the batch in."""
        full = [len(past) >= self.least for past in self.rewards.values()]
        return {"buffer/prompts": float(len(full)), "buffer/full_share": sum(full) / max(1, len(full))}

    def note(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, object]:
        return {"rewards": {number: list(past) for number, past in self.rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards = {int(number): list(past) for number, past in state["rewards"].items()}


@dataclass(frozen=True)
class Remembered(Credit):
    """Compares the total reward with the latest of the same prompt."""

    past: PastRewards = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.combine != "total_first":
            raise ValueError(
                "algorithm.buffer remembers one reward a sample, so that rewards cannot be kept apart: take "
                "a composition that adds them up first, or buffer: 0"
            )

    def compared(
        self, values: Tensor, valid: Tensor, trajectory: Trajectory, peers: Peers, aligned: bool
    ) -> Tensor:
        prompts = trajectory.outcome.prompts
        lines = zip(prompts.text, prompts.extra, strict=True)
        numbers = [seed_of(text, json.dumps(extra, sort_keys=True, default=str)) for text, extra in lines]
        prompt = peers.all(torch.tensor(numbers, dtype=torch.int64))
        return self.past.compare(values[:, 0], valid[:, 0], prompt)[:, None]
