"""SAGE-GRPO (arXiv:2603.21872): the equalizer, both trust regions, and where they start and move.

That the variance of the noise adds up over half steps, lies below Euler's and has the card's numbers is
tested with the kernel, in tests/test_sde.py.
"""

import pytest
import torch
from methods import G, N, assert_counts, assert_learns, assert_resumes, run
from torch.testing import assert_close
from toys import ToyFlow, names

from mmalign.algorithms.sage_grpo import ANCHOR, SAGEGRPO, TrustRegions, equalized
from mmalign.credit import Credit
from mmalign.objectives import LAST, ClippedRatio, divergence, frozen
from mmalign.records import Minibatch, Plan
from mmalign.sde import Noise, log_prob, schedule, transition

SAGE = Noise("sage", 0.7)
METHOD = SAGEGRPO(steps=5, clip=1e-2)


def moved_policy(size: float = 0.02) -> tuple[ToyFlow, Minibatch]:
    """A policy that has left both its anchor and its last self, and actions of the latter."""
    policy = ToyFlow(SAGE)
    trajectory = policy.sample(names(2, 4), Plan(5, (0, 1, 2, 3)), (0,))
    pick = next(policy.picks(trajectory, torch.arange(8), 1000))
    for name in (ANCHOR, LAST):
        policy.copies.save(name)
        with torch.no_grad():
            for p in policy.module.parameters():
                if p.requires_grad:
                    p.add_(size)
    weight = torch.full((len(pick),), 1 / len(pick))
    return policy, Minibatch(trajectory, pick, torch.randn(1, len(pick)), weight)


def test_every_step_pulls_equally_hard_on_the_velocity():
    """Root mean square gradient of the scaled log-ratio by the velocity, over many draws at random states."""
    sigmas, count = torch.linspace(1, 0, 11), 4000
    policy = ToyFlow(SAGE)
    trajectory = policy.sample(names(1, 2), Plan(10, tuple(range(9))), (0,))
    weights, pulls = equalized(SAGE, trajectory)[0], []
    for step in range(9):
        velocity = torch.randn(count, 4, 2, 2, requires_grad=True)
        sigma, sigma_next = (sigmas[i].expand(count) for i in (step, step + 1))
        moved = transition(torch.randn(count, 4, 2, 2), velocity, sigma, sigma_next, SAGE, sigmas[1])
        drawn = (moved.mean + moved.std * torch.randn_like(moved.mean)).detach()
        log_prob(drawn, moved, SAGE, (1, 2, 3)).sum().backward()
        pulls.append(velocity.grad.square().mean().sqrt())
    raw = torch.stack(pulls)
    assert raw.max() / raw.min() > 3
    equal = raw * weights
    assert (equal / equal.mean() - 1).abs().max() < 0.1
    assert float(weights.mean()) == pytest.approx(1)


def test_the_equalizer_is_the_std_over_the_slope():
    trajectory = ToyFlow(SAGE).sample(names(1, 2), Plan(6, (1, 3)), (0,))
    moved = schedule(trajectory.sigmas, SAGE)
    one, three = (float(moved.std[i] / moved.slope[i]) for i in (1, 3))
    expected = torch.tensor([2 * one / (one + three), 2 * three / (one + three)])
    assert_close(equalized(SAGE, trajectory), expected.expand(2, 2))


def test_the_loss_is_the_clipped_one_and_both_divergences():
    policy, batch = moved_policy()
    regions = {ANCHOR: 3.0, LAST: 0.5}
    losses, measures = TrustRegions(1e-2, regions)(policy, batch)
    plain, _ = ClippedRatio(1e-2, 1e-2)(policy, batch)
    new = policy.evaluate(batch.trajectory, batch.pick)
    expected = float(plain.detach())
    for name, kl in regions.items():
        away = divergence(new, frozen(policy, batch, name))
        assert_close(measures[f"kl/{name}"], away.detach())
        expected += kl * float((away.detach() * batch.weight).sum())
    assert measures[f"kl/{ANCHOR}"].mean() > measures[f"kl/{LAST}"].mean() > 0
    assert float(losses.detach()) == pytest.approx(expected, rel=1e-5)


def test_without_regions_and_equalizer_it_is_the_clipped_ratio():
    policy, batch = moved_policy()
    assert_close(TrustRegions(1e-2, {})(policy, batch)[0], ClippedRatio(1e-2, 1e-2)(policy, batch)[0])
    plain = SAGEGRPO(anchor_kl=0.0, step_kl=0.0, equalize=False).build({"redness": 1.0})
    assert plain.credit == Credit({"redness": 1.0}, plain.credit.normalize, "total_first", "whole")
    assert not plain.copies


def test_fresh_samples_are_not_asked_how_far_their_own_policy_is():
    _, notes = run(METHOD, updates=1)
    assert f"kl/{LAST}" not in notes.metrics[0]
    _, notes = run(METHOD, updates=2)
    assert notes.metrics[0][f"kl/{LAST}"] > 0


def test_the_anchor_moves_when_it_should_and_is_then_no_distance_away():
    _, notes = run(SAGEGRPO(steps=5, clip=1e-2, move_every=3), 7, updates=1)
    away = [notes.metrics[i][f"kl/{ANCHOR}"] for i in range(7)]
    assert [i for i, kl in enumerate(away) if kl < 1e-12] == [0, 3, 6]
    assert away[1] < away[2]
    assert away[4] < away[5]


def test_a_strong_anchor_keeps_the_policy_near():
    far = []
    for kl in (1e-9, 100.0):
        _, notes = run(SAGEGRPO(steps=5, clip=1e-2, anchor_kl=kl, step_kl=0.0, move_every=100), 10)
        far.append(notes.metrics[9][f"kl/{ANCHOR}"])
    assert far[1] < far[0] / 2


def test_it_learns():
    assert_learns(METHOD)


def test_it_goes_on_where_it_was_stopped(tmp_path):
    assert_resumes(SAGEGRPO(steps=5, clip=1e-2, move_every=2), tmp_path)


def test_forwards_are_those_of_the_formula():
    assert assert_counts(METHOD) == (N * 5, N * 4)
    assert assert_counts(SAGEGRPO(steps=5, clip=1e-2, share_noise=True))[0] < N * 5
    found, _ = run(METHOD, updates=2)
    assert found.policy.forwards.reference == N * 4 + N * 4 // 2
    assert G * 4 == N


@pytest.mark.parametrize("wrong", [{"anchor_kl": -1.0}, {"step_kl": -1.0}, {"move_every": 0}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="must not be negative, move_every at least 1"):
        SAGEGRPO(**wrong)
    with pytest.raises(ValueError, match="needs noise"):
        SAGEGRPO(noise=Noise("sage", 0.0))
