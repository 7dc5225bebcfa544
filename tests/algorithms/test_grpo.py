"""GRPO for texts: its choices against sums written out."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from words import Claims, ToyWriter, pictures, trainer

from mmalign.algorithms.grpo import GRPO
from mmalign.credit import Peers
from mmalign.learning import Credited
from mmalign.records import Plan, Trajectory


def written() -> tuple[ToyWriter, Trajectory]:
    policy = ToyWriter()
    return policy, policy.sample(pictures().at(0), Plan(1), (0, "sample"))


def loss_of(method: GRPO, policy: ToyWriter, trajectory: Trajectory) -> torch.Tensor:
    algorithm, peers = method.build({"claims": 1.0}), Peers(trajectory.outcome.prompts)
    advantage = algorithm.credit([Claims()(trajectory.outcome)], trajectory, policy.locate, peers)
    (pick,) = policy.picks(trajectory, torch.arange(len(trajectory)), 1000)
    return algorithm.objective(policy, Credited.of(trajectory, advantage).minibatch(pick))[0].sum()


def advantages(trajectory: Trajectory, divide: bool) -> torch.Tensor:
    values = Claims()(trajectory.outcome).values[:, 0].reshape(2, -1)
    apart = values - values.mean(1, keepdim=True)
    if divide:
        apart = apart / (values.std(1, correction=0, keepdim=True) + 1e-6)
    return apart.flatten()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("length", ["token", "text"])
@pytest.mark.parametrize("std", ["group", "none"])
def test_the_loss_is_the_formula(ratio, length, std):
    policy, trajectory = written()
    with torch.no_grad():
        policy.module.scores.add_(
            0.4 * torch.randn(policy.module.scores.shape, generator=torch.manual_seed(1))
        )
    low, high = 0.1, 0.15
    found = loss_of(
        GRPO(ratio, length, std, clip=low, clip_high=high, advantage_clip=100.0), policy, trajectory
    )

    (pick,) = policy.picks(trajectory, torch.arange(len(trajectory)), 1000)
    now = torch.zeros_like(trajectory.log_prob)
    now[pick.rows, pick.columns] = policy.evaluate(trajectory, pick).log_prob
    mask, count = trajectory.mask, trajectory.mask.sum(1)
    log_ratio = (now - trajectory.log_prob) * mask
    if ratio == "sequence":
        log_ratio = (log_ratio.sum(1) / count)[:, None].expand_as(mask)
    r, a = log_ratio.exp(), advantages(trajectory, std == "group")[:, None]
    gain = torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a) * mask
    wanted = gain.sum() / count.sum() if length == "token" else (gain.sum(1) / count).mean()
    assert_close(found, -wanted, atol=1e-5, rtol=1e-4)


def test_a_sequence_ratio_moves_every_token_of_a_text_alike():
    policy, trajectory = written()
    loss_of(GRPO("sequence", "text"), policy, trajectory).backward()
    by_sequence = policy.module.scores.grad.clone()
    policy.module.zero_grad()
    loss_of(GRPO("token", "text"), policy, trajectory).backward()
    # At ratio 1 the gradient of the mean of logarithms is the mean of the gradients.
    assert_close(by_sequence, policy.module.scores.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "method", [GRPO(), GRPO("sequence", "text", clip=3e-3, clip_high=4e-3), GRPO(std="none")]
)
def test_it_learns_to_tell_the_truth(method):
    run = trainer(method, 40)
    run.run()
    reward = [run.tracker.metrics[step]["reward/claims"] for step in sorted(run.tracker.metrics)]
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.5
