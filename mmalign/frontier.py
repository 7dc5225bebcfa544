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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.contracts import Key, RewardModel
from mmalign.data import Prompt
from mmalign.evaluation import Draws, batches, repeat
from mmalign.records import Outcome
from mmalign.scoring import judge


@dataclass(frozen=True)
class Point:
    """One point of a curve, a mean over prompts.

    kl_bound: log n - (n - 1) / n for best-of-n, else None. effective: of the N draws of a prompt, how many
    the estimate rests on, at least; trust a tilted point only while it is large.
    """

    name: str
    reward: float
    kl: float
    effective: float
    kl_bound: float | None = None


@dataclass(frozen=True)
class Frontier:
    """The two reference curves: best-of-n over n, and the tilted law over beta."""

    best_of_n: list[Point]
    tilted: list[Point]


def kl_bound(n: int) -> float:
    """The most that the best of n can differ from one draw, reached without ties."""
    return math.log(n) - (n - 1) / n


def expected_best(rewards: Tensor, n: int) -> Tensor:
    """Unbiased mean of the best of n draws without replacement; rewards [P, N] with N >= n, gives [P]."""
    draws = rewards.shape[1]
    if not 1 <= n <= draws:
        raise ValueError(f"the best of n needs 1 <= n <= {draws} draws of each prompt, got n={n}")
    ordered = rewards.double().sort(1).values
    share = [math.comb(i, n - 1) / math.comb(draws, n) for i in range(draws)]  # of being the best
    return ordered @ torch.tensor(share, dtype=torch.float64)


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
    """Reward, KL and effective number of draws of the law tilted by exp(r / beta); [P] each from [P, N]."""
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    rewards = rewards.double()
    weight = (rewards / beta).softmax(1)
    kl = torch.special.xlogy(weight, weight * rewards.shape[1]).sum(1).clamp(min=0)
    return (weight * rewards).sum(1), kl, 1 / weight.square().sum(1)


def frontier(rewards: Tensor, betas: Sequence[float] = ()) -> Frontier:
    """Both curves from rewards [P, N] of the reference: n = 1, 2, 4, ... N, and the given betas."""
    if rewards.ndim != 2 or not bool(torch.isfinite(rewards).all()):
        raise ValueError(
            f"rewards must be finite and [prompts, draws], got {tuple(rewards.shape)} with "
            f"{int((~torch.isfinite(rewards)).sum())} that are not finite"
        )
    draws = rewards.shape[1]
    best = [
        Point(
            f"n={n}",
            float(expected_best(rewards, n).mean()),
            float(kl_of_best(rewards, n).mean()),
            draws / n,
            kl_bound(n),
        )
        for n in doublings(draws)
    ]
    tilted = []
    for beta in betas:
        reward, kl, effective = tilt(rewards, beta)
        tilted.append(Point(f"beta={beta:g}", float(reward.mean()), float(kl.mean()), float(effective.min())))
    return Frontier(best, tilted)


def doublings(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`."""
    n = 1
    while n <= most:
        yield n
        n *= 2


@dataclass(frozen=True)
class Drawn:
    """Every draw's reward [P, N] and the best picture of each prompt [P, 3, H, W]."""

    rewards: Tensor
    best: Tensor


@torch.no_grad()
def best_of_n(
    policy: Draws,
    reward: RewardModel,
    prompts: Sequence[Prompt],
    n: int,
    steps: int,
    key: Key = (0, "best of n"),
    batch: int = 64,
) -> Drawn:
    """Draw each prompt n times by the plain ODE and keep the best: a baseline, and a source of data.

    P prompts cost P n steps forwards, twice that with guidance. Draws that the reward has no verdict on are
    never the best, and have minus infinity; of equally good ones the first is kept.
    """
    asked = repeat(prompts, list(range(len(prompts))), n)
    found, best = torch.full((len(asked),), -math.inf), dict[int, Tensor]()
    for rows in batches(len(asked), batch):
        part = asked.take(rows)
        images = policy.images(part, steps, key)
        signal, _ = judge(reward, Outcome(part, images))
        assert signal.valid is not None
        means = (signal.values * signal.valid).sum(1) / signal.valid.sum(1)
        for row, mean, image in zip(rows.tolist(), means.tolist(), images, strict=True):
            place = row // n
            if place not in best or mean > float(found[place * n : row].max()):
                best[place] = image.cpu()
            if math.isfinite(mean):
                found[row] = mean
    return Drawn(found.reshape(len(prompts), n), torch.stack([best[i] for i in range(len(prompts))]))
