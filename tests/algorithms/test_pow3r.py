"""POW3R (arXiv:2605.20164): criteria are weighed by what they can teach the group of now."""

import math

import pytest
import torch
from torch.testing import assert_close
from words import Claims, Rubric, ToyWriter, pictures, trainer

from mmalign.algorithms.pow3r import POW3R, factors, rescaled, rubric, smoothed_std
from mmalign.credit import Peers
from mmalign.records import Plan, Prompts, RewardSignal, Trajectory, Unit

NONE = math.nan


def passes(*counts: int, of: int = 8) -> torch.Tensor:
    """Verdicts [of, J] of which so many pass."""
    return torch.tensor([[float(i < count) for count in counts] for i in range(of)]).double()


def one_group(count: int, extra: dict[str, object] | None = None) -> Prompts:
    return Prompts(
        ["0"] * count, torch.zeros(count).long(), torch.arange(count), [extra or {} for _ in range(count)]
    )


def rewards(verdicts: torch.Tensor, method: POW3R, extra: dict[str, object] | None = None) -> torch.Tensor:
    """R of each text of one group."""
    prompts = one_group(len(verdicts), extra)
    signal = RewardSignal("rubric", verdicts, Unit.CRITERION)
    return method.score(signal, prompts, Peers(prompts))


def test_the_smoothed_deviation():
    found = smoothed_std(passes(0, 1, 2, 4, 8))
    assert_close(found, torch.tensor([0.3, 0.4, 0.458258, 0.5, 0.3]).double(), rtol=0, atol=1e-6)


def test_where_all_agree_the_factor_is_the_floor_and_where_half_pass_the_cap():
    group = torch.zeros(8).long()
    found = factors(passes(0, 8, 4, 1, 2), group, 0.5, 1.5)
    assert_close(found[0, :3], torch.tensor([0.5, 0.5, 1.5]).double())
    assert 0.5 < found[0, 3] < found[0, 4] < 1.5
    graded = torch.full((8, 1), 0.4).double()
    assert_close(factors(graded, group, 0.5, 1.5), torch.full((8, 1), 0.5).double())


def test_each_group_has_factors_of_its_own_and_only_for_its_criteria():
    verdicts = torch.cat([passes(4, 8), torch.full((8, 2), NONE).double()])
    verdicts[8:, 0] = passes(0)[:, 0]
    found = factors(verdicts, torch.arange(16) // 8, 0.5, 1.5)
    assert_close(found[[0, 8]], torch.tensor([[1.5, 0.5], [0.5, 0.0]]).double())


def test_the_mass_of_a_category_is_kept():
    weight, category = torch.rand(5, 6).double(), torch.randint(0, 3, (1, 6)).expand(5, -1)
    found = rescaled(weight, torch.rand(5, 6).double() + 0.5, category)
    for k in range(3):
        inside = category[0] == k
        assert_close(found[:, inside].sum(1), weight[:, inside].sum(1), rtol=0, atol=1e-6)


def test_criteria_of_equal_contrast_keep_their_weights():
    weight = torch.tensor([[1.0, 2.0, 3.0]]).double()
    category = torch.zeros(1, 3).long()
    assert_close(rescaled(weight, torch.full((1, 3), 1.3).double(), category), weight)
    verdicts = passes(3, 5, 3)
    extra = {"questions": [{"weight": w} for w in (1, 2, 3)]}
    static = (verdicts * weight).sum(1) / weight.sum()
    assert_close(rewards(verdicts, POW3R(), extra), static)


def test_a_criterion_alone_in_its_category_keeps_its_weight():
    extra = {"questions": [{"category": "a"}, {"category": "b"}, {"category": "c"}]}
    verdicts = passes(0, 4, 1)
    assert_close(rewards(verdicts, POW3R(), extra), verdicts.mean(1))


def test_the_reward_is_that_of_the_formula():
    verdicts = passes(8, 4, 1, 2)
    items = [
        {"weight": 2, "category": "a"},
        {"category": "a"},
        {"weight": 3, "category": "b"},
        {"category": "b"},
    ]
    found = rewards(verdicts, POW3R(floor=0.4, cap=1.2), {"questions": items})
    std = [math.sqrt(p * (1 - p)) for p in (0.9, 0.5, 0.2, 0.3)]
    least = math.sqrt(0.1 * 0.9)
    a = [0.4 + 0.8 * max(0, s - least) / (0.5 - least) for s in std]
    w = [2 * a[0], 1 * a[1], 3 * a[2], 1 * a[3]]
    first, second = 3 / (w[0] + w[1]), 4 / (w[2] + w[3])
    w = torch.tensor([w[0] * first, w[1] * first, w[2] * second, w[3] * second]).double()
    assert_close(found, (verdicts * w).sum(1) / w.sum(), rtol=1e-6, atol=1e-6)
    assert found.min() >= 0
    assert found.max() <= 1


def test_orders_do_not_matter():
    verdicts, weight = torch.rand(6, 5).round(decimals=1).double(), [1, 2, 3, 4, 5]
    extra = {"questions": [{"weight": w, "category": w % 2} for w in weight]}
    found = rewards(verdicts, POW3R(), extra)
    texts, criteria = torch.randperm(6), torch.randperm(5).tolist()
    extra = {"questions": [{"weight": weight[j], "category": weight[j] % 2} for j in criteria]}
    assert_close(rewards(verdicts[texts][:, criteria], POW3R(), extra), found[texts])


def test_missing_verdicts_are_left_out_and_not_failed():
    verdicts = passes(4, 6)
    verdicts[0, 1] = NONE
    found = rewards(verdicts, POW3R())
    assert found[0] == 1  # of what was judged all passed
    verdicts[0] = NONE
    assert rewards(verdicts, POW3R())[0].isnan()


def test_without_a_rubric_criteria_weigh_alike():
    weight, category = rubric(one_group(2), "questions", 3)
    assert torch.equal(weight, torch.ones(2, 3).double())
    assert not category.any()


def test_what_is_logged_stays_the_reward_itself():
    means = []
    for method in (POW3R(), POW3R(floor=1.0, cap=1.0)):
        one = trainer(method, 1, [Rubric()])
        one.run()
        means.append(one.tracker.metrics[0]["reward/rubric"])
    assert means[0] == means[1]


def test_rewards_without_criteria_are_added_and_alone_refused():
    policy = ToyWriter()
    trajectory: Trajectory = policy.sample(pictures().at(0), Plan(1), (0, "t"))
    peers, signals = Peers(trajectory.outcome.prompts), [Rubric()(trajectory.outcome)]
    signals.append(Claims()(trajectory.outcome))
    weights = {"rubric": 2.0, "claims": 0.5}
    found = POW3R().total(weights, signals, trajectory, peers).values[:, 0]
    rubrics = POW3R().score(signals[0], trajectory.outcome.prompts, peers)
    assert_close(found.double(), 2 * rubrics + 0.5 * signals[1].values[:, 0].double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match="at least one reward must give a unit per criterion, got claims per"
    ):
        trainer(POW3R(), 1).run()
    with pytest.raises(ValueError, match="rubric gave some outside"):
        rewards(torch.tensor([[2.0], [0.0]]).double(), POW3R())
    with pytest.raises(ValueError, match="floor must be positive"):
        POW3R(floor=0.0)
