"""GRPO-Guard: what the normalized ratio is and is not, and the balance of steps (arXiv:2510.22319)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from methods import N, assert_counts, assert_learns, assert_resumes, run
from torch.testing import assert_close
from toys import ToyFlow, names

from mmalign.algorithms.grpo_guard import GRPOGuard, GuardedRatio, guarded_log_ratio
from mmalign.objectives import divergence
from mmalign.records import Drawn, Evaluation, Minibatch, Plan
from mmalign.sde import Noise, transition

SMALL = GRPOGuard(steps=5, clip=1e-2)
FLOW = Noise("flow", 0.7)


def drawn(rows: int, std: float = 0.4, shift: float = 0.3, seed: int = 0) -> tuple[Evaluation, torch.Tensor]:
    """Actions [rows, 6] drawn around a mean that moved by `shift` times a direction since; and log r."""
    draw = torch.Generator().manual_seed(seed)
    old, direction = torch.randn(2, 1, 6, dtype=torch.float64, generator=draw)
    z = torch.randn(rows, 6, dtype=torch.float64, generator=draw)
    old = old.expand(rows, -1)
    mean, x_next = old + shift * direction, old + std * z
    log_ratio = ((x_next - old) ** 2 - (x_next - mean) ** 2).mean(1) / (2 * std**2)
    found = Evaluation(
        log_ratio, mean, torch.full((rows, 1), std, dtype=torch.float64), drawn=Drawn(old, x_next)
    )
    return found, log_ratio


def test_it_is_the_log_ratio_with_its_bias_and_its_scale_removed():
    new, log_ratio = drawn(50)
    gap = divergence(new, Evaluation(log_ratio, new.drawn.mean))
    assert_close(guarded_log_ratio(new), 0.4 * (log_ratio + gap))


def test_on_average_the_ratio_is_biased_by_minus_the_divergence_and_the_normalized_one_is_not():
    new, log_ratio = drawn(200_000)
    gap = float(divergence(new, Evaluation(log_ratio, new.drawn.mean))[0])
    guarded = guarded_log_ratio(new)
    for found, mean in ((log_ratio, -gap), (guarded, 0.0)):
        assert float(found.mean()) == pytest.approx(mean, abs=5 * float(found.std()) / math.sqrt(len(found)))
    size = (new.mean - new.drawn.mean)[0].norm() / 6
    assert_close(guarded.std(), size, rtol=0.02, atol=0)
    assert_close(log_ratio.std(), size / 0.4, rtol=0.02, atol=0)


def test_with_an_unmoved_mean_it_is_exactly_zero():
    assert (guarded_log_ratio(drawn(5, shift=0.0)[0]) == 0).all()


def test_it_has_the_unit_of_the_latent():
    new, _ = drawn(7)
    drawn_big = Drawn(3 * new.drawn.mean, 3 * new.drawn.x_next)
    big = replace(new, mean=3 * new.mean, std=3 * new.std, drawn=drawn_big)
    assert_close(guarded_log_ratio(big), 3 * guarded_log_ratio(new))


def test_places_keep_ratios_of_their_own():
    shape = (4, 2, 3, 3)
    mean, old, x_next = torch.randn(3, *shape)
    new = Evaluation(torch.zeros(4, 3, 3), mean, torch.full((4, 1, 1, 1), 0.5), drawn=Drawn(old, x_next))
    by_place = guarded_log_ratio(new)
    assert by_place.shape == (4, 3, 3)
    whole = guarded_log_ratio(replace(new, log_prob=torch.zeros(4)))
    assert_close(by_place.mean((1, 2)), whole)


def scales(guarded: bool) -> list[float]:
    """How strongly each of ten steps with shift 3 pulls on the velocity, in units of z."""
    grid = torch.linspace(1, 0, 11, dtype=torch.float64)
    sigmas = 3 * grid / (1 + 2 * grid)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    found = []
    for t, u in pairwise(sigmas):
        step = transition(zero, zero, t, u, FLOW, sigmas[1])
        found.append(float(step.slope / (step.step if guarded else step.std)))
    return found


def test_raw_ratios_pull_unequally_at_the_steps_and_balanced_ones_do_not():
    raw, balanced = scales(False), scales(True)
    assert (raw[0], raw[8], raw[9]) == pytest.approx((0.051, 0.868, 1.540), abs=1e-3)
    assert raw[8] / raw[0] == pytest.approx(17, abs=0.5)
    assert raw[9] / raw[0] == pytest.approx(30, abs=0.5)
    assert balanced == pytest.approx([1.0] + [1.245] * 9, abs=1e-6)


@pytest.mark.parametrize("noise", [FLOW, Noise("precise", 0.7), Noise("cps", 0.8)])
@pytest.mark.parametrize("balance", ["step", "slope"])
def test_at_a_ratio_of_one_the_gradient_is_advantage_times_z_times_slope_over_balance(noise, balance):
    policy = Free(noise)
    losses, measures = GuardedRatio(1e9, balance)(policy, policy.batch)
    (found,) = torch.autograd.grad(losses.sum(), policy.velocity)
    a, z, step = policy.batch.advantage[0], policy.z, policy.step
    by = step.step if balance == "step" else step.slope
    expected = -(a * policy.batch.weight)[:, None] * z * -step.slope / by / z.shape[1]
    assert_close(found, expected)
    assert (measures["ratio"] == 1).all()


class Free:
    """A policy whose velocities are free; its actions were drawn with them."""

    def __init__(self, noise: Noise) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x, velocity, self.z = torch.randn(3, 4, 6, dtype=torch.float64, generator=draw)
        self.velocity, self.noise = velocity.requires_grad_(), noise
        self.sigma = torch.tensor([0.9, 0.7, 0.5, 0.2], dtype=torch.float64)
        self.step = self._step(velocity.detach())
        self.drawn = Drawn(self.step.mean, self.step.mean + self.step.std * self.z)
        advantage = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
        pick = torch.arange(4)
        weight = torch.full((4,), 0.25, dtype=torch.float64)
        self.batch = SimpleNamespace(trajectory=None, pick=pick, advantage=advantage, weight=weight)

    def _step(self, velocity):
        return transition(self.x, velocity, self.sigma, self.sigma - 0.1, self.noise, 0.95)

    def evaluate(self, trajectory, pick) -> Evaluation:
        now = self._step(self.velocity)
        return Evaluation(
            torch.zeros(4, dtype=torch.float64), now.mean, now.std, self.velocity, now.step,
            slope=now.slope, drawn=self.drawn,
        )  # fmt: skip


def test_the_kl_pulls_as_it_does_in_flow_grpo():
    policy = ToyFlow(FLOW)
    trajectory = policy.sample(names(2, 4), Plan(5, (0, 1, 2, 3)), (0, "t"))
    pick = next(policy.picks(trajectory, torch.arange(8), 100))
    batch = Minibatch(trajectory, pick, torch.zeros(1, 32), torch.full((32,), 1 / 32))
    policy.copies.save("reference")
    assert GuardedRatio(1e-2, kl=0.5)(policy, batch)[0].abs().max() < 1e-9
    with torch.no_grad():
        policy.module.last += 0.1
    losses, measures = GuardedRatio(1e-2, kl=0.5)(policy, batch)
    assert_close(losses, 0.5 * measures["kl"].mean()[None])
    assert losses > 0


def test_forwards():
    assert assert_counts(SMALL) == (N * 5, N * 4)
    pulled = run(replace(SMALL, kl=0.1))[0].policy.forwards
    assert pulled.reference == pulled.train == N * 4


def test_the_ratio_is_one_before_the_first_update_and_is_kept_in_range_after():
    assert run(SMALL, updates=1)[1].metrics[0]["ratio_max"] - 1 < 1e-6
    assert run(replace(SMALL, clip=1e-4), updates=4)[1].metrics[0]["clip_share"] > 0


@pytest.mark.parametrize("more", [{}, {"balance": "slope", "noise": Noise("precise", 0.7)}, {"kl": 0.01}])
def test_it_learns(more):
    assert_learns(replace(SMALL, **more))


def test_it_resumes(tmp_path):
    assert_resumes(replace(SMALL, kl=0.1), tmp_path)


def test_the_defaults_are_the_papers():
    built = GRPOGuard().build({"r": 1.0})
    assert built.plans(0, 0)[0].sde_steps == tuple(range(9))
    assert built.objective == GuardedRatio(2e-6, "step", 0.0)
    assert (built.noise, built.copies) == (FLOW, {})


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"noise\.level must be above 0"):
        GRPOGuard(noise=Noise("flow", 0.0))
    for wrong in ({"clip": 0.0}, {"clip": 1e-6, "kl": -1.0}):
        with pytest.raises(ValueError, match="got"):
            GuardedRatio(**wrong)
    with pytest.raises(TypeError, match="GRPO-Guard needs Gaussian actions"):
        guarded_log_ratio(Evaluation(torch.zeros(3)))
