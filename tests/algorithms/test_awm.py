"""AWM against its formulas (arXiv:2509.25050), and the estimator of arXiv:2602.04663."""

import math

import pytest
import torch
from free import Free, run
from known import TWO, Judge, law_of, policy_of, source
from torch.testing import assert_close
from training import GROUPS, MEMBERS, rise, trainer

from mmalign.algorithms.awm import AWM, MatchingRatio
from mmalign.copies import Ramp
from mmalign.forward_process import Matching
from mmalign.objectives import LAST, OLD, REFERENCE, Anchor
from mmalign.records import Noised, Renoise
from mmalign.sde import Noise, log_prob, transition

N = GROUPS * MEMBERS
PLAIN = Matching("one")
ADVANTAGE = torch.tensor([5.0, -1.0, 0.0, 2.0])


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def per_draw(likelihood=PLAIN, clip=1.0, anchors=()) -> MatchingRatio:
    return MatchingRatio(likelihood, clip, 5.0, anchors)


def per_sample(**settings):
    settings = {"likelihood": PLAIN, "kl": 0.0, "ema_kl": 0.0} | settings
    return AWM(ratio="sample", **settings).build({"r": 1.0}).objective


def moved(times=3, seed=0, by=0.1) -> Free:
    policy = Free(times=times, seed=seed)
    policy.live.data += by * torch.randn(policy.live.shape, generator=torch.Generator().manual_seed(9))
    return policy


@pytest.mark.parametrize("objective", [per_draw(), per_sample()], ids=["draw", "sample"])
def test_on_policy_the_ratio_is_1_and_the_gradient_the_advantage_times_that_of_pretraining(objective):
    policy = Free(times=3)
    _, gradient, measures = run(objective, policy, [policy.batch(ADVANTAGE)])
    assert torch.equal(measures["ratio"], torch.ones_like(measures["ratio"]))
    wanted = Free(times=3)
    error = wanted.errors(wanted.live)
    (error * ADVANTAGE[:, None] / 5 / 3).sum().backward()  # minimizing A m raises good samples
    assert_close(gradient, wanted.live.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("objective", [per_draw(), per_sample()], ids=["draw", "sample"])
def test_a_fresh_policy_is_not_asked_twice(objective):
    policy = Free(times=3)
    _, fresh, _ = run(objective, policy, [policy.batch(ADVANTAGE, fresh=True)])
    assert LAST not in [who for who, _ in policy.questions]
    _, asked, _ = run(objective, policy, [policy.batch(ADVANTAGE)])
    assert LAST in [who for who, _ in policy.questions]
    assert_close(fresh, asked)


def test_an_advantage_of_1_for_all_is_flow_matching_of_own_samples():
    policy = Free()
    gradient = run(per_draw(), policy, [policy.batch(torch.full((4,), 5.0))])[1]
    assert_close(gradient, 2 * (policy.start - policy.target) / policy.x[0].numel())


@pytest.mark.parametrize("clip", [0.05, 1.0])
def test_the_gain_of_each_draw_is_that_of_the_paper(clip):
    policy = moved()
    loss = run(per_draw(clip=clip), policy, [policy.batch(ADVANTAGE)])[0]
    ratio = (policy.errors(policy.start) - policy.errors(policy.live.detach())).exp()
    advantage = ADVANTAGE[:, None] / 5
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    assert_close(loss, -float(gain.mean(1).sum()), rtol=1e-5, atol=1e-6)


def test_the_ratio_of_a_sample_is_that_of_the_mean_over_its_draws_however_it_is_cut():
    policy = moved()
    batch = policy.batch(ADVANTAGE)
    whole, cut = run(per_sample(), policy, [batch]), run(per_sample(), policy, policy.parts(batch, 2, 5, 5))
    wanted = moved()
    change = (wanted.errors(wanted.start) - wanted.errors(wanted.live)).mean(1)
    gain = change.exp() * ADVANTAGE / 5
    (-gain.sum()).backward()
    for loss, gradient, _ in (whole, cut):
        assert_close(loss, -float(gain.detach().sum()), rtol=1e-4, atol=1e-5)
        assert_close(gradient, wanted.live.grad, rtol=1e-4, atol=1e-6)


def test_with_one_draw_both_estimators_are_one():
    policy, batch = moved(times=1), moved(times=1).batch(ADVANTAGE)
    a, b = run(per_draw(), policy, [batch]), run(per_sample(), policy, [batch])
    assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)
    assert_close(a[1], b[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", [per_draw(), per_sample()], ids=["draw", "sample"])
def test_without_an_advantage_there_is_no_gradient(objective):
    policy = moved()
    assert objective.idle_at_zero
    assert not run(objective, policy, [policy.batch(torch.zeros(4))])[1].any()


def test_the_loss_may_change_while_the_levels_and_the_estimator_stay():
    """Levels come from the plan, the estimator from Matching, the loss from the objective."""
    built = [AWM(ratio=ratio).build({"r": 1.0}) for ratio in ("draw", "sample")]
    assert built[0].plans(3, 0) == built[1].plans(3, 0)
    assert built[0].credit == built[1].credit
    assert built[0].copies == built[1].copies


def state(levels: int = 5) -> tuple[Noised, torch.Tensor]:
    policy = Free(samples=levels, seed=3)
    return Noised(policy.x[:, 0], policy.clean[:, 0], policy.sigma[:, 0]), policy


def test_weights_of_the_error():
    noised, policy = state()
    t, m = policy.sigma.flatten(), policy.errors(policy.start)[:, 0]
    for weight, factor in (("one", 1), ("t", t), ("t2", t**2), ("elbo", (1 - t) / t)):
        assert_close(Matching(weight)(noised, policy.start[:, 0]), m * factor, rtol=1e-4, atol=1e-5)
    size = (policy.start - policy.target).abs().flatten(1).mean(1)
    assert_close(Matching("one", adaptive=True)(noised, policy.start[:, 0]), m / size, rtol=1e-4, atol=1e-5)
    assert_close(Matching("t", adaptive=True)(noised, policy.start[:, 0]), t * m / size, rtol=1e-4, atol=1e-5)
    wanted = t / 0.25 * ((m + 1e-10) ** 0.25 - 1e-10**0.25)
    assert_close(Matching("t", power=0.25)(noised, policy.start[:, 0]), wanted, rtol=1e-4, atol=1e-5)


def test_a_power_has_a_finite_slope_where_there_is_no_error():
    noised, policy = state()
    velocity = policy.target[:, 0].clone().requires_grad_()
    Matching("t", power=0.25)(noised, velocity).sum().backward()
    assert torch.isfinite(velocity.grad).all()


def test_near_power_1_the_power_is_none():
    noised, policy = state()
    plain, near = (Matching("t", power=p)(noised, policy.start[:, 0]) for p in (1.0, 0.9999))
    assert_close(plain, near, rtol=1e-3, atol=1e-3)


class Gaussian:
    """x0 ~ N(mean, std^2) in one dimension, and its exact velocity."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def velocity(self, x, t):
        variance = (1 - t) ** 2 * self.std**2 + t**2
        clean = self.mean + (1 - t) * self.std**2 / variance * (x - (1 - t) * self.mean)
        return (x - clean) / t

    def log_prob(self, x):
        return torch.distributions.Normal(self.mean, self.std).log_prob(x)


def differences(draws: int, shared: bool = True, seed: int = 0) -> tuple[torch.Tensor, float]:
    """Estimates of log p(x0) - log q(x0) at one x0, one a draw of (t, e); and the truth."""
    draw = torch.Generator().manual_seed(seed)
    p, q, x0 = Gaussian(0.3, 1.0), Gaussian(-0.2, 1.2), 0.8
    found = []
    for law in (p, q):
        if law is p or not shared:
            t = (0.002 + 0.996 * torch.rand(draws, generator=draw, dtype=torch.float64)).reshape(-1, 1)
            e = torch.randn(draws, 1, generator=draw, dtype=torch.float64)
        clean = torch.full_like(e, x0)
        noised = Noised((1 - t) * clean + t * e, clean, t)
        found.append(-Matching("elbo")(noised, law.velocity(noised.x, t)))
    truth = float(p.log_prob(torch.tensor(x0)) - q.log_prob(torch.tensor(x0)))
    return found[0] - found[1], truth


def test_the_elbo_weight_gives_the_difference_of_log_likelihoods_of_gaussians():
    found, truth = differences(400_000)
    error = float(found.std()) / math.sqrt(len(found))
    assert error < 0.01
    assert abs(float(found.mean()) - truth) < 4 * error + 0.005  # the ends of 0..1 are left out


def test_the_variance_of_the_estimate_falls_with_the_number_of_draws_and_more_so_with_shared_ones():
    found, _ = differences(200_000)
    few, many = (found.reshape(-1, n).mean(1).var() for n in (4, 64))
    assert float(few / many) == pytest.approx(16, rel=0.2)
    apart, _ = differences(200_000, shared=False)
    assert found.var() < apart.var() / 10


def pulls(count: int = 200_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of DDPO and AWM by w, for v = w x, on single samples x0 ~ N(0, 1) with advantage x0^2 - 1.

    Both stand at the same x_t. DDPO raises the odds of an x_u that was drawn between x0 and x_t, AWM moves to
    what x0 says of the mean of such draws.
    """
    draw, t, u = torch.Generator().manual_seed(0), scalar(0.6), scalar(0.5)
    clean, e, fresh = torch.randn(3, count, 1, generator=draw, dtype=torch.float64)
    keep = (1 - t) / (1 - u)
    x_u = (1 - u) * clean + u * e
    x_t = keep * x_u + (t**2 - keep**2 * u**2).sqrt() * fresh
    w = torch.full((count,), 0.3, dtype=torch.float64, requires_grad=True)
    velocity, noise, advantage = w[:, None] * x_t, Noise("precise", math.sqrt(2)), clean[:, 0] ** 2 - 1
    step = transition(x_t, velocity, t, u, noise, 0.9)
    error = PLAIN(Noised(x_t, clean, t.expand(count, 1)), velocity)
    ddpo = advantage * log_prob(x_u, step, noise, (1,))
    awm = -advantage * (step.slope**2 / (2 * step.std**2)).flatten() * error
    return tuple(torch.autograd.grad(gain.sum(), w, retain_graph=True)[0] for gain in (ddpo, awm))


def test_the_gradient_is_that_of_ddpo_on_average_and_varies_less():
    """The theorem of the paper: DDPO is score matching against a target that has noise of its own."""
    ddpo, awm = pulls()
    assert awm.var() < 0.7 * ddpo.var()
    gap = ddpo - awm
    assert abs(float(awm.mean())) > 10 * float(awm.std()) / math.sqrt(len(awm))
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap))


def test_of_two_modes_the_better_one_wins():
    method = AWM(steps=6, renoise=Renoise(4))
    given = {"reward": Judge(lambda x: x[:, 0]), "prompts": source(16, groups=4), "learning_rate": 0.05}
    found = trainer(method, 12, policy=policy_of(TWO, Noise(level=0.0)), **given)
    before = float(law_of(found.policy).weight[1])
    found.run()
    scores = [metrics["reward/value"] for metrics in found.tracker.metrics.values()]
    assert law_of(found.policy).weight[1] > before + 0.2
    assert scores[-1] > scores[0] + 0.5


def test_the_defaults_are_those_of_the_public_code():
    built = AWM().build({"r": 1.0})
    (plan,) = built.plans(0, 0)
    assert (plan.steps, plan.sde_steps, plan.renoise) == (14, (), Renoise(6, "grid", (0.1, 0.9)))
    assert built.objective.likelihood == Matching("t", power=0.25)
    assert built.objective.anchors == (Anchor(0.001), Anchor(1.0, OLD, name="ema_kl"))
    assert built.copies == {LAST: 0.0, REFERENCE: 1.0, OLD: Ramp(0.0, 0.001, 0.3)}
    assert built.sampler is None


@pytest.mark.parametrize("ratio", ["draw", "sample"])
@pytest.mark.parametrize(("updates", "batch"), [(1, 7), (2, 7), (2, 1000)])
def test_forwards_are_those_of_the_formula(ratio, updates, batch):
    method = AWM(steps=6, renoise=Renoise(3), ratio=ratio, kl=0.1, ema_kl=0.0)
    found = trainer(method, batch=batch, updates=updates)
    found.run()
    counts = found.policy.forwards
    assert (counts.sample, counts.train) == (N * 6, N * 3)
    last, look = N * 3 * (updates - 1) // updates, N * 3 * (ratio == "sample" and batch < 1000)
    assert counts.reference == N * 3 + last + look


@pytest.mark.parametrize("ratio", ["draw", "sample"])
def test_the_reward_rises(ratio):
    assert rise(AWM(steps=5, ratio=ratio, renoise=Renoise(4), ema_kl=0.1)) > 0.2


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"kl": -1.0}, {"ema_kl": -1.0}, {"advantage_clip": 0.0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AWM(**wrong)
