"""Problems with a known answer: formulas of the world, limits of samplers, optima of objectives."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from known import MEMORYLESS, TWO, Judge, law_of, policy_of, source, unscaled
from torch import Tensor
from torch.testing import assert_close

from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.lab.gaussians import BOX, Mixture, Quadratic, points, reweighted
from mmalign.learning import Credited
from mmalign.records import Plan
from mmalign.scoring import Scorer
from mmalign.sde import Noise, transition
from mmalign.testing import check_policy, prompts_of
from mmalign.trainer import AVERAGE, Trainer, TrainingSettings

DOUBLE = Mixture(*(part.double() for part in (TWO.weight, TWO.mean, TWO.variance)))


def grid() -> Tensor:
    return torch.linspace(-12, 12, 24001, dtype=torch.float64)[:, None]


def spread_out(dimensions: int, seed: int = 0) -> Mixture:
    """Three components far enough apart to be told from each other."""
    draw = torch.Generator().manual_seed(seed)
    mean = torch.randn(3, dimensions, generator=draw)
    mean = (
        2.5 * mean / mean.norm(dim=1, keepdim=True) if dimensions > 1 else torch.tensor([[-2.5], [0], [2.5]])
    )
    return Mixture(torch.tensor([0.5, 0.3, 0.2]), mean, torch.tensor([0.1, 0.05, 0.08]))


# ---- the world


@pytest.mark.parametrize("dimensions", [1, 2, 16])
@pytest.mark.parametrize("sigma", [0.05, 0.4, 0.9, 1.0])
def test_the_velocity_is_that_of_the_score(dimensions, sigma):
    target = spread_out(dimensions)
    target = Mixture(target.weight.double(), target.mean.double(), target.variance.double())
    x = torch.randn(20, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    score = torch.autograd.grad(target.noised(sigma).log_density(x).sum(), x)[0]
    v = target.velocity(x.detach(), torch.full((20,), sigma, dtype=torch.float64))
    assert_close(x + (1 - sigma) * v, -sigma * score)  # both are the noise estimate


def test_the_velocity_is_the_mean_of_noise_less_data_among_what_lands_at_a_place():
    draw, sigma = torch.Generator().manual_seed(0), 0.5
    clean, noise = TWO.sample(400_000, draw), torch.randn(400_000, 1, generator=draw)
    x = (1 - sigma) * clean + sigma * noise
    for place in (-1.0, 0.0, 0.8):
        near = (x[:, 0] - place).abs() < 0.02
        found, error = (noise - clean)[near].mean(), (noise - clean)[near].std() / near.sum().sqrt()
        exact = TWO.velocity(torch.tensor([[place]]), torch.tensor([sigma]))
        assert (found - exact).abs() < 5 * error + 0.02


def test_the_ode_carries_every_quantile_of_the_noise_to_that_of_the_target():
    z = torch.tensor([-1.5, -0.5, 0.1, 0.6, 1.2], dtype=torch.float64)[:, None]
    x = z.clone()
    for sigma, after in pairwise(torch.linspace(1, 0, 1001, dtype=torch.float64)):
        x = x + (after - sigma) * DOUBLE.velocity(x, sigma.expand(5))
    places = grid()
    reached = (DOUBLE.log_density(places).exp() * 0.001).cumsum(0)
    level = 0.5 * (1 + torch.erf(z[:, 0] / math.sqrt(2)))
    exact = places[torch.searchsorted(reached, level)]
    assert_close(x, exact, atol=0.01, rtol=0)


@pytest.mark.parametrize("reward", [Quadratic(torch.tensor([0.8])), Quadratic(torch.tensor([-0.4]), 1.5)])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_tilted_law_is_the_density_times_the_exponential(reward, beta):
    x = grid()
    tilted = DOUBLE.log_density(x) + reward(x) / beta
    tilted = tilted - (tilted.exp() * 0.001).sum().log()
    assert_close(DOUBLE.tilted(reward, beta).log_density(x), tilted, atol=1e-6, rtol=1e-6)


def test_in_many_dimensions_the_tilted_law_has_the_moments_of_reweighted_points():
    target, reward = spread_out(16), Quadratic(torch.linspace(-0.3, 0.4, 16), 0.5)
    x = target.sample(100_000, torch.Generator().manual_seed(0))
    weight = reward(x).softmax(0)
    mean, variance = target.tilted(reward, 1.0).moments()
    error = 5 / (1 / weight.square().sum()).sqrt()
    assert ((weight @ x - mean).abs() < error * variance.sqrt()).all()
    assert_close(weight @ x.square() - (weight @ x).square(), variance, rtol=10 * error, atol=0.01)


def test_a_reward_that_outgrows_the_target_has_no_optimum():
    with pytest.raises(ValueError, match="there is no optimum"):
        Mixture.normal([0.0], 1.0).tilted(Quadratic(torch.zeros(1), -2.0), 1.0)


def test_the_reweighted_masses_maximize_reward_less_divergence():
    mass, values, beta = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 1.0, 0.5]), 0.7
    best = reweighted(mass, values, beta)

    def worth(q: Tensor) -> float:
        return float(q @ values - beta * (q * (q / mass).log()).sum())

    draw = torch.Generator().manual_seed(0)
    others = (best.log() + 0.3 * torch.randn(200, 3, generator=draw)).softmax(1)
    assert all(worth(q) < worth(best) for q in others)
    assert worth(best) == pytest.approx(beta * float((mass.log() + values / beta).logsumexp(0)), abs=1e-6)


def test_components_of_equal_reward_keep_their_ratio():
    mass = torch.tensor([0.5, 0.3, 0.2])
    found = reweighted(mass, torch.tensor([2.0, 2.0, -1.0]), 0.7)
    assert_close(found[0] / found[1], mass[0] / mass[1])
    assert found[2] < mass[2]
    assert_close(reweighted(mass, torch.full((3,), 4.0), 0.7), mass)


def test_a_world_is_a_policy_like_any_other():
    prompts = prompts_of(["a", "b"], 3)
    for plan in (Plan(6, (1, 2, 3)), Plan(6, (0, 2), True, (1, 2))):
        check_policy(policy_of(spread_out(2)), prompts, plan, tolerance=1e-5)
    media = policy_of(spread_out(2)).images(prompts, 4, (0, "test"))
    assert_close(points(media) / (2 * BOX) + 0.5, media.flatten(1))


# ---- the limits of samplers


def sampled(target: Mixture, noise: Noise, steps: int, count: int = 4000) -> Tensor:
    draw, sigmas = torch.Generator().manual_seed(1), torch.linspace(1, 0, steps + 1)
    x = torch.randn(count, target.mean.shape[1], generator=draw)
    for sigma, after in pairwise(sigmas):
        step = transition(x, target.velocity(x, sigma.expand(count)), sigma, after, noise, sigmas[1])
        x = step.mean + step.std * torch.randn(x.shape, generator=draw)
    return x


@pytest.mark.parametrize("dimensions", [1, 2, 16])
@pytest.mark.parametrize(
    "noise", [Noise("flow", 0.7), MEMORYLESS, Noise("dance", 0.5), Noise("ddim", 1.0)], ids=lambda n: n.kind
)
def test_samplers_that_follow_the_data_law_find_every_component(noise, dimensions):
    target, count = spread_out(dimensions), 4000
    x = sampled(target, noise, 100, count)
    label = target.label(x)
    for k in range(3):
        members = x[label == k]
        share, wanted = len(members) / count, float(target.weight[k])
        assert share == pytest.approx(wanted, abs=5 * math.sqrt(wanted * (1 - wanted) / count) + 0.02)
        error = 5 * math.sqrt(float(target.variance[k]) / len(members)) + 0.03
        assert (members.mean(0) - target.mean[k]).abs().max() < error
        assert members.var(0).mean() == pytest.approx(float(target.variance[k]), rel=0.2)


@pytest.mark.parametrize("dimensions", [1, 2, 16])
def test_cps_has_its_documented_bias_in_every_dimension(dimensions):
    target = Mixture.normal([0.0] * dimensions, 1.0)
    kept = sampled(target, Noise("cps", 0.8), 100).var(0).mean()
    assert kept == pytest.approx((1 + math.cos(0.4 * math.pi)) / 2, abs=0.05)
    follows = sampled(target, Noise("flow", 0.7), 100).var(0).mean()
    assert follows == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("noise", "limit"), [(MEMORYLESS, 0.0), (Noise("ddim", 1.0), 0.0), (Noise("flow", 0.5), 0.35)]
)
def test_the_memoryless_noise_forgets_where_it_began(noise, limit):
    """Two runs of one noise on the way, from different starts; only then is the tilted law an optimum."""
    target, sigmas = Mixture.normal([0.0], 1.0), torch.linspace(1, 0, 201, dtype=torch.float64)
    target = Mixture(target.weight.double(), target.mean.double(), target.variance.double())
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    for sigma, after in pairwise(sigmas):
        x = transition(x, target.velocity(x, sigma.expand(2)), sigma, after, noise, sigmas[1]).mean
    assert float(x[0] - x[1]) == pytest.approx(limit, abs=0.35 if limit else 0.02)
    assert bool(float(x[0] - x[1]) > 0.1) == bool(limit)


# ---- the optima of objectives


class Expected:
    """Everything about one Gaussian under one plan in closed form: each step takes x to A x + B + std z."""

    def __init__(self, mean: Tensor, log_variance: Tensor, steps: int, noise: Noise) -> None:
        law = Mixture(torch.ones(1).double(), mean.reshape(1, 1), log_variance.exp().reshape(1))
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        sigma, after = sigmas[:-1].repeat(2), sigmas[1:].repeat(2)
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat_interleave(steps, 0)
        moved = transition(x, law.velocity(x, sigma), sigma, after, noise, sigmas[1])
        zero, one = moved.mean[:, 0].chunk(2)
        self.slope, self.offset, self.std = one - zero, zero, moved.std.flatten()[:steps].detach()

    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance before every step and after the last."""
        found = [(torch.tensor(0.0).double(), torch.tensor(1.0).double())]
        for a, b, std in zip(self.slope, self.offset, self.std, strict=True):
            mean, variance = found[-1]
            found.append((a * mean + b, a * a * variance + std * std))
        return found


def gain(reward: Quadratic, beta: float, live: Expected, now: Expected, reference: Expected) -> Tensor:
    """What GRPO's loss ascends in expectation, at one action of each sample in turn.

    sum_s E[ Q_s(x') ] - beta E[ KL(step_s | reference step_s) ] over the states of the policy that sampled
    (`now`), with Q_s the reward to be expected after the action; no action answers for the KL of later ones.
    """
    q, curve = reward.slope[0].double(), torch.tensor(reward.curve).double()  # Q(x) = q x - curve x^2 / 2
    total = torch.tensor(0.0).double()
    states = now.moments()
    for s in reversed(range(len(now.slope))):
        mean, variance = states[s]
        if s < len(now.slope) - 1:  # the last step is no action
            to = live.slope[s] * mean + live.offset[s]
            square = to**2 + live.slope[s] ** 2 * variance + now.std[s] ** 2
            gap = (live.slope[s] - reference.slope[s]) * mean + live.offset[s] - reference.offset[s]
            spread = (live.slope[s] - reference.slope[s]) ** 2 * variance
            total = total + q * to - curve / 2 * square - beta * (gap**2 + spread) / (2 * now.std[s] ** 2)
        a, b = now.slope[s].detach(), now.offset[s].detach()
        q, curve = a * (q - curve * b), a * a * curve
    return total


def gradient_of(
    law: Mixture, reference: Mixture, reward: Quadratic, beta: float, steps: int, count: int
) -> tuple[Tensor, Tensor]:
    """Gradient of the real loss through sampler, credit and objective, and its standard error; mean first."""
    policy = policy_of(reference)
    policy.copies.save("reference")
    network = policy.adapter.network
    with torch.no_grad():
        network.mean.copy_(law.mean)
        network.log_variance.copy_(law.variance.log())
    dimensions = law.mean.shape[1]
    algorithm = unscaled(FlowGRPO(steps=steps, clip=0.5, kl=beta * dimensions).build({"value": 1.0}))
    found = []
    for i in range(16):  # each part with its own baseline, so that their spread is the error
        trajectory = policy.sample(source(count // 16).at(i), algorithm.plans(0, 0)[0], (0, "test", i))
        judged = [Judge(reward)(trajectory.outcome)]
        credited = Credited.of(trajectory, algorithm.credit(judged, trajectory, policy.locate))
        (pick,) = policy.picks(trajectory, torch.arange(count // 16), 10**6)
        losses, _ = algorithm.objective(policy, credited.minibatch(pick))
        gradient = torch.autograd.grad(losses.sum(), [network.mean, network.log_variance])
        # -1: ascent. S: the weights of a sample's actions sum to 1. (G - 1) / G: the mean holds the sample.
        scale = -(steps - 1) * (count // 16) / (count // 16 - 1)
        found.append(torch.cat([g.flatten() for g in gradient]) * scale)
    every = torch.stack(found)
    return every.mean(0), every.std(0) / 4


@pytest.mark.parametrize(
    ("reward", "law"),
    [
        (Quadratic(torch.tensor([0.6])), Mixture.normal([0.5], 0.8)),
        (Quadratic(torch.tensor([0.6])), Mixture.normal([0.9], 0.6)),
        (Quadratic(torch.tensor([0.3]), 1.0), Mixture.normal([0.2], 0.5)),
    ],
)
def test_the_loss_of_grpo_has_the_gradient_of_its_closed_form(reward, law):
    reference, beta, steps = Mixture.normal([0.5], 0.8), 1.0, 6
    found, error = gradient_of(law, reference, reward, beta, steps, 2048)
    at = [law.mean.double().reshape(()), law.variance.log().double().reshape(())]
    live = [value.clone().requires_grad_() for value in at]
    base = [reference.mean.double().reshape(()), reference.variance.log().double().reshape(())]
    now, still = (Expected(*values, steps, MEMORYLESS) for values in (at, base))
    exact = torch.autograd.grad(gain(reward, beta, Expected(*live, steps, MEMORYLESS), now, still), live)
    # The KL's own part is unbiased, so (G - 1) / G is too much for it by less than 1 %.
    assert ((found - torch.stack(exact)).abs() < 5 * error + 0.02).all()


@pytest.mark.parametrize("dimensions", [1, 2, 16])
def test_a_gaussian_tilted_by_a_linear_reward_is_where_grpo_comes_to_rest(dimensions):
    """The optimum only moves the mean, so that the KL of later steps is out of each action's hands."""
    slope = torch.full((dimensions,), 0.6 / math.sqrt(dimensions))
    reference, beta = Mixture.normal([0.5] * dimensions, 0.8), 0.8
    reward = Quadratic(slope)
    optimum = reference.tilted(reward, beta)
    assert_close(optimum.mean[0], 0.5 + 0.8 * slope / beta)
    assert_close(optimum.variance, reference.variance)
    rest, error = gradient_of(optimum, reference, reward, beta, 10, 2048)
    assert (rest.abs() < 5 * error + 0.02).all()
    start, _ = gradient_of(reference, reference, reward, beta, 10, 2048)
    assert float(start[:dimensions] @ slope) > 0.7 * float(slope @ slope)


@pytest.mark.slow
def test_training_by_flow_grpo_reaches_the_tilted_gaussian():
    reference, reward, beta = Mixture.normal([0.5], 0.8), Quadratic(torch.tensor([0.6])), 1.0
    policy = policy_of(reference)
    settings = TrainingSettings(
        iterations=40,
        learning_rate=0.04,
        updates=1,
        batch=10**6,
        weight_decay=0.0,
        grad_clip=1e9,
        ema_decay=0.9,
    )
    algorithm = unscaled(FlowGRPO(steps=8, clip=0.5, kl=beta, noise=MEMORYLESS).build({"value": 1.0}))
    Trainer(policy, algorithm, Scorer([Judge(reward)]), source(192), settings).run()
    optimum = reference.tilted(reward, beta)
    with policy.copies.use(AVERAGE):
        found = law_of(policy)
    assert_close(found.mean, optimum.mean, atol=0.1, rtol=0)
    assert_close(found.variance, optimum.variance, atol=0.12, rtol=0)
    assert float(optimum.mean - reference.mean) == pytest.approx(0.48, abs=1e-6)


def test_without_a_reward_and_at_the_reference_the_gradient_of_grpo_is_zero():
    reference = Mixture.normal([0.5, -0.2], 0.8)
    found, _ = gradient_of(reference, reference, Quadratic(torch.zeros(2)), 1.0, 5, 64)
    assert_close(found, torch.zeros_like(found), atol=1e-6, rtol=0)


def test_noise_that_is_not_memoryless_has_another_optimum():
    """Its paths remember their start, which no step can tilt; so less of the reward's pull arrives."""
    at = [torch.tensor(0.5).double(), torch.tensor(0.8).double().log()]

    def pulled(noise: Noise) -> float:
        """Variance of the end that the actions make, which is how far a unit slope can move the mean."""
        found = Expected(*at, 40, noise)
        left, total = torch.tensor(1.0).double(), torch.tensor(0.0).double()
        for a, std in zip(found.slope.flip(0), found.std.flip(0), strict=True):
            total, left = total + (left * std) ** 2, left * a
        return float(total)

    assert pulled(MEMORYLESS) == pytest.approx(0.8, rel=0.02)
    assert pulled(replace(MEMORYLESS, level=0.3)) < pulled(replace(MEMORYLESS, level=0.7)) < 0.77
    assert pulled(replace(MEMORYLESS, level=0.3)) < 0.5
