"""Diffusion-DPO against its formulas (arXiv:2311.12908), on drawn pairs and on given ones."""

import math

import pytest
import torch
from free import Free, run
from pairs import write
from torch.testing import assert_close
from toys import names
from training import GROUPS, MEMBERS, rise, trainer

from mmalign.algorithms.diffusion_dpo import DiffusionDPO
from mmalign.credit import best_and_worst
from mmalign.data import PromptError, PromptSource, read_prompts
from mmalign.objectives import REFERENCE
from mmalign.records import Outcome, Renoise, RewardSignal, Trajectory
from mmalign.rewardmodels.preference import Preference

N = GROUPS * MEMBERS
PAIR, HALF = torch.tensor([1.0, -1.0]), torch.full((2,), 0.5)


def objective(beta=3.0):
    return DiffusionDPO(beta=beta).build({"r": 1.0}).objective


def world(by: float = 0.2) -> Free:
    policy = Free(2, times=3, shared=True)
    policy.live.data += by * torch.randn(policy.live.shape, generator=torch.Generator().manual_seed(4))
    return policy


def difference(policy: Free) -> torch.Tensor:
    change = policy.errors(policy.live) - policy.errors(policy.start)
    return change[0] - change[1]


def test_loss_and_gradient_are_those_of_the_paper():
    policy, wanted = world(), world()
    loss = -torch.nn.functional.logsigmoid(-1.5 * difference(wanted)).mean()
    loss.backward()
    found, gradient, measures = run(objective(), policy, [policy.batch(PAIR, HALF)])
    assert_close(found, float(loss.detach()), rtol=1e-5, atol=1e-6)
    assert_close(gradient, wanted.live.grad, rtol=1e-4, atol=1e-7)
    won, lost = (measures[f"change/{side}"].reshape(2, 3).sum(0) / 2 for side in ("won", "lost"))
    assert_close((won - lost).float(), difference(policy).detach(), rtol=1e-4, atol=1e-5)


def test_at_the_reference_the_loss_is_log_2_and_the_gradient_that_of_the_difference():
    policy, wanted = world(0.0), world(0.0)
    found, gradient, measures = run(objective(), policy, [policy.batch(PAIR, HALF)])
    assert_close(found, math.log(2), rtol=1e-6, atol=0)
    error = wanted.errors(wanted.live)
    (-3.0 / 4 * (error[1] - error[0]).mean()).backward()
    assert_close(gradient, wanted.live.grad, rtol=1e-4, atol=1e-7)
    assert torch.equal(measures["accuracy"].float(), torch.full((6,), 0.5))


def test_an_equal_pair_is_log_2_and_moves_nothing():
    policy = world()
    for name in ("x", "clean", "sigma", "target", "start"):
        getattr(policy, name)[1] = getattr(policy, name)[0]
    policy.live.data[1] = policy.live.data[0]
    found, gradient, _ = run(objective(), policy, [policy.batch(PAIR, HALF)])
    assert_close(found, math.log(2), rtol=1e-6, atol=0)
    assert_close(gradient[0], -gradient[1])  # the same state: both pulls act on the same weights


def test_swapping_the_pair_turns_the_margin():
    policy = world()
    margins = [run(objective(), policy, [policy.batch(sign * PAIR, HALF)])[2]["margin"] for sign in (1, -1)]
    assert_close(margins[0], -margins[1])


def test_errors_that_are_sums_need_a_beta_divided_by_their_size():
    policy = world()
    size = policy.x[0, 0].numel()
    mean = run(objective(3.0), policy, [policy.batch(PAIR, HALF)])[0]
    sums = -torch.nn.functional.logsigmoid(-3.0 / size / 2 * size * difference(policy)).mean()
    assert_close(mean, float(sums.detach()), rtol=1e-5, atol=1e-6)


def test_the_reference_is_asked_without_gradient():
    policy = world()
    run(objective(), policy, [policy.batch(PAIR, HALF)])
    assert policy.questions == [(REFERENCE, None), (None, None)]  # one minibatch: its forward is the look
    assert not policy.start.requires_grad


def trajectory(groups=2, members=3) -> Trajectory:
    count = groups * members
    return Trajectory(
        Outcome(names(groups, members), []),
        torch.zeros(count, 2),
        torch.ones(count, 2, dtype=torch.bool),
        {},
    )


def test_the_best_and_the_worst_of_a_group_make_the_pair_and_ties_make_none():
    credit = DiffusionDPO().build({"r": 1.0}).credit
    signal = RewardSignal("r", torch.tensor([[0.2], [0.9], [-1.0], [7.0], [7.0], [7.0]]))
    found = credit([signal], trajectory(), lambda where, t: torch.ones(1, 1, 2))
    assert found.values[0, :, 0].tolist() == [0, 1, -1, 0, 0, 0]
    assert found.weight[:, 0].tolist() == [0, 0.25, 0.25, 0, 0, 0]


def test_best_and_worst_pass_over_what_has_no_verdict():
    values = torch.tensor([[9.0], [1.0], [2.0], [-9.0]])
    valid = torch.tensor([[False], [True], [True], [False]])
    found = best_and_worst(values, valid, torch.zeros(4, dtype=torch.int64), True)
    assert found.flatten().tolist() == [0, -1, 1, 0]


def test_the_sampler_is_taken_over_now_and_then():
    built = DiffusionDPO(refresh=3).build({"r": 1.0})
    assert built.sampler == "sampler"
    assert [built.copies["sampler"](i) for i in range(6)] == [1, 1, 0, 1, 1, 0]
    assert DiffusionDPO().build({"r": 1.0}).sampler is None


def test_forwards_are_those_of_the_formula():
    found = trainer(DiffusionDPO(steps=6, renoise=Renoise(3, shared=True)), batch=7)
    found.run()
    counts, pairs = found.policy.forwards, GROUPS
    assert (counts.sample, counts.train, counts.reference) == (N * 6, 2 * pairs * 3, 2 * 2 * pairs * 3)


def test_the_reward_rises():
    assert rise(DiffusionDPO(steps=5, beta=20.0), iterations=40) > 0.2


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"refresh": 0}, {"renoise": Renoise(4)}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DiffusionDPO(**wrong)


# ---- given pairs


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path)


def test_a_line_with_two_pictures_is_a_group_of_two(pairs):
    prompts = PromptSource(read_prompts(pairs), 3, 2, 0).at(0)
    assert prompts.member.tolist() == [0, 1] * 3
    for text, member, extra in zip(prompts.text, prompts.member.tolist(), prompts.extra, strict=True):
        side = ("chosen", "rejected")[member]
        assert extra == {
            "image": str(pairs.parent / f"{side}_{text[-1]}.png"),
            "preferred": 1.0 - member,
        }
    signal = Preference()(Outcome(prompts, torch.zeros(6, 3, 8, 8)))
    assert signal.values.flatten().tolist() == [1, 0] * 3


def test_pictures_that_are_missing_and_groups_of_another_size_are_refused(pairs):
    with pytest.raises(PromptError, match=r"prompts\.group must be 2"):
        PromptSource(read_prompts(pairs), 3, 4, 0)
    (pairs.parent / "rejected_1.png").unlink()
    with pytest.raises(PromptError, match=r"line 2: there is no picture 'rejected_1\.png'"):
        read_prompts(pairs)


def test_a_drawn_picture_has_no_verdict_from_the_file():
    signal = Preference()(Outcome(names(1, 2), torch.zeros(2, 3, 8, 8)))
    assert not signal.valid.any()
