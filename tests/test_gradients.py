"""What methods that differentiate through rewards share: halting, drawing on, and asking the rewards."""

from __future__ import annotations

import pytest
import torch
from known import TWO, Judge, policy_of
from torch.testing import assert_close
from toys import Redness, ToyFlow

from mmalign.gradients import Differentiated, drawing_on
from mmalign.lab.gaussians import points
from mmalign.records import Minibatch, Pick, Plan
from mmalign.sde import euler
from mmalign.testing import prompts_of

KEY = (0, "test")


def halted(halt: int = 2, noises: int = 1, steps: int = 5, texts: int = 2):
    """A policy, samples halted on their way, and all their actions."""
    policy, prompts = policy_of(TWO), prompts_of([f"point {i}" for i in range(texts)], 3)
    trajectory = policy.sample(prompts, Plan(steps, halt=halt, noises=noises), KEY)
    return policy, trajectory, Pick(*trajectory.mask.nonzero(as_tuple=True))


def batch_of(trajectory, pick) -> Minibatch:
    return Minibatch(trajectory, pick, torch.zeros(1, len(pick)), torch.full((len(pick),), 1 / len(pick)))


@pytest.mark.parametrize("halt", [1, 3, 5])
def test_the_rest_of_the_way_leads_to_the_finished_sample(halt):
    policy, trajectory, pick = halted(halt)
    at = policy.halted(trajectory, pick)
    assert at.path.tolist() == pytest.approx([i / 5 for i in range(halt, -1, -1)], abs=1e-6)
    x = at.x
    with torch.no_grad():
        for sigma, after in zip(at.path[:-1], at.path[1:], strict=True):
            x = euler(x, policy.velocity(trajectory, pick, x, sigma), sigma, after)
    assert_close(x, at.clean)
    assert_close(policy.decode(at.clean), trajectory.outcome.media)
    plain = policy.sample(trajectory.outcome.prompts, Plan(5), KEY).outcome.media
    assert_close(trajectory.outcome.media, plain)


def test_every_fresh_noise_is_an_action_of_its_own_named_by_its_sample():
    policy, trajectory, pick = halted(noises=3)
    assert trajectory.mask.shape == trajectory.log_prob.shape == (6, 3)
    noise = policy.halted(trajectory, pick).noise
    assert len(noise.flatten(1).unique(dim=0)) == 18
    part = policy.sample(
        trajectory.outcome.prompts.take(torch.tensor([4, 1])), Plan(5, halt=2, noises=3), KEY
    )
    few = policy.halted(part, Pick(torch.tensor([0, 1]), torch.tensor([2, 0])))
    assert torch.equal(few.noise[0], noise[4 * 3 + 2])
    assert torch.equal(few.noise[1], noise[1 * 3])
    every = [torch.stack([p.rows, p.columns], 1) for p in policy.picks(trajectory, torch.arange(6), 4)]
    assert sorted(torch.cat(every).tolist()) == [[r, c] for r in range(6) for c in range(3)]


def test_forwards_with_gradients_count_as_training():
    policy, trajectory, pick = halted()
    before = policy.forwards.sample
    assert before == 6 * 5
    at = policy.halted(trajectory, pick)
    policy.velocity(trajectory, pick, at.x, at.path[0])
    assert (policy.forwards.sample, policy.forwards.train) == (before, 6)


def test_rewards_are_weighted_and_reach_the_latents():
    policy, trajectory, pick = halted()
    first, square, unused = (
        Judge(lambda x: x[:, 0], "first"), Judge(lambda x: -x[:, 0] ** 2, "square"), Redness()
    )  # fmt: skip
    reward = Differentiated({"first": 2.0, "square": 0.5, "redness": 0.0}, cost=lambda plan: 1)
    reward.meet([first, square, unused])
    latents = policy.halted(trajectory, pick).clean.requires_grad_()
    value = reward(policy, batch_of(trajectory, pick), latents)
    x = points(policy.decode(latents)).detach()[:, 0]
    assert_close(value, 2 * x - 0.5 * x**2)
    (gradient,) = torch.autograd.grad(value.sum(), latents)
    assert_close(gradient.flatten(), 2 - x, atol=1e-4, rtol=1e-4)


def test_rewards_can_be_told_other_words():
    told: list[str] = []

    class Listening(Judge):
        def differentiate(self, outcome):
            told.extend(outcome.prompts.text)
            return super().differentiate(outcome)

    policy, trajectory, pick = halted(texts=1)
    reward = Differentiated({"value": 1.0}, cost=lambda plan: 1)
    reward.meet([Listening(lambda x: x[:, 0])])
    clean = policy.halted(trajectory, pick).clean
    reward(policy, batch_of(trajectory, pick), clean, lambda text: f"fine {text}")
    assert told == ["fine point 0"] * 3
    assert trajectory.outcome.prompts.text == ["point 0"] * 3


def test_rewards_and_policies_without_a_gradient_are_named():
    with pytest.raises(TypeError, match="reward 'redness' cannot be differentiated"):
        Differentiated({"redness": 1.0}, cost=lambda plan: 1).meet([Redness()])
    with pytest.raises(ValueError, match="at least one reward needs a weight"):
        Differentiated({"redness": 0.0}, cost=lambda plan: 1).meet([Redness()])
    with pytest.raises(TypeError, match="ToyFlow cannot be differentiated through"):
        drawing_on(ToyFlow())
    policy = policy_of(TWO)
    trajectory = policy.sample(prompts_of(["a"], 2), Plan(4), KEY)
    with pytest.raises(ValueError, match="the plan has no halt"):
        policy.halted(trajectory, Pick(torch.tensor([0]), torch.tensor([0])))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"halt": 5}, r"halt must lie in 0\.\.4"),
        ({"halt": 1, "noises": 0}, "noises be at least 1"),
        ({"halt": 1, "sde_steps": (0,)}, "follows the plain ODE"),
        ({"halt": 1, "share_noise": True}, "share nothing"),
    ],
)
def test_plans_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Plan(4, **wrong)
