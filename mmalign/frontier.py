"""Best-of-N: what the untouched model reaches by drawing more, the curve that every method must beat.

The law that gains most reward for its KL from the reference p is p tilted, p exp(r / beta) / Z. The best of n
draws comes close to it (arXiv:2404.01730) and needs no training. Over the levels v of the reward, with mass
p_v and cumulative mass F_v,

    q_v = F_v^n - F_(v-)^n      KL(q | p) = sum_v q_v log(q_v / p_v)  <=  log n - (n - 1) / n

with equality only where no two draws tie (arXiv:2401.01879). Rewards that tie, as those of verifiers do, cost
less KL than that; so both are given. Everything is estimated from N draws a prompt of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, takewhile

import torch
from torch import Tensor

from mmalign.contracts import Key, Policy, RewardModel
from mmalign.data import Prompt
from mmalign.evaluation import Draws, batches, bootstrap, repeat
from mmalign.objectives import divergence as step_divergence
from mmalign.records import Outcome, Plan
from mmalign.scoring import judge


@dataclass(frozen=True)
class Point:
    """One point of a curve, a mean over prompts with the 95 % interval over prompts.

    kl_bound: log n - (n - 1) / n for best-of-n, else None. effective: of the N draws of a prompt, how many
    the estimate rests on, at least; trust a tilted point only while it is large. watched: what other rewards
    say of the same choice.
    """

    name: str
    reward: float
    low: float
    high: float
    kl: float
    effective: float
    kl_bound: float | None = None
    watched: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Frontier:
    """The two reference curves: best-of-n over n, and the tilted law over beta."""

    best_of_n: list[Point]
    tilted: list[Point]


def kl_bound(n: int) -> float:
    """The most that the best of n can differ from one draw, reached without ties."""
    return math.log(n) - (n - 1) / n


def chances(rewards: Tensor, n: int) -> Tensor:
    """The chance of each of N draws to be the best of n of them, without replacement; [P, N] both.

    Draws that tie share what one of them gets.
    """
    draws = rewards.shape[1]
    if not 1 <= n <= draws:
        raise ValueError(f"the best of n needs 1 <= n <= {draws} draws of each prompt, got n={n}")
    below = (rewards[:, None] < rewards[:, :, None]).sum(2)  # draws that are worse, and
    level = (rewards[:, None] == rewards[:, :, None]).sum(2)  # as good
    chosen = [math.comb(i, n) / math.comb(draws, n) for i in range(draws + 1)]  # that all n are among these i
    reached = torch.tensor(chosen, dtype=torch.float64)
    return (reached[below + level] - reached[below]) / level


def expected_best(rewards: Tensor, n: int) -> Tensor:
    """Unbiased mean of the best of n draws without replacement; rewards [P, N] with N >= n, gives [P]."""
    return (chances(rewards, n) * rewards.double()).sum(1)


def law_of_best(mass: Tensor, n: int) -> Tensor:
    """The masses [V] of the best of n draws over reward levels that rise, from those of one draw."""
    reached = mass.double().cumsum(0).clamp(max=1)
    return (reached**n).diff(prepend=torch.zeros(1, dtype=torch.float64))


def divergence(q: Tensor, p: Tensor) -> float:
    """KL(q | p) of two laws over the same levels."""
    return float(torch.special.xlogy(q, q / p).sum().clamp(min=0))


def kl_of_best(rewards: Tensor, n: int) -> Tensor:
    """KL of the best of n draws from one draw by the levels seen; rewards [P, N], gives [P]."""
    found = []
    for row in rewards:
        mass = torch.unique(row, return_counts=True)[1].double() / len(row)
        found.append(divergence(law_of_best(mass, n), mass))
    return torch.tensor(found, dtype=torch.float64)


def tilt(rewards: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [P, N] of the draws [P, N] under the law tilted by exp(r / beta), its KL [P], and of how many
    draws it is effectively made [P].
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    weight = (rewards.double() / beta).softmax(1)
    kl = torch.special.xlogy(weight, weight * rewards.shape[1]).sum(1).clamp(min=0)
    return weight, kl, 1 / weight.square().sum(1)


def frontier(
    rewards: Tensor,
    betas: Sequence[float] = (),
    sizes: Sequence[int] = (),
    watched: Mapping[str, Tensor] | None = None,
) -> Frontier:
    """Both curves from rewards [P, N] of the reference.

    sizes: the n of best-of-n; empty: 1, 2, 4, ... up to N. watched: other rewards of the same draws, [P, N].
    """
    if rewards.ndim != 2 or not bool(torch.isfinite(rewards).all()):
        raise ValueError(
            f"rewards must be finite and [prompts, draws], got {tuple(rewards.shape)} with "
            f"{int((~torch.isfinite(rewards)).sum())} that are not finite"
        )
    draws = rewards.shape[1]
    doublings = takewhile(lambda n: n <= draws, (2**i for i in count()))

    def point(name: str, weight: Tensor, kl: Tensor, effective: float, bound: float | None = None) -> Point:
        by_prompt = (weight * rewards.double()).sum(1)
        others = {key: float((weight * r.double()).sum(1).nanmean()) for key, r in (watched or {}).items()}
        low, high = bootstrap(by_prompt)
        return Point(name, float(by_prompt.mean()), low, high, float(kl.mean()), effective, bound, others)

    best = [
        point(f"n={n}", chances(rewards, n), kl_of_best(rewards, n), draws / n, kl_bound(n))
        for n in sizes or doublings
    ]
    tilted = []
    for beta in betas:
        weight, kl, effective = tilt(rewards, beta)
        tilted.append(point(f"beta={beta:g}", weight, kl, float(effective.min())))
    return Frontier(best, tilted)


@dataclass(frozen=True)
class Drawn:
    """Every draw's reward [P, N], what others say of it, and the best picture of each prompt [P, 3, H, W]."""

    rewards: Tensor
    best: Tensor
    watched: Mapping[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def best_of_n(
    policy: Draws,
    reward: RewardModel,
    prompts: Sequence[Prompt],
    n: int,
    steps: int,
    key: Key = (0, "best of n"),
    batch: int = 64,
    watched: Sequence[RewardModel] = (),
) -> Drawn:
    """Draw each prompt n times by the plain ODE and keep the best: a baseline, and a source of data.

    P prompts cost P n steps forwards, twice that with guidance. Draws that the reward has no verdict on are
    never the best, and have minus infinity (NaN where others are silent); of equally good ones the first is
    kept.
    """
    asked = repeat(prompts, list(range(len(prompts))), n)
    judges = [reward, *watched]
    found = torch.full((len(judges), len(asked)), math.nan)
    best = dict[int, Tensor]()
    for rows in batches(len(asked), batch):
        part = asked.take(rows)
        images = policy.images(part, steps, key)
        for values, judge_ in zip(found, judges, strict=True):
            signal, _ = judge(judge_, Outcome(part, images))
            values[rows] = signal.mean.float().cpu()
        found[0, rows] = found[0, rows].nan_to_num(nan=-math.inf)
        for row, image in zip(rows.tolist(), images, strict=True):
            place = row // n
            if place not in best or found[0, row] > found[0, place * n : row].max():
                best[place] = image.cpu()
    rewards, *others = found.reshape(len(judges), len(prompts), n)
    return Drawn(
        rewards,
        torch.stack([best[i] for i in range(len(prompts))]),
        {model.name: values for model, values in zip(watched, others, strict=True)},
    )


@torch.no_grad()
def path_kl(
    policy: Policy,
    reference: str,
    prompts: Sequence[Prompt],
    steps: int,
    key: Key = (0, "path"),
    batch: int = 64,
) -> Tensor:
    """KL of the policy's paths from those of its copy `reference`, in nats; [P], one path a prompt.

        sum over s of |mean - mean_ref|^2 / (2 std^2)     along a path of the policy, whose noise it has

    By data processing no less than the divergence of the pictures. P prompts cost 3 P (steps - 1) + P
    forwards.
    """
    asked, plan = repeat(prompts, list(range(len(prompts))), 1), Plan(steps, tuple(range(steps - 1)))
    found = torch.zeros(len(asked), dtype=torch.float64)
    before = replace(policy.forwards)
    for rows in batches(len(asked), batch):
        trajectory = policy.sample(asked.take(rows), plan, key)
        for pick in policy.picks(trajectory, torch.arange(len(rows)), batch):
            new = policy.evaluate(trajectory, pick)
            with policy.copies.use(reference):
                old = policy.evaluate(trajectory, pick)
            assert new.mean is not None  # steps of a flow are Gaussian
            gap = step_divergence(new, old).reshape(len(pick), -1).mean(1)  # a mean over the latent
            found.index_add_(0, rows[pick.rows.cpu()], gap.double().cpu() * new.mean[0].numel())
    counts = policy.forwards
    counts.sample, counts.train, counts.reference = before.sample, before.train, before.reference
    return found
