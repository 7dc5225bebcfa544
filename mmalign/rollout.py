"""Follows a plan through the schedule: from noise over the actions to every completion, by any network.

Members of a group that have drawn the same noise so far are in one state. A state is kept once and asked for
its velocity once, whoever is in it: the prefix of a group that shares its noise, the shared trunks of a tree,
the ODE that all singular actions leave. Completions move together, one batch at each step of the schedule for
all that leaves it anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mmalign.contracts import Key
from mmalign.randomness import generator, normals
from mmalign.records import Drawn, Evaluation, Pick, Plan, Prompts, Renoise, Trajectory
from mmalign.sde import Noise, Transition, euler, levels, log_prob, transition
from mmalign.solvers import Estimate, compressed, multistep

RECORDED = ("x", "x_next", "sigma", "sigma_next", "state", "mean", "log_prob")  # of every action


class Velocity(Protocol):
    """A network: the velocity [n, *latent] of x [n, *latent] at sigma [n], asked for the samples [n]."""

    def __call__(self, x: Tensor, sigma: Tensor, sample: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class States:
    """The distinct states x [n, *latent] of a batch in one place of the schedule.

    sample: [n], one of the samples that are in each. row: [B], the state that each sample is in.
    """

    x: Tensor
    sample: Tensor
    row: Tensor


@dataclass(frozen=True)
class Rollout:
    """What came of a plan: of every action what `RECORDED` names, [B, S, ...]; finished latents by view.

    halted: the states after `Plan.lead` steps. Where samples are given, there are no views.
    """

    actions: dict[str, Tensor]
    views: list[States]
    halted: States


def roll_out(
    prompts: Prompts,
    plan: Plan,
    key: Key,
    sigmas: Tensor,
    shape: Sequence[int],
    noise: Noise,
    dims: tuple[int, ...],
    velocity: Velocity,
) -> Rollout:
    """Sample by a plan. sigmas: [steps + 1]; shape: of one latent; dims: see `sde.log_prob`."""
    if plan.stochastic and noise.level == 0:
        raise ValueError(
            f"noise.level is 0, zero SDE noise with an SDE algorithm: steps {plan.stochastic} are to be "
            "stochastic; give it a level above 0, or a plan without sde_steps"
        )
    if plan.share_noise:
        _check_texts(prompts)
    walk = _Walk(plan, prompts.group.cpu(), prompts.member.cpu(), key, sigmas, shape, noise, dims)
    now = walk.begin()
    leaves: list[tuple[int, States]] = []  # where completions begin, and from what
    actions: dict[str, Tensor] = {}  # filled in as they are taken, for a list to stack would hold them twice
    before = None
    for step in range(plan.lead):
        found = velocity(now.x, sigmas[step].expand(len(now.x)), now.sample)
        ahead = replace(now, x=euler(now.x, found, sigmas[step], sigmas[step + 1]))
        if step not in plan.stochastic:
            now = ahead
            continue
        after, action = walk.act(now, found, step)
        if step in plan.sde_steps:
            column, taken = plan.sde_steps.index(step), len(plan.sde_steps)
            for name, values in action.items():
                if name not in actions:
                    actions[name] = values.new_empty(len(values), taken, *values.shape[1:])
                actions[name][:, column] = values
        before = Estimate((now.x - sigmas[step] * found)[now.row[after.sample]], sigmas[step])
        if plan.values:
            leaves.append((step + 1, ahead))
        if plan.singular:
            leaves.append((step + 1, after))
        now = ahead if plan.singular else after
    if plan.given:
        return Rollout(actions, [], now)
    if not plan.singular:
        leaves.append((plan.lead, now))
    views = [walk.speed(now, before, velocity)] if plan.tail else walk.finish(leaves, velocity)
    return Rollout(actions, views, now)


@dataclass(frozen=True)
class _Walk:
    """The moves of a rollout; all but the velocity follows from these."""

    plan: Plan
    group: Tensor
    member: Tensor
    key: Key
    sigmas: Tensor
    shape: Sequence[int]
    noise: Noise
    dims: tuple[int, ...]

    def begin(self) -> States:
        """Initial noise, one state for all members that share it.

        It is as large as x is at the schedule's first sigma, where that is short of 1.
        """
        kin = self.plan.kin(self.member, 0)
        sample, row = distinct(state_ids(self.group, kin, 0))
        size = torch.hypot(self.sigmas[0], 1 - self.sigmas[0])
        return States(size * self._draw("initial", 0, kin[sample], sample), sample, row)

    def act(self, now: States, velocity: Tensor, step: int) -> tuple[States, dict[str, Tensor]]:
        """The stochastic step from every state, once for each of its heirs; also what is recorded of it."""
        plan, heir, kin = self.plan, self.plan.heirs(self.member, step), self.plan.kin(self.member, step)
        sample, row = distinct(state_ids(self.group, heir, step + 1))
        parent = now.row[sample]
        drawn = self._draw("noise", step, heir[sample], sample)
        if step in plan.splits and plan.ways > 1:
            drawn = siblings(self._draw("siblings", step, kin[sample], sample), drawn, plan.correlation)
        x, noise = now.x[parent], self.noise
        if step in plan.sde_steps:
            noise = noise_of(noise, plan, plan.sde_steps.index(step))
        sigma, sigma_next = (self.sigmas[i].expand(len(sample)) for i in (step, step + 1))
        moved = transition(x, velocity[parent], sigma, sigma_next, noise, self.sigmas[1])
        x_next = moved.mean + moved.std * drawn
        likely = log_prob(x_next, moved, noise, self.dims)
        found = {"x": x, "x_next": x_next, "sigma": sigma, "sigma_next": sigma_next, "mean": moved.mean}
        recorded = {name: values[row] for name, values in (found | {"log_prob": likely}).items()}
        return States(x_next, sample, row), recorded | {"state": state_ids(self.group, kin, step)}

    def finish(self, leaves: Sequence[tuple[int, States]], velocity: Velocity) -> list[States]:
        """Follow the ODE from every leaf to the end, once per stride; at each step all move in one batch.

        Completions of a leaf that have come the same way are one state and ask for one velocity. What the
        schedule leaves of noise at its end counts as signal.
        """
        plan, sigmas = self.plan, self.sigmas
        ways = [
            (leaf, plan.way(start, stride))
            for leaf, (start, _) in enumerate(leaves)
            for stride in plan.strides
        ]
        now = [leaves[leaf][1] for leaf, _ in ways]
        for step in range(min(start for start, _ in leaves), plan.steps):
            come = {i: (leaf, way[: way.index(step)]) for i, (leaf, way) in enumerate(ways) if step in way}
            first = {came: now[i] for i, came in come.items()}
            if not first:
                continue
            asked = list(first.values())
            x, sample = torch.cat([s.x for s in asked]), torch.cat([s.sample for s in asked])
            parts = torch.split(velocity(x, sigmas[step].expand(len(x)), sample), [len(s.x) for s in asked])
            found = dict(zip(first, parts, strict=True))
            for i, came in come.items():
                after = ways[i][1][len(came[1]) + 1]
                now[i] = replace(now[i], x=euler(now[i].x, found[came], sigmas[step], sigmas[after]))
        return [replace(end, x=end.x / (1 - sigmas[-1])) for end in now]

    def speed(self, now: States, before: Estimate | None, velocity: Velocity) -> States:
        """Follow the ODE to the end by `Plan.tail` steps of second order; before: the last estimate."""
        grid, x = compressed(self.sigmas[self.plan.lead :], self.plan.tail), now.x
        for sigma, sigma_next in pairwise(grid):
            found = velocity(x, sigma.expand(len(x)), now.sample)
            x, before = multistep(x, found, sigma, sigma_next, before)
        return replace(now, x=x / (1 - grid[-1]))

    def _draw(self, purpose: str, step: int, kin: Tensor, sample: Tensor) -> Tensor:
        """Normal noise named by purpose, step, group and kin [n]: the same in any batch."""
        names = zip(self.group[sample].tolist(), kin.tolist(), strict=True)
        streams = [generator(*self.key, purpose, step, *name) for name in names]
        return normals(streams, self.shape, self.sigmas.device)


def noise_again(
    prompts: Prompts, clean: Tensor, renoise: Renoise, sigmas: Tensor, key: Key
) -> dict[str, Tensor]:
    """Finished latents [B, *latent] noised again: x [B, times, *latent] at sigma [B, times], by name."""
    times, names = renoise.times, zip(prompts.group.tolist(), prompts.member.tolist(), strict=True)
    streams = [generator(*key, "renoise", *(name[:1] if renoise.shared else name)) for name in names]
    drawn = torch.stack([torch.rand(times, generator=stream) for stream in streams])
    sigma = levels(renoise, sigmas, drawn.to(clean.device))
    noise = normals(streams, (times, *clean.shape[1:]), clean.device)
    share = sigma.reshape(*sigma.shape, *[1] * (clean.ndim - 1))
    x = (1 - share) * clean[:, None] + share * noise
    state = torch.stack([state_ids(prompts.group, prompts.member, i) for i in range(times)], 1)
    return {"x": x, "sigma": sigma, "state": state, "clean": clean}


def halt(
    prompts: Prompts, before: States, clean: Tensor, plan: Plan, sigmas: Tensor, key: Key
) -> dict[str, Tensor]:
    """What an update goes on from: halted, path [B, halt + 1] and clean of a sample, noise of an action."""
    names = zip(prompts.group.tolist(), prompts.member.tolist(), strict=True)
    streams = [generator(*key, "fresh", *name) for name in names]
    times = plan.noises
    return {
        "halted": before.x[before.row],
        "path": sigmas[plan.lead :].expand(len(clean), -1),
        "clean": clean,
        "noise": normals(streams, (times, *clean.shape[1:]), clean.device),
        "state": torch.stack([state_ids(prompts.group, prompts.member, i) for i in range(times)], 1),
    }


def siblings(common: Tensor, own: Tensor, correlation: float) -> Tensor:
    """Standard normal noises with this correlation between any two that have `common` in common."""
    return math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own


def retake(
    trajectory: Trajectory, pick: Pick, velocity: Tensor, noise: Noise, dims: tuple[int, ...]
) -> Evaluation:
    """How likely the picked actions are now that the velocity there is this one, [n, *latent]."""
    plan, replay, rows, columns = trajectory.plan, trajectory.replay, pick.rows.cpu(), pick.columns.cpu()
    x, x_next, sigma, sigma_next = (replay[name][rows, columns] for name in RECORDED[:4])
    guard = replay["guard"][rows]
    if plan is None or plan.levels is None:
        moved = transition(x, velocity, sigma, sigma_next, noise, guard)
        likely = log_prob(x_next, moved, noise, dims)
    else:  # every column has a level of its own
        places = [(columns == column).nonzero().flatten() for column in sorted(set(columns.tolist()))]
        parts = []
        for at in places:
            own = noise_of(noise, plan, int(columns[at[0]]))
            part = transition(x[at], velocity[at], sigma[at], sigma_next[at], own, guard[at])
            parts.append((part, log_prob(x_next[at], part, own, dims)))
        back = torch.cat(places).argsort()
        names = [f.name for f in fields(Transition)]
        moved = Transition(*(torch.cat([getattr(part, name) for part, _ in parts])[back] for name in names))
        likely = torch.cat([likely for _, likely in parts])[back]
    drawn = Drawn(replay["mean"][rows, columns], x_next)
    return Evaluation(likely, moved.mean, moved.std, velocity, moved.step, slope=moved.slope, drawn=drawn)


def noise_of(noise: Noise, plan: Plan, column: int) -> Noise:
    """How the action in a column draws its noise."""
    return noise if plan.levels is None else replace(noise, level=plan.levels[column])


def state_ids(group: Tensor, kin: Tensor, step: int) -> Tensor:
    """A number for the state in which each sample is before `step`, [B] int64.

    group, kin: [B], see `Plan.kin`. Numbers are equal if and only if the states are one, on every rank and in
    every slice.
    """
    for name, value, bits in (
        ("group", group, 31),
        ("member", kin, 20),
        ("step", torch.tensor([step]), 12),
    ):
        if len(value) and not 0 <= int(value.min()) <= int(value.max()) < 2**bits:
            raise ValueError(f"{name} numbers must lie in 0..2^{bits} - 1, got {value.tolist()}")
    return group * 2**32 + kin * 2**12 + step


def distinct(state: Tensor) -> tuple[Tensor, Tensor]:
    """Where each distinct state first occurs, by rising state, and the place of every entry's state there."""
    values, inverse = torch.unique(state, return_inverse=True)
    places = torch.arange(len(state))
    return torch.full_like(values, len(state)).scatter_reduce(0, inverse, places, "amin"), inverse


def _check_texts(prompts: Prompts) -> None:
    first: dict[int, str] = {}
    for group, own in zip(prompts.group.tolist(), prompts.text, strict=True):
        if first.setdefault(group, own) != own:
            raise ValueError(
                f"group {group} shares its noise but not its prompt: {first[group]!r} and {own!r}"
            )
