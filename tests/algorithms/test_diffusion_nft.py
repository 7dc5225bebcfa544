"""DiffusionNFT against its formulas (arXiv:2509.16117), written out naively."""

from contextlib import contextmanager

import pytest
import torch
from torch.testing import assert_close

from mmalign.algorithms.diffusion_nft import OLD, DiffusionNFT, NegativeAware, kept, x0_error
from mmalign.records import Evaluation, Minibatch, Noised, Outcome, Pick, Plan, Prompts, Trajectory


class Free:
    """A policy whose velocities are free vectors [n, C, h, w], one an action; the old ones stay."""

    def __init__(self, old: torch.Tensor, state: Noised) -> None:
        self.old, self.live, self.state, self.copies = old, old.clone().requires_grad_(), state, self
        self.asked: str | None = None

    @contextmanager
    def use(self, name):
        self.asked = name
        yield
        self.asked = None

    def evaluate(self, trajectory, pick) -> Evaluation:
        velocity = self.old if self.asked == OLD else self.live
        return Evaluation(torch.zeros(len(pick)), velocity=velocity, noised=self.state)


def world(n: int = 4, seed: int = 0) -> tuple[Free, Noised, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(n, 2, 3, 3, generator=draw) for _ in range(2))
    sigma = torch.linspace(0.2, 0.9, n).reshape(-1, 1, 1, 1)
    state = Noised((1 - sigma) * clean + sigma * noise, clean, sigma)
    return Free(torch.randn(n, 2, 3, 3, generator=draw), state), state, noise - clean


def batch(advantage: torch.Tensor) -> Minibatch:
    n = len(advantage)
    prompts = Prompts(["a"] * n, torch.zeros(n, dtype=torch.int64), torch.arange(n), [{}] * n)
    trajectory = Trajectory(Outcome(prompts, []), torch.zeros(n, 1), torch.ones(n, 1, dtype=torch.bool), {})
    return Minibatch(
        trajectory, Pick(torch.arange(n), torch.zeros(n, dtype=torch.int64)), advantage[None], torch.ones(n)
    )


def test_the_error_of_the_clean_estimate_is_the_scaled_error_of_the_velocity():
    policy, state, target = world()
    miss = (state.sigma * (target - policy.old)).flatten(1)
    assert_close(
        x0_error(state, policy.old), miss.square().mean(1) / miss.abs().mean(1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_on_policy_the_gradient_is_the_advantage_times_that_of_flow_matching(beta):
    policy, state, target = world()
    advantage = torch.tensor([-5.0, -1.0, 0.0, 2.0])
    losses, _ = NegativeAware(beta, strength=5.0)(policy, batch(advantage))
    losses.sum().backward()
    miss = state.sigma * (policy.old - target)
    scale = miss.abs().flatten(1).mean(1) * miss[0].numel()
    expected = (2 * advantage / scale).reshape(-1, 1, 1, 1) * state.sigma * miss
    assert_close(policy.live.grad, expected, rtol=1e-4, atol=1e-6)
    assert policy.live.grad[2].abs().max() < 1e-6  # r = 1/2 says nothing


def test_certainly_good_samples_and_beta_1_are_plain_flow_matching():
    policy, state, _ = world()
    policy.live.data += 0.1
    losses, _ = NegativeAware(1.0, strength=2.0)(policy, batch(torch.full((4,), 2.0)))
    assert_close(losses.sum(), 2.0 * x0_error(state, policy.live).sum())


def test_branches_mirror_each_other_about_the_old_velocity():
    policy, _, _ = world()
    policy.live.data += torch.randn_like(policy.live)
    good, _ = NegativeAware(0.7)(policy, batch(torch.full((4,), 5.0)))
    policy.live.data = 2 * policy.old - policy.live.data
    bad, _ = NegativeAware(0.7)(policy, batch(torch.full((4,), -5.0)))
    assert_close(good, bad)


def test_the_old_policy_follows_ever_more_slowly():
    assert [kept(0.001, 0.5, i) for i in (0, 100, 500, 5000)] == [0.0, 0.1, 0.5, 0.5]


def test_it_samples_by_the_ode_and_keeps_no_trajectory():
    algorithm = DiffusionNFT(steps=6, times=3).build({"r": 1.0})
    assert algorithm.plans(0, 0) == [Plan(6, renoise=3)]
    assert algorithm.sampler == OLD


@pytest.mark.parametrize(
    "wrong", [{"times": 0}, {"beta": 0.0}, {"strength": -1.0}, {"most": 1.0}, {"kl": -1.0}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DiffusionNFT(**wrong)
