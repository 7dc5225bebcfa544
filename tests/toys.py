"""A policy and rewards that take milliseconds: everything the loop asks of the real ones, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmalign.contracts import Forwards, Key
from mmalign.copies import Copies
from mmalign.data import Prompt, PromptSource
from mmalign.randomness import generator, normals
from mmalign.records import (
    Drawn,
    Evaluation,
    Masks,
    Outcome,
    Pick,
    Plan,
    Prompts,
    RewardSignal,
    Steps,
    Trajectory,
    Unit,
    Where,
    Whole,
)
from mmalign.sde import Noise, euler, log_prob, transition
from mmalign.solvers import Estimate, compressed, multistep

SHAPE = (4, 2, 2)  # of a latent; three of its channels are the picture


class Velocity(nn.Module):
    """A small network that does the same arithmetic for a sample whatever batch it comes in.

    To that end nothing is a matrix product, and a sample is 16 numbers, a multiple of any vector register.
    """

    def __init__(self, width: int = 16, prompts: int = 8) -> None:
        super().__init__()
        self.first = nn.Parameter(0.3 * torch.randn(16, width))
        self.time = nn.Parameter(0.3 * torch.randn(width))
        self.text = nn.Parameter(0.3 * torch.randn(prompts, width))
        self.last = nn.Parameter(0.3 * torch.randn(width, 16))
        self.frozen = nn.Parameter(torch.eye(16), requires_grad=False)

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        hidden = _times(x.flatten(1), self.first) + sigma[:, None] * self.time + self.text[text]
        flat = _times(torch.tanh(hidden), self.last) + _times(x.flatten(1), self.frozen)
        return flat.reshape(x.shape)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    return (x[:, :, None] * matrix).sum(1)


class ToyFlow:
    """Draws 2x2 pictures; by_place: one log-probability per place instead of one per step."""

    def __init__(self, noise: Noise | None = None, by_place: bool = False, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module: nn.Module = Velocity()
        self.noise, self.dims = noise or Noise(), (1,) if by_place else (1, 2, 3)
        self.copies, self.forwards = Copies(self.module), Forwards()

    @torch.no_grad()
    def sample(self, prompts: Prompts, plan: Plan, key: Key) -> Trajectory:
        groups, members = prompts.group.tolist(), prompts.member.tolist()
        names = [(g,) if plan.share_noise else (g, m) for g, m in zip(groups, members, strict=True)]
        x = normals([generator(*key, "first", *name) for name in names], SHAPE)
        streams = [generator(*key, "step", g, m) for g, m in zip(groups, members, strict=True)]
        text, sigmas = torch.tensor([int(t) for t in prompts.text]), torch.linspace(1, 0, plan.steps + 1)
        kept: list[tuple[Tensor, ...]] = []
        start, before = max(plan.stochastic, default=-1) + 1, None
        if plan.tail:
            sigmas = torch.cat([sigmas[:start], compressed(sigmas[start:], plan.tail)])
        for i in range(len(sigmas) - 1):
            shared = plan.share_noise and (not plan.stochastic or i <= plan.stochastic[0])
            state = (
                prompts.group * 1000 + i if shared else (prompts.group * 1000 + prompts.member + 1) * 1000 + i
            )
            first, inverse = _distinct(state)
            sigma, after = (sigmas[j].expand(len(prompts)) for j in (i, i + 1))
            velocity = self.module(x[first], sigma[first], text[first])[inverse]
            self.forwards.sample += len(first)
            if plan.tail and i >= start:
                x, before = multistep(x, velocity, sigmas[i], sigmas[i + 1], before)
                continue
            before = Estimate(x - sigmas[i] * velocity, sigmas[i])
            if i not in plan.stochastic:
                x = euler(x, velocity, sigma, after)
                continue
            step = transition(x, velocity, sigma, after, self.noise, sigmas[1])
            y = step.mean + step.std * normals(streams, SHAPE)
            if i in plan.sde_steps:
                likely = log_prob(y, step, self.noise, self.dims)
                kept.append((x, y, sigma, after, state, step.mean, likely))
            x = y
        names_ = ("x", "next", "sigma", "sigma_next", "state", "mean", "log_prob")
        replay = {
            name: torch.stack(found, 1) for name, found in zip(names_, zip(*kept, strict=True), strict=True)
        }
        replay |= {"text": text, "guard": sigmas[1].expand(len(prompts))}
        likely = replay.pop("log_prob")
        media = torch.sigmoid(2 * x)[:, :3]
        return Trajectory(
            Outcome(prompts, media), likely, torch.ones(likely.shape[:2], dtype=torch.bool), replay
        )

    def picks(self, trajectory: Trajectory, rows: Tensor, size: int) -> Iterator[Pick]:
        columns = trajectory.mask.shape[1]
        row, column = rows.repeat_interleave(columns), torch.arange(columns).repeat(len(rows))
        state = torch.unique(trajectory.replay["state"][row, column], return_inverse=True)[1]
        for first in range(0, int(state.max()) + 1, size):
            inside = (state >= first) & (state < first + size)
            yield Pick(row[inside], column[inside])

    def evaluate(self, trajectory: Trajectory, pick: Pick) -> Evaluation:
        at, replay = (pick.rows, pick.columns), trajectory.replay
        x, sigma = replay["x"][at], replay["sigma"][at]
        first, inverse = _distinct(replay["state"][at])
        velocity = self.module(x[first], sigma[first], replay["text"][pick.rows][first])[inverse]
        if torch.is_grad_enabled():
            self.forwards.train += len(first)
        else:
            self.forwards.reference += len(first)
        guard = replay["guard"][pick.rows]
        step = transition(x, velocity, sigma, replay["sigma_next"][at], self.noise, guard)
        likely = log_prob(replay["next"][at], step, self.noise, self.dims)
        drawn = Drawn(replay["mean"][at], replay["next"][at])
        return Evaluation(likely, step.mean, step.std, velocity, step.step, slope=step.slope, drawn=drawn)

    def locate(self, where: Where, trajectory: Trajectory) -> Tensor:
        columns, sites = trajectory.log_prob.shape[1], trajectory.log_prob.shape[2:]
        if isinstance(where, Whole):
            return torch.ones(1, 1, columns, *[1] * len(sites))
        if isinstance(where, Steps):
            hot = nn.functional.one_hot(where.index, columns).float()
            return hot.reshape(*hot.shape, *[1] * len(sites))
        if isinstance(where, Masks) and sites:
            return where.mask.expand(-1, -1, -1, *sites)
        raise TypeError(f"a toy cannot place {type(where).__name__} on its actions")

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        torch.save(dict(state or self.module.state_dict()), folder / "toy.pt")


def _distinct(state: Tensor) -> tuple[Tensor, Tensor]:
    values, inverse = torch.unique(state, return_inverse=True)
    first = torch.full_like(values, len(state)).scatter_reduce(0, inverse, torch.arange(len(state)), "amin")
    return first, inverse


@dataclass
class Redness:
    """How much more red than green a picture is, with details."""

    name: str = "redness"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        assert isinstance(outcome.media, Tensor)
        red, green = outcome.media[:, 0].mean((1, 2)), outcome.media[:, 1].mean((1, 2))
        details = [{"red": float(r), "is_red": bool(r > 0.5), "word": "x"} for r in red]
        return RewardSignal(self.name, (red - green)[:, None], details=details)


@dataclass
class Brightness:
    """The mean of a picture; by_place: one verdict for each of its four places."""

    name: str = "brightness"
    by_place: bool = False

    def __call__(self, outcome: Outcome) -> RewardSignal:
        assert isinstance(outcome.media, Tensor)
        if not self.by_place:
            return RewardSignal(self.name, outcome.media.mean((1, 2, 3))[:, None])
        values = outcome.media.mean(1).flatten(1)
        mask = torch.eye(4).reshape(1, 4, 1, 2, 2).expand(len(values), -1, -1, -1, -1)
        return RewardSignal(self.name, values, Unit.REGION, where=Masks(mask))


def source(per_iteration: int = 4, group: int = 4, seed: int = 0) -> PromptSource:
    return PromptSource([Prompt(str(i), {"number": i}) for i in range(8)], per_iteration, group, seed)


def names(groups: int, members: int) -> Prompts:
    """Groups of members, all asked for prompt 0."""
    rows = [(g, m) for g in range(groups) for m in range(members)]
    return Prompts(
        ["0"] * len(rows),
        torch.tensor([g for g, _ in rows]),
        torch.tensor([m for _, m in rows]),
        [{}] * len(rows),
    )


class Notes:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.rows: dict[int, list[dict[str, object]]] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics[step] = dict(metrics)

    def rollouts(self, step: int, rows: list[dict[str, object]]) -> None:
        self.rows[step] = list(rows)

    def images(self, step: int, name: str, image: object) -> None:
        pass

    def resume(self, step: int) -> None:
        self.metrics = {k: v for k, v in self.metrics.items() if k < step}

    def close(self) -> None:
        pass
