"""A policy whose velocities are free vectors, to hold objectives of the forward process against formulas."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from mmalign.coupling import Coupled
from mmalign.credit import Peers
from mmalign.records import Evaluation, Minibatch, Noised, Outcome, Pick, Prompts, Trajectory

LATENT = (2, 3, 3)


class Free:
    """N samples with S noised states each, [N, S, *LATENT]; `live` is trained, copies stay.

    What a copy that was not given finds is what the live velocity was in the beginning.
    """

    def __init__(
        self, samples: int = 4, times: int = 1, groups: int = 1, seed: int = 0, shared: bool = False
    ):
        draw = torch.Generator().manual_seed(seed)
        grid = (samples, times, *LATENT)
        self.clean = torch.randn(samples, 1, *LATENT, generator=draw).expand(grid).clone()
        noise = torch.randn(grid, generator=draw)
        sigma = 0.2 + 0.7 * torch.rand(samples, times, generator=draw)
        self.group = torch.arange(samples) // (samples // groups)
        if shared:
            first = torch.stack([(self.group == g).nonzero()[0, 0] for g in self.group])
            noise, sigma = noise[first], sigma[first]
        self.sigma = sigma.reshape(samples, times, 1, 1, 1)
        self.x = (1 - self.sigma) * self.clean + self.sigma * noise
        self.target = noise - self.clean
        self.start = torch.randn(grid, generator=draw)
        self.live = self.start.clone().requires_grad_()
        self.saved: dict[str, Tensor] = {}
        self.copies, self.asked = self, None
        self.questions: list[tuple[str | None, float | None]] = []
        names = Prompts(["a"] * samples, self.group, torch.arange(samples), [{}] * samples)
        self.trajectory = Trajectory(
            Outcome(names, []), torch.zeros(samples, times), torch.ones(samples, times, dtype=torch.bool), {}
        )

    @contextmanager
    def use(self, name):
        self.asked = name
        yield
        self.asked = None

    def evaluate(self, trajectory, pick, guidance=None) -> Evaluation:
        self.questions.append((self.asked, guidance))
        at = (pick.rows, pick.columns)
        velocity = self.live if self.asked is None else self.saved.get(self.asked, self.start)
        state = Noised(self.x[at], self.clean[at], self.sigma[at])
        return Evaluation(torch.zeros(len(pick)), velocity=velocity[at], noised=state)

    def errors(self, velocity: Tensor) -> Tensor:
        """The plain matching errors of velocities [N, S, *LATENT], [N, S]."""
        return (velocity - self.target).square().flatten(2).mean(2)

    def batch(self, advantage: Tensor, weight: Tensor | None = None, fresh: bool = False) -> Minibatch:
        """All actions, with the advantage of each sample [N]."""
        samples, times = self.x.shape[:2]
        pick = Pick(torch.arange(samples).repeat_interleave(times), torch.arange(times).repeat(samples))
        weight = torch.ones(samples) if weight is None else weight
        spread = [x.repeat_interleave(times) for x in (advantage, weight)]
        return Minibatch(self.trajectory, pick, spread[0][None], spread[1] / times, fresh)

    def parts(self, batch: Minibatch, *sizes: int) -> list[Minibatch]:
        """A batch cut into several."""
        out, first = [], 0
        for size in sizes:
            at = slice(first, first + size)
            pick = Pick(batch.pick.rows[at], batch.pick.columns[at])
            out.append(replace(batch, pick=pick, advantage=batch.advantage[:, at], weight=batch.weight[at]))
            first += size
        assert first == len(batch.pick)
        return out


def run(objective, policy: Free, batches: list[Minibatch]) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Loss, gradient of the live velocities and measures of an update over some minibatches."""
    if isinstance(objective, Coupled):
        grid = policy.x.shape[:2]
        advantage, weight = torch.zeros(1, *grid), torch.zeros(grid)
        for batch in batches:
            at = (batch.pick.rows, batch.pick.columns)
            advantage[:, *at], weight[at] = batch.advantage, batch.weight
        peers = Peers(policy.trajectory.outcome.prompts)
        objective = objective.look(policy, batches, advantage, weight, peers)
    policy.live.grad = None
    loss, measures = 0.0, {}
    for batch in batches:
        losses, measures = objective(policy, batch)
        losses.sum().backward()
        loss += float(losses.detach().sum())
    return loss, policy.live.grad.clone(), measures
