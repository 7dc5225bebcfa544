"""DDPO and DPOK: both forms of the gradient, exact counts of forwards, and that they learn."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from toys import Notes, Redness, ToyFlow, source

from mmalign.algorithms.ddpo import DDPO
from mmalign.credit import center, zscore
from mmalign.learning import Credited
from mmalign.scoring import Scorer
from mmalign.sde import Noise
from mmalign.trainer import Trainer, TrainingSettings

N, G, T = 32, 8, 5


def run(method: DDPO, iterations: int = 1, **settings: object) -> tuple[Trainer, Notes]:
    notes = Notes()
    given = {"iterations": iterations, "learning_rate": 1e-2, "batch": 1000, "updates": 1} | settings
    found = Trainer(
        ToyFlow(method.noise),
        method.build({"redness": 1.0}),
        Scorer([Redness()]),
        source(N // G, G),
        TrainingSettings(**given),  # type: ignore[arg-type]
        tracker=notes,  # type: ignore[arg-type]
    )
    found.run()
    return found, notes


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("batch", [7, 1000])
def test_forwards_are_those_of_the_formula(kl, batch):
    counts = run(DDPO(steps=T, clip=1e-2, kl=kl), batch=batch)[0].policy.forwards
    assert (counts.sample, counts.train) == (N * T, N * (T - 1))
    assert counts.reference == (N * (T - 1) if kl else 0)


def test_the_defaults_are_the_papers():
    found = DDPO().build({"r": 1.0})
    assert found.plans(0, 0)[0].sde_steps == tuple(range(49))
    assert (found.objective.low, found.objective.high, found.objective.kl) == (1e-4, 1e-4, 0.0)
    assert found.noise == Noise("ddim", 1.0)
    assert (found.credit.normalize, found.credit.clip) == (zscore, 5.0)
    assert DDPO(kl=0.1).build({"r": 1.0}).copies == {"reference": 1.0}


def gradients_of(method: DDPO) -> tuple[torch.Tensor, torch.Tensor]:
    """By the objective, and by the log-probability times the advantage."""
    policy, algorithm = ToyFlow(method.noise), method.build({"redness": 1.0})
    policy.copies.save("reference")
    trajectory = policy.sample(source(N // G, G).at(0), algorithm.plans(0, 0)[0], (0, "test"))
    advantage = algorithm.credit([Redness()(trajectory.outcome)], trajectory, policy.locate)
    (pick,) = policy.picks(trajectory, torch.arange(N), 1000)
    batch = Credited.of(trajectory, advantage).minibatch(pick)
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    losses, _ = algorithm.objective(policy, batch)
    log_prob = policy.evaluate(trajectory, pick).log_prob
    by_hand = -(log_prob * batch.advantage[0] * batch.weight).sum()
    found = [torch.autograd.grad(loss, parameters) for loss in (losses.sum(), by_hand)]
    return tuple(torch.cat([g.flatten() for g in one]) for one in found)


@pytest.mark.parametrize("method", [DDPO(steps=T, clip=None), DDPO(steps=T, clip=1e-2)])
def test_before_the_first_step_both_forms_are_reinforce(method):
    one, two = gradients_of(method)
    assert two.norm() > 0
    assert_close(one, two, atol=1e-7, rtol=1e-4)


def test_at_the_base_the_pull_of_dpok_has_no_gradient():
    assert_close(gradients_of(DDPO(steps=T, clip=None, kl=1.0))[0], gradients_of(DDPO(steps=T, clip=None))[0])


def test_without_a_clip_a_far_ratio_still_has_its_gradient():
    objective = DDPO(clip=None).build({"r": 1.0}).objective
    assert objective.clip_range == math.inf
    clipped = DDPO(clip=1e-4).build({"r": 1.0}).objective
    assert clipped.clip_range == 1e-4


def test_the_baseline_leaves_the_expected_gradient_and_lowers_its_variance():
    """A bandit: x ~ N(0, 1), R = 3 + x, so that the gradient of E R by the mean is 1."""
    draw, size = torch.Generator().manual_seed(0), 16
    x = torch.randn(4000, size, generator=draw, dtype=torch.float64)
    reward, score = 3 + x, x  # score: gradient of log p by the mean
    group = torch.arange(4000).repeat_interleave(size)
    advantage = center(reward.reshape(-1, 1), torch.ones(4000 * size, 1, dtype=torch.bool), group, True)
    advantage = advantage.reshape(4000, size) * size / (size - 1)  # the mean holds the sample itself
    plain, based = (reward * score).mean(1), (advantage * score).mean(1)
    for found in (plain, based):
        assert found.mean() == pytest.approx(1, abs=5 * float(found.std()) / math.sqrt(4000))
    assert based.var() < plain.var() / 4


def test_without_noise_there_is_nothing_to_learn_from():
    with pytest.raises(ValueError, match=r"noise\.level must be above 0 \(usual: 1\.0\)"):
        DDPO(noise=Noise("ddim", 0.0))
    with pytest.raises(ValueError, match="kl must be 0 or more"):
        DDPO(kl=-1.0).build({"r": 1.0})
    with pytest.raises(ValueError, match="clip must be positive"):
        DDPO(clip=0.0).build({"r": 1.0})


@pytest.mark.parametrize(
    "method",
    [DDPO(steps=T, clip=None), DDPO(steps=T, clip=1e-2), DDPO(steps=T, clip=None, kl=0.01)],
    ids=["DDPO-SF", "DDPO-IS", "DPOK"],
)
def test_the_reward_rises(method):
    given = {"learning_rate": 2e-2} if method.clip is None else {"updates": 2}
    _, notes = run(method, iterations=35, **given)
    scores = [m["reward/redness"] for m in notes.metrics.values()]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3


def test_the_first_update_has_ratio_one():
    metrics = run(replace(DDPO(steps=T), clip=1e-2))[1].metrics[0]
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
