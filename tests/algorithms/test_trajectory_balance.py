"""Relative trajectory balance: its gradient at the base model, and that its optimum is the tilted law."""

import math

import pytest
import torch
from torch.testing import assert_close
from toys import ToyFlow
from training import GROUPS, MEMBERS, rise, trainer

from mmalign.algorithms.trajectory_balance import TrajectoryBalance, group_variance
from mmalign.coupling import Population
from mmalign.objectives import REFERENCE
from mmalign.sde import Noise, log_prob, transition

N = GROUPS * MEMBERS
REWARD = torch.tensor([0.5, -1.0, 2.0, 7.0, 7.0, 7.0]).double()
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])


def population(log_ratio: torch.Tensor, reward: torch.Tensor = REWARD) -> Population:
    """log_ratio: [6, 3] of the live policy against a reference of 0."""
    spread = reward[None, :, None].expand(1, 6, 3)
    weight = torch.full((6, 3), 1 / 18).double()
    return Population(log_ratio, {REFERENCE: torch.zeros(6, 3).double()}, spread, weight, GROUP)


def centered(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:3] - x[:3].mean(), x[3:] - x[3:].mean()])


def test_the_loss_is_half_the_variance_of_delta_inside_groups():
    log_ratio = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    delta = log_ratio.sum(1) - 2.0 * REWARD
    wanted = (delta[:3].var(correction=0) + delta[3:].var(correction=0)) / 2 / 2
    assert_close(group_variance(2.0, population(log_ratio))[0][0], wanted)


def test_at_the_base_model_the_gradient_is_that_of_the_policy_gradient():
    log_ratio = torch.zeros(6, 3).double().requires_grad_()
    group_variance(2.0, population(log_ratio))[0].sum().backward()
    assert_close(log_ratio.grad, (-2.0 * centered(REWARD) / 6)[:, None].expand(6, 3))
    assert not log_ratio.grad[3:].any()  # equal rewards move nothing


def test_a_constant_on_rewards_or_log_ratios_of_a_group_changes_nothing():
    log_ratio = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    plain = group_variance(2.0, population(log_ratio))[0]
    assert_close(group_variance(2.0, population(log_ratio, REWARD + 3.0 * GROUP))[0], plain)
    assert_close(group_variance(2.0, population(log_ratio + 0.7 * GROUP[:, None]))[0], plain)


def velocity(x: torch.Tensor, t: float, mean: float) -> torch.Tensor:
    """The exact one of x0 ~ N(mean, 1)."""
    variance = (1 - t) ** 2 + t**2
    return (x - mean - (1 - t) / variance * (x - (1 - t) * mean)) / t


def imbalance(level: float, steps: int = 200, count: int = 2000) -> float:
    """Share of the variance of the reward that is left in delta, where the policy samples from N(beta, 1).

    With a base law N(0, 1) and the reward x that is the law N(0, 1) exp(beta x) / Z.
    """
    draw, beta = torch.Generator().manual_seed(0), 0.5
    sigmas, noise = torch.linspace(1, 0, steps + 1).double(), Noise("flow", level, reduction="sum")
    x = torch.randn(count, 1, generator=draw).double()
    log_ratio = torch.zeros(count).double()
    for i in range(steps - 1):
        t, u = sigmas[i].expand(count), sigmas[i + 1].expand(count)
        live, base = (
            transition(x, velocity(x, float(sigmas[i]), mean), t, u, noise, float(sigmas[1]))
            for mean in (beta, 0.0)
        )
        x = live.mean + live.std * torch.randn(count, 1, generator=draw)
        log_ratio += log_prob(x, live, noise, (1,)) - log_prob(x, base, noise, (1,))
    last = float(sigmas[-2])
    x = x - last * velocity(x, last, beta)
    delta = log_ratio - beta * x[:, 0]
    return float(delta.var() / (beta**2 * x.var()))


def test_the_tilted_law_is_balanced_without_memory_and_not_with_little_noise():
    assert imbalance(math.sqrt(2)) < 0.05
    assert imbalance(0.3) > 0.3


def test_forwards_are_those_of_the_formula():
    found = trainer(TrajectoryBalance(steps=6), batch=7)
    found.run()
    counts = found.policy.forwards
    assert (counts.sample, counts.train, counts.reference) == (N * 6, N * 5, 2 * N * 5)


def test_the_reward_rises():
    assert rise(TrajectoryBalance(steps=5, beta=20.0, noise=Noise("flow", 0.7, reduction="sum"))) > 0.2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"noise": Noise("flow", 0.0, reduction="sum")}, "noise.level must be above 0"),
        ({"noise": Noise("flow", 0.7)}, "noise.reduction must be sum"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        TrajectoryBalance(**wrong)


def test_a_policy_that_splits_its_steps_into_places_is_refused_in_words():
    """Before anything is cut by shapes that do not fit."""
    policy = ToyFlow(TrajectoryBalance().noise, by_place=True)
    with pytest.raises(TypeError, match="one number an action, but the policy splits it into places"):
        trainer(TrajectoryBalance(steps=3), policy=policy).run()
