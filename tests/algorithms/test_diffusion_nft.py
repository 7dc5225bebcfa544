"""DiffusionNFT against its formulas (arXiv:2509.16117), written out naively."""

import pytest
import torch
from free import Free, run
from torch.testing import assert_close
from toys import names
from training import GROUPS, MEMBERS, rise, trainer

from mmalign.algorithms.diffusion_nft import DiffusionNFT, NegativeAware
from mmalign.copies import Ramp
from mmalign.credit import Credit, zscore_batch
from mmalign.forward_process import Matching
from mmalign.objectives import OLD, Anchor
from mmalign.records import Outcome, Plan, Renoise, RewardSignal, Trajectory

N = GROUPS * MEMBERS
PLAIN, SELF_NORMALIZED = Matching("one"), Matching("t", adaptive=True)


def nft(beta=1.0, strength=5.0, error=SELF_NORMALIZED, anchors=()) -> NegativeAware:
    return NegativeAware(beta, strength, error, anchors)


def good(policy: Free, strength: float = 5.0) -> torch.Tensor:
    return torch.full((len(policy.x),), strength)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_on_policy_the_gradient_is_the_advantage_times_that_of_flow_matching(beta):
    policy, advantage = Free(), torch.tensor([-5.0, -1.0, 0.0, 2.0])
    gradient = run(nft(beta), policy, [policy.batch(advantage)])[1]
    miss = policy.sigma * (policy.start - policy.target)
    scale = miss.abs().flatten(1).mean(1) * miss[0].numel()
    expected = (2 * advantage / scale).reshape(-1, 1, 1, 1, 1) * policy.sigma * miss
    assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert gradient[2].abs().max() < 1e-6  # r = 1/2 says nothing


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_on_policy_the_unnormalized_gradient_is_that_of_the_paper(beta):
    policy, advantage = Free(), torch.tensor([-5.0, -1.0, 0.0, 2.0])
    gradient = run(nft(beta, error=PLAIN), policy, [policy.batch(advantage)])[1]
    r = (0.5 + advantage / 10).reshape(-1, 1, 1, 1, 1)
    expected = 2 * beta * (2 * r - 1) * (policy.start - policy.target) / policy.x[0].numel()
    assert_close(gradient, 5.0 / beta * expected, rtol=1e-4, atol=1e-6)


def test_certainly_good_samples_and_beta_1_are_plain_flow_matching():
    policy = Free()
    policy.live.data += 0.1
    loss, gradient, _ = run(nft(strength=2.0, error=PLAIN), policy, [policy.batch(good(policy, 2.0))])
    assert_close(loss, 2.0 * float(policy.errors(policy.live.detach()).sum()), rtol=1e-5, atol=0)
    assert_close(gradient, 2.0 * 2 * (policy.live - policy.target).detach() / policy.x[0].numel())


def test_the_error_of_the_clean_estimate_is_that_of_the_velocity_times_the_square_of_the_level():
    policy, r = Free(), torch.tensor([0.9, 0.5, 0.2, 1.0])
    policy.live.data += 0.3 * torch.randn_like(policy.live)
    losses = run(nft(0.7, error=Matching("t2")), policy, [policy.batch(10 * (r - 0.5))])[0]
    total = 0.0
    for sign, share in ((1, r), (-1, 1 - r)):
        velocity = policy.start + sign * 0.7 * (policy.live.detach() - policy.start)
        clean = policy.x - policy.sigma * velocity
        total += float((share * (clean - policy.clean).square().flatten(1).mean(1)).sum())
    assert_close(losses, 5.0 / 0.7 * total, rtol=1e-4, atol=1e-5)


def test_branches_mirror_each_other_about_the_old_velocity():
    policy = Free()
    policy.live.data += torch.randn_like(policy.live)
    up = run(nft(0.7), policy, [policy.batch(good(policy))])[0]
    policy.live.data = 2 * policy.start - policy.live.data
    down = run(nft(0.7), policy, [policy.batch(-good(policy))])[0]
    assert_close(up, down, rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_the_optimum_of_a_sample_lies_where_the_paper_says(beta):
    """v = v_old + (2 r - 1) (target - v_old) / beta, so that a small beta makes large steps."""
    policy, advantage = Free(), torch.tensor([-5.0, -1.0, 0.0, 2.0])
    optimizer = torch.optim.LBFGS([policy.live], line_search_fn="strong_wolfe", max_iter=50)
    batch = policy.batch(advantage)

    def closure():
        optimizer.zero_grad()
        loss = nft(beta, error=PLAIN)(policy, batch)[0].sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    r = (0.5 + advantage / 10).reshape(-1, 1, 1, 1, 1)
    expected = policy.start + (2 * r - 1) * (policy.target - policy.start) / beta
    assert_close(policy.live.detach(), expected, atol=2e-3, rtol=1e-3)


def test_as_beta_falls_the_step_for_the_same_loss_grows_as_its_inverse():
    optima = []
    for beta in (1.0, 0.1):
        policy = Free()
        policy.live.data = policy.start + (policy.target - policy.start) / beta  # the optimum at r = 1
        optima.append(run(nft(beta, error=PLAIN), policy, [policy.batch(good(policy))])[1])
    for gradient in optima:
        assert gradient.abs().max() < 1e-4


def test_advantages_become_probabilities_and_a_flat_group_says_nothing():
    prompts = names(2, 3)
    flat = Trajectory(Outcome(prompts, []), torch.zeros(6, 1), torch.ones(6, 1, dtype=torch.bool), {})
    signal = RewardSignal("r", torch.tensor([[0.0], [1.0], [2.0], [7.0], [7.0], [7.0]]))
    credit = DiffusionNFT().build({"r": 1.0}).credit
    assert credit == Credit({"r": 1.0}, zscore_batch, "total_first", "whole", clip=5.0)
    advantage = credit([signal], flat, lambda where, trajectory: torch.ones(1, 1, 1)).values[0, :, 0]
    r = 0.5 + advantage / 10
    assert r.min() >= 0
    assert r.max() <= 1
    assert_close(r[:3].mean(), torch.tensor(0.5))
    assert torch.equal(r[3:], torch.full((3,), 0.5))
    policy = Free(6, groups=2)
    assert run(nft(), policy, [policy.batch(advantage)])[1][3:].abs().max() < 1e-6


def test_both_schedules_of_the_old_policy():
    first, second = DiffusionNFT().old, Ramp(slope=0.0075, most=0.999, wait=75)
    assert [first(i) for i in (0, 100, 500, 5000)] == [0.0, 0.1, 0.5, 0.5]
    assert [second(i) for i in (0, 75, 76, 209, 5000)] == [0.0, 0.0, 0.0075, 0.999, 0.999]
    assert second(208) < 0.999


def test_it_samples_by_the_ode_and_keeps_no_trajectory():
    algorithm = DiffusionNFT(steps=6, renoise=Renoise(3)).build({"r": 1.0})
    (plan,) = algorithm.plans(0, 0)
    assert plan == Plan(6, renoise=Renoise(3))
    assert plan.sde_steps == ()
    assert algorithm.sampler == OLD


def test_of_second_order_it_samples_by_as_many_steps_of_the_solver():
    (plan,) = DiffusionNFT(steps=6, order=2, renoise=Renoise(3)).build({"r": 1.0}).plans(0, 0)
    assert plan == Plan(6, renoise=Renoise(3), tail=6)
    one, two = (trainer(DiffusionNFT(steps=4, order=order, renoise=Renoise(1))) for order in (1, 2))
    one.run(), two.run()
    assert one.policy.forwards.sample == two.policy.forwards.sample == N * 4


def test_the_pull_to_the_base_model_is_once_the_distance_of_the_velocities():
    policy = Free()
    policy.live.data += 0.3
    free, held = (
        run(nft(anchors=anchors), policy, [policy.batch(good(policy))])[0] for anchors in ((), (Anchor(2.0),))
    )
    assert_close(held - free, 2.0 * 4 * 0.09, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_forwards_are_those_of_the_formula(kl):
    found = trainer(DiffusionNFT(steps=6, renoise=Renoise(3), kl=kl), batch=7)
    found.run()
    counts = found.policy.forwards
    assert (counts.sample, counts.train) == (N * 6, N * 3)
    assert counts.reference == N * 3 * (2 if kl else 1)


def test_the_reward_rises():
    assert rise(DiffusionNFT(steps=5)) > 0.2
    assert rise(DiffusionNFT(steps=5, renoise=Renoise(4, "uniform"), error=PLAIN, kl=1e-4)) > 0.2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"renoise": {"times": 0}}, "times"),
        ({"beta": 0.0}, "beta"),
        ({"strength": -1.0}, "strength"),
        ({"old": {"most": 1.0}}, "most"),
        ({"kl": -1.0}, "kl"),
        ({"order": 3}, "order"),
        ({"error": {"power": 2.0}}, "power"),
        ({"renoise": {"span": [0.5, 0.5]}}, "span"),
        ({"renoise": {"law": "log"}}, "law"),
    ],
)
def test_settings_out_of_range_are_named(wrong, named):
    kinds = {"renoise": Renoise, "old": Ramp, "error": Matching}
    with pytest.raises(ValueError, match=named):
        DiffusionNFT(**{key: kinds[key](**value) if key in kinds else value for key, value in wrong.items()})
