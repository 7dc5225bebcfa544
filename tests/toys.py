"""A policy and rewards that take milliseconds: everything the loop asks of the real ones, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmalign.contracts import Forwards, Key
from mmalign.copies import Copies
from mmalign.data import Prompt, PromptSource
from mmalign.randomness import generator, normals
from mmalign.records import (
    Evaluation,
    Masks,
    Noised,
    Outcome,
    Pick,
    Plan,
    Prompts,
    RewardSignal,
    State,
    Steps,
    Trajectory,
    Unit,
    Where,
    Whole,
)
from mmalign.rollout import distinct, noise_again, retake, roll_out
from mmalign.sde import Noise

SHAPE = (4, 2, 2)  # of a latent; three of its channels are the picture


class Velocity(nn.Module):
    """A small network that does the same arithmetic for a sample whatever batch it comes in.

    To that end nothing is a matrix product, and transcendental functions are `exact`.
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
        flat = _times(exact(torch.tanh, hidden), self.last) + _times(x.flatten(1), self.frozen)
        return flat.reshape(x.shape)


def exact(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of every element that gives a sample the same in any batch.

    The last elements of a tensor go through other instructions where they do not fill two vector registers,
    which are 32 numbers at most: two samples of 16.
    """
    return function(torch.cat([x, x[-1:]]) if len(x) % 2 else x)[: len(x)]


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    return (x[:, :, None] * matrix).sum(1)


class ToyFlow:
    """Draws 2x2 pictures; by_place: one log-probability per place instead of one per step.

    precision: fp16 rounds what the network gives, and the gradient that it is given.
    """

    def __init__(
        self, noise: Noise | None = None, by_place: bool = False, seed: int = 0, precision: str = "fp32"
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module: nn.Module = Velocity()
        self.noise, self.dims = noise or Noise(), (1,) if by_place else (1, 2, 3)
        self.copies, self.forwards, self.precision = Copies(self.module), Forwards(), precision

    @torch.no_grad()
    def sample(self, prompts: Prompts, plan: Plan, key: Key) -> Trajectory:
        text, sigmas = torch.tensor([int(t) for t in prompts.text]), torch.linspace(1, 0, plan.steps + 1)

        def velocity(x: Tensor, sigma: Tensor, sample: Tensor) -> Tensor:
            self.forwards.sample += len(x)
            return self._velocity(x, sigma, text[sample])

        rolled = roll_out(prompts, plan, key, sigmas, SHAPE, self.noise, self.dims, velocity)
        latents = torch.stack([view.x[view.row] for view in rolled.views], 1).flatten(0, 1)
        media = exact(torch.sigmoid, 2 * latents)
        replay = noise_again(prompts, latents, plan.renoise, sigmas, key) if plan.renoise else rolled.actions
        replay |= {"text": text, "guard": sigmas[1].expand(len(prompts))}
        likely = replay.pop("log_prob", torch.zeros(len(prompts), plan.actions))
        mask = torch.ones(len(prompts), plan.actions, dtype=torch.bool)
        if plan.learned is not None:
            mask &= torch.tensor([step in plan.learned for step in plan.sde_steps])
        outcome = Outcome(prompts, media[:, :3], plan.views)
        return Trajectory(outcome, likely, mask, replay, plan, sigmas)

    def picks(self, trajectory: Trajectory, rows: Tensor, size: int) -> Iterator[Pick]:
        place, column = trajectory.mask[rows].nonzero(as_tuple=True)
        row = rows[place]
        state = distinct(trajectory.replay["state"][row, column])[1]
        for first in range(0, int(state.max()) + 1 if len(state) else 0, size):
            inside = (state >= first) & (state < first + size)
            yield Pick(row[inside], column[inside])

    def evaluate(self, trajectory: Trajectory, pick: Pick, guidance: float | None = None) -> Evaluation:
        at, replay = (pick.rows, pick.columns), trajectory.replay
        first, inverse = distinct(replay["state"][at])
        x, sigma, text = replay["x"][at], replay["sigma"][at], replay["text"][pick.rows]
        velocity = self._velocity(x[first], sigma[first], text[first])[inverse]
        if torch.is_grad_enabled():
            self.forwards.train += len(first)
        else:
            self.forwards.reference += len(first)
        if "clean" in replay:
            noised = Noised(x, replay["clean"][pick.rows], sigma.reshape(-1, 1, 1, 1))
            return Evaluation(trajectory.log_prob[at], velocity=velocity, noised=noised)
        return retake(trajectory, pick, velocity, self.noise, self.dims)

    def _velocity(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        found: Tensor = self.module(x, sigma, text)
        return found.half().float() if self.precision == "fp16" else found

    def states(self, trajectory: Trajectory, pick: Pick) -> State:
        at, replay = (pick.rows, pick.columns), trajectory.replay
        text = nn.functional.one_hot(replay["text"][pick.rows], 8).float()
        return State(replay["x"][at], replay["sigma"][at], text)

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

    def load(self, folder: Path) -> None:
        self.module.load_state_dict(torch.load(folder / "toy.pt", weights_only=True))


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


def initial(prompts: Prompts, shape: Sequence[int], key: Key) -> Tensor:
    """The noise that samples which share none start from, [B, *shape]."""
    names = zip(prompts.group.tolist(), prompts.member.tolist(), strict=True)
    return normals([generator(*key, "initial", 0, *name) for name in names], shape)


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
