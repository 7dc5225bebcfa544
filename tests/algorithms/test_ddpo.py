"""DDPO and DPOK: both forms of the gradient, exact counts of forwards, and that they learn."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import yaml
from torch.testing import assert_close
from toys import Notes, Redness, ToyFlow, names, source

from mmalign.algorithms.ddpo import DDPO, PastRewards
from mmalign.assembly import composed
from mmalign.compositions import GDPO, WeightedSum
from mmalign.config import ConfigError, validate
from mmalign.credit import center, leave_one_out, zscore
from mmalign.learning import Credited
from mmalign.plans import every_step
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


# ---- the buffer


def test_a_prompt_is_compared_with_the_batch_until_it_has_enough_and_drops_what_is_old():
    past, everyone = PastRewards(size=4, least=3), torch.ones(4, dtype=torch.bool)
    prompt = torch.tensor([1, 1, 2, 2])
    first = torch.tensor([1.0, 3.0, 5.0, 7.0])
    whole = (first.double() - 4) / (5**0.5 + 1e-4)
    assert_close(past.compare(first, everyone, prompt), whole)
    # Two more of prompt 1 make four; prompt 2 has two, and is compared with the batch of now.
    second = torch.tensor([5.0, 7.0, 0.0, 0.0])
    valid = torch.tensor([True, True, False, False])
    own = torch.tensor([1.0, 3.0, 5.0, 7.0]).double()
    found = past.compare(second, valid, prompt)
    assert_close(found[:2], (second[:2].double() - own.mean()) / (own.std(correction=0) + 1e-4))
    assert found[2:].tolist() == [0, 0]
    assert past.rewards == {1: [1.0, 3.0, 5.0, 7.0], 2: [5.0, 7.0]}
    past.compare(torch.tensor([9.0]), torch.tensor([True]), torch.tensor([1]))
    assert past.rewards[1] == [3.0, 5.0, 7.0, 9.0]


def test_equal_rewards_have_no_advantage():
    past = PastRewards(4, 2)
    found = past.compare(torch.full((3,), 0.1), torch.ones(3, dtype=torch.bool), torch.zeros(3).long())
    assert found.tolist() == [0, 0, 0]


def test_one_sample_of_a_prompt_is_enough_with_a_buffer():
    method = DDPO(steps=T, clip=None, buffer=3, least=2)  # of 8 prompts 4 in an iteration
    notes = Notes()
    found = Trainer(
        ToyFlow(method.noise),
        method.build({"redness": 1.0}),
        Scorer([Redness()]),
        source(4, 1),
        TrainingSettings(iterations=6, learning_rate=1e-2, batch=1000, updates=1),
        tracker=notes,  # type: ignore[arg-type]
    )
    found.run()
    shares = [metrics["buffer/full_share"] for metrics in notes.metrics.values()]
    assert shares == [0, 0, 0.5, 1, 1, 1]
    past = found.algorithm.memory.rewards
    assert sorted(map(len, past.values())) == [3] * 8
    with pytest.raises(ValueError, match="a group of one has nobody to be compared with"):
        Trainer(
            ToyFlow(method.noise),
            DDPO(steps=T).build({"redness": 1.0}),
            Scorer([Redness()]),
            source(4, 1),
            TrainingSettings(updates=1),
        )


def test_a_prompt_is_told_from_others_by_its_whole_line():
    """Two edits may have the same words and other pictures."""
    credit, policy = DDPO(steps=T, buffer=4, least=2).build({"redness": 1.0}).credit, ToyFlow()
    for picture in ("a", "b", "a"):
        prompts = replace(names(1, 2), extra=[{"source": picture}] * 2)
        trajectory = policy.sample(prompts, every_step(T)(0, 0)[0], (0, "test"))
        credit([Redness()(trajectory.outcome)], trajectory, policy.locate)
    assert sorted(map(len, credit.past.rewards.values())) == [2, 4]


def test_a_recipe_with_a_buffer_may_draw_one_sample_of_a_prompt():
    config = (
        "{policy: {model: m}, prompts: {file: p.txt, group: 1}, rewards: {lab: 1}, algorithm: {name: ddpo%s}}"
    )
    assert validate(yaml.safe_load(config % ", buffer: 32"), "run.yaml").prompts.group == 1
    with pytest.raises(ConfigError, match=r"prompts\.group must be at least 2"):
        validate(yaml.safe_load(config % ""), "run.yaml")


def test_a_buffer_holds_one_reward_of_a_sample():
    algorithm = DDPO(buffer=32).build({"redness": 1.0})
    with pytest.raises(ConfigError, match=r"algorithm\.buffer remembers one reward a sample"):
        composed(algorithm, GDPO().build({"redness": {0: 1.0}}))
    assert composed(algorithm, WeightedSum().build({"redness": {0: 1.0}})).credit.past is algorithm.memory


def test_a_buffer_that_is_never_full_is_refused():
    with pytest.raises(ValueError, match=r"least must lie in 2\.\.8"):
        DDPO(buffer=8)


def test_a_baseline_lowers_the_variance_and_not_the_mean_of_the_gradient():
    """A bandit of two arms with a softmax policy: REINFORCE with the mean of the rewards and without."""
    draw = torch.Generator().manual_seed(0)
    logit, values = torch.zeros(2, dtype=torch.float64), torch.tensor([10.0, 11.0]).double()
    chance = logit.softmax(0)
    arms = torch.multinomial(chance.expand(20_000, -1), 16, replacement=True, generator=draw)
    score = torch.nn.functional.one_hot(arms, 2).double() - chance  # the gradient of log p by the logits
    rewards = values[arms]
    others = (rewards.sum(1, keepdim=True) - rewards) / 15  # a baseline that does not know its own sample
    plain = (score * rewards[..., None]).mean(1)
    based = (score * (rewards - others)[..., None]).mean(1)
    truth = chance * (values - (chance * values).sum())
    for found in (plain, based):
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - truth).abs() < 4 * error).all()
    assert (based.var(0) < 0.05 * plain.var(0)).all()
    rows = rewards[:500].reshape(-1, 1)
    group = torch.arange(500).repeat_interleave(16)
    ours = leave_one_out(rows, torch.ones_like(rows, dtype=torch.bool), group, True)
    assert_close(ours.reshape(500, 16), (rewards - others)[:500])


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
