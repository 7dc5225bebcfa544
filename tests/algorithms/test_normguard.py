"""NormGuard (arXiv:2606.27771): a hinge on the length of the velocity, beside every method that has one."""

import pytest
import torch
from free import Free, run
from methods import assert_learns, assert_resumes
from methods import run as train
from torch.testing import assert_close

from mmalign.algorithms.awm import AWM
from mmalign.algorithms.diffusion_dpo import DiffusionDPO
from mmalign.algorithms.diffusion_nft import DiffusionNFT, NegativeAware
from mmalign.forward_process import Matching, NormGuard
from mmalign.objectives import REFERENCE, Anchor, NormExcess, anchored, norm_ratio

GUARD = NormGuard(weight=1.0)
METHODS = [
    DiffusionNFT(steps=5, norm_guard=GUARD),
    AWM(steps=5, norm_guard=GUARD, kl=0.0),
    DiffusionDPO(steps=5, norm_guard=GUARD, beta=100.0),
]
NAMES = ["NFT", "AWM", "DPO"]


def velocities(*, longer: float) -> tuple[torch.Tensor, torch.Tensor]:
    there = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    return (longer * there).requires_grad_(), there


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("longer", [0.5, 0.99, 1.0])
def test_a_velocity_no_longer_than_the_reference_is_free(power, longer):
    v, there = velocities(longer=longer)
    excess = NormExcess(power)(v, there)
    excess.sum().backward()
    assert not excess.any()
    assert not v.grad.any()


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_tenth_too_long_is_a_relative_excess_of_a_tenth_and_is_pulled_back_along_itself(power):
    v, there = velocities(longer=1.1)
    excess = NormExcess(power)(v, there)
    assert_close(excess, torch.full((3,), 0.1**power, dtype=torch.float64))
    excess.sum().backward()
    along = torch.nn.functional.cosine_similarity(v.grad.flatten(1), v.detach().flatten(1))
    assert_close(along, torch.ones(3, dtype=torch.float64))
    slope = power * 0.1 ** (power - 1) / there.flatten(1).norm(dim=1)
    assert_close(v.grad.flatten(1).norm(dim=1), slope)


def test_a_turn_of_equal_length_and_a_margin_are_free():
    v, there = velocities(longer=1.1)
    assert not NormExcess()(-there, there).any()
    assert not NormExcess(margin=0.11)(v, there).any()


def test_the_penalty_is_added_to_the_loss_and_logged():
    policy = Free()
    policy.live.data *= 1.2
    batch = policy.batch(torch.zeros(len(policy.x)))
    error = Matching("t", adaptive=True)
    plain, _, _ = run(NegativeAware(1.0, 5.0, error), policy, [batch])
    guarded, _, measures = run(NegativeAware(1.0, 5.0, error, GUARD.anchors), policy, [batch])
    ratio = norm_ratio(policy.live.detach()[:, 0], policy.start[:, 0])
    expected = ((ratio - 1).clamp(min=0) ** 2 * batch.weight).sum()
    assert expected > 0.01
    assert_close(guarded - plain, float(expected), rtol=1e-4, atol=1e-6)
    assert_close(measures["norm_ratio"], ratio)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_every_method_learns_under_guard_and_says_how_long_velocities_are(method):
    notes = assert_learns(method, by=0.05, iterations=20)
    assert "norm_excess" in notes.metrics[0]
    assert abs(notes.metrics[0]["norm_ratio"] - 1) < 0.2


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_a_stopped_run_goes_on(method, tmp_path):
    assert_resumes(method, tmp_path)


def test_the_guard_holds_velocities_down():
    longest = []
    for weight in (1e-9, 100.0):
        _, notes = train(DiffusionNFT(steps=5, norm_guard=NormGuard(weight=weight)), 15)
        longest.append(max(row["norm_ratio"] for row in notes.metrics.values()))
    assert longest[1] < longest[0]
    assert longest[1] < 1.03 < longest[0]


def test_a_copy_is_asked_once_for_all_that_pull_to_it():
    policy = Free()
    anchors = [Anchor(1.0), *GUARD.anchors, *NormGuard(1.0, guidance=2.0).anchors]
    held = anchored(anchors, policy, policy.batch(torch.zeros(len(policy.x))))
    assert policy.questions == [(REFERENCE, None), (REFERENCE, 2.0)]
    assert len(held) == 3


def test_no_weight_is_no_anchor_and_no_forward():
    assert NormGuard().anchors == ()
    assert REFERENCE not in DiffusionNFT().build({"redness": 1.0}).copies
    assert METHODS[0].build({"redness": 1.0}).copies[REFERENCE] == 1.0


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"power": 0.5}, {"margin": -0.1}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="must not be negative, power at least 1"):
        NormGuard(**wrong)
