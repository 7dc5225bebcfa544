"""BranchGRPO: values of nodes, advantages by depth, edges that count alike, and pruning of the update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from toys import Notes, Redness, ToyFlow, names, source

from mmalign.algorithms.branch_grpo import BranchGRPO, edges, fuse
from mmalign.credit import Peers
from mmalign.plans import forwards
from mmalign.records import Outcome, RewardSignal
from mmalign.scoring import Scorer
from mmalign.sde import Noise
from mmalign.trainer import Trainer, TrainingSettings

P, G, T = 3, 4, 6
METHOD = BranchGRPO(steps=T, splits=(0, 2), clip=1e-2, noise=Noise("dance", 0.5))
KEY = (0, "test")


class Numbered(Redness):
    """Leaf m of a group is worth values[m]."""

    values: tuple[float, ...] = (1.0, 5.0, 2.0, 10.0)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, torch.tensor(self.values)[outcome.prompts.member][:, None])


def made(method: BranchGRPO = METHOD, reward: Redness | None = None, **settings: object) -> Trainer:
    given = {"iterations": 1, "learning_rate": 1e-2, "updates": 1, "batch": 1000} | settings
    return Trainer(
        ToyFlow(method.noise), method.build({"redness": 1.0}), Scorer([reward or Redness()]), source(P, G),
        TrainingSettings(**given), tracker=Notes(),
    )  # fmt: skip


def judged(method: BranchGRPO, reward: Redness) -> tuple[Tensor, Tensor]:
    """Advantage and weight, [B, S] each."""
    policy, algorithm = ToyFlow(method.noise), method.build({"redness": 1.0})
    trajectory = policy.sample(names(P, G), algorithm.plans(0, 0)[0], KEY)
    found = algorithm.credit([reward(trajectory.outcome)], trajectory, policy.locate)
    return found.values[0], found.weight


def zscore(values: list[float]) -> Tensor:
    v = torch.tensor(values)
    return (v - v.mean()) / (v.std(correction=0) + 1e-4)


def test_a_nodes_value_is_the_mean_of_its_leaves_and_its_advantage_is_by_depth():
    """Leaves 0 and 2 part from 1 and 3 at the first split, and from each other at the second."""
    advantage, _ = judged(replace(METHOD, beta=0.0), Numbered())
    shallow, deep = zscore([1.5, 7.5, 1.5, 7.5]), zscore([1.0, 5.0, 2.0, 10.0])
    for group in range(P):
        own = advantage[group * G : (group + 1) * G]
        assert_close(own[:, 0], shallow)
        assert_close(own[:, 1], shallow)
        for column in (2, 3, 4):
            assert_close(own[:, column], deep)
    assert_close(advantage.reshape(P, G, -1).mean(1), torch.zeros(P, T - 1), atol=1e-6, rtol=0)
    std = advantage.reshape(P, G, -1).std(1, correction=0)
    assert_close(std, torch.ones_like(std), atol=1e-3, rtol=0)


def fused(beta: float, method: BranchGRPO = METHOD) -> tuple[Tensor, Tensor, Tensor]:
    policy = ToyFlow(method.noise)
    trajectory = policy.sample(names(P, G), method.plan(0), KEY)
    signal = Numbered()(trajectory.outcome)
    value = fuse(beta, signal, trajectory, Peers(trajectory.outcome.prompts)).values
    return value, trajectory.log_prob.double(), signal.values[:, 0].double()


def test_the_value_of_the_root_is_the_mean_of_all_leaves():
    value, _, reward = fused(0.0, replace(METHOD, splits=(2, 3)))
    mean = reward.reshape(P, G).mean(1)
    assert_close(value.reshape(P, G, -1)[:, :, 0].double(), mean[:, None].expand(P, G))


def test_leaves_count_by_how_likely_they_are_below_the_node():
    value, likely, reward = fused(3.0)
    for group in range(P):
        for column, nodes in enumerate([[(0, 2), (1, 3)]] * 2 + [[(0,), (1,), (2,), (3,)]] * 3):
            for leaves in nodes:
                rows = [group * G + leaf for leaf in leaves]
                share = torch.softmax(3.0 * likely[rows, column + 1 :].sum(1), 0)
                for row in rows:
                    assert value[row, column].item() == pytest.approx((share * reward[rows]).sum().item())
    assert not torch.allclose(value, fused(0.0)[0])


def test_depths_before_the_first_split_say_nothing():
    advantage, _ = judged(replace(METHOD, splits=(2, 3)), Numbered())
    assert advantage[:, :2].abs().max() == 0
    assert advantage[:, 2:].abs().min() > 0


def test_one_way_has_no_advantage():
    """A group of one, with no split, is DanceGRPO with nobody to be compared with."""
    method = replace(METHOD, ways=1)
    policy, algorithm = ToyFlow(method.noise), method.build({"redness": 1.0})
    trajectory = policy.sample(names(P, 1), algorithm.plans(0, 0)[0], KEY)
    found = algorithm.credit([Redness()(trajectory.outcome)], trajectory, policy.locate)
    assert found.values.abs().max() == 0
    with pytest.raises(ValueError, match="a group of one has nobody"):
        Trainer(policy, algorithm, Scorer([Redness()]), source(P, 1), TrainingSettings(updates=1))


def test_every_edge_counts_alike():
    _, weight = judged(METHOD, Numbered())
    total = P * (2 + 2 + 4 + 4 + 4)
    shared = torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0])  # leaves behind an edge of each depth
    assert_close(weight, (1 / shared / total).expand(P * G, -1))


def test_the_best_leaf_below_each_parent_is_learned_from():
    advantage, weight = judged(replace(METHOD, width="top"), Numbered())
    assert torch.equal(advantage, judged(METHOD, Numbered())[0])  # pruning is of the update alone
    kept = (weight > 0).any(1).reshape(P, G)
    assert torch.equal(
        kept, torch.tensor([False, False, True, True]).expand(P, G)
    )  # 2 of (0, 2), 3 of (1, 3)
    assert_close(weight[weight > 0], torch.full((P * 2 * (T - 1),), 1 / (P * 2 * (T - 1))))


def test_the_extremes_of_each_tree_are_learned_from():
    _, weight = judged(replace(METHOD, width="extremes"), Numbered())
    assert torch.equal(
        (weight > 0).any(1).reshape(P, G), torch.tensor([True, False, False, True]).expand(P, G)
    )
    same = Numbered()
    same.values = (1.0, 0.0, 2.0, 0.5)  # 2 and 1: one on each side of the first split
    _, weight = judged(replace(METHOD, width="extremes"), same)
    assert torch.equal(
        (weight > 0).any(1).reshape(P, G), torch.tensor([False, True, True, False]).expand(P, G)
    )


def test_a_leaf_without_a_verdict_takes_no_part():
    reward = Numbered()
    reward.values = (1.0, 5.0, 2.0, torch.nan)
    advantage, weight = judged(replace(METHOD, beta=0.0, width="top"), reward)
    assert (weight > 0).any(1).reshape(P, G).tolist() == [[False, True, True, False]] * P
    assert_close(weight.sum(), torch.tensor(1.0))
    known = advantage.reshape(P, G, -1)[:, :3]
    assert_close(known[0, :, 0], zscore([1.5, 5.0, 1.5]))
    assert advantage.reshape(P, G, -1)[:, 3].abs().max() == 0


@pytest.mark.parametrize("pruned", [{"width": "top"}, {"width": "extremes"}, {"depth": 2, "depth_stop": 3}])
def test_pruning_changes_the_gradient_and_nothing_before_it(pruned):
    whole, cut = made(), made(replace(METHOD, **pruned))
    found = [run.step(0) for run in (whole, cut)]
    assert whole.policy.forwards.sample == cut.policy.forwards.sample
    assert cut.policy.forwards.train < whole.policy.forwards.train
    for name in ("reward/redness", "advantage/size"):
        assert found[0][name] == found[1][name]
    assert found[0]["grad_norm"] != found[1]["grad_norm"]


def test_the_gradient_of_a_pruned_tree_is_that_of_its_remaining_edges():
    run = made(replace(METHOD, depth=2, depth_stop=3), grad_clip=1e9)
    trajectory = run.policy.sample(run.prompts.at(0), run.algorithm.plans(0, 0)[0], (0, "sample", 0, 0))
    credit = run.algorithm.credit([Redness()(trajectory.outcome)], trajectory, run.policy.locate)
    (pick,) = run.policy.picks(
        replace(trajectory, mask=torch.ones(P * G, T - 1, dtype=torch.bool)), torch.arange(P * G), 1000
    )
    likely = run.policy.evaluate(trajectory, pick).log_prob
    seen = pick.columns < 2
    share = torch.where(pick.columns < 2, 0.5, 1.0) / (P * 4)  # two edges at each of two depths
    by_hand = torch.autograd.grad(
        -(likely * credit.values[0, pick.rows, pick.columns] * share * seen).sum(), run.learner.parameters
    )
    run.step(0)
    for one, two in zip(by_hand, run.learner.parameters, strict=True):
        assert_close(two.grad, one, atol=1e-6, rtol=1e-4)


def test_the_window_of_depths_moves_on_and_stops():
    method = BranchGRPO(depth=4)
    learned = [method.build({"r": 1.0}).plans(i, 0)[0].learned for i in (0, 29, 30, 179, 180, 10_000)]
    assert learned == [(0, 1, 2, 3), (0, 1, 2, 3), (1, 2, 3, 4), (5, 6, 7, 8), (6, 7, 8, 9), (6, 7, 8, 9)]
    assert BranchGRPO().build({"r": 1.0}).plans(0, 0)[0].learned is None


def test_forwards():
    run = made()
    run.step(0)
    assert run.policy.forwards.sample == P * (1 + 2 * 2 + 4 * 3)
    assert run.policy.forwards.train == P * (1 + 2 * 2 + 4 * 2)
    prompts = names(P, G)
    assert forwards(METHOD.plan(0), prompts.group, prompts.member) == (P * 17, P * 13)


@pytest.mark.parametrize("method", [METHOD, replace(METHOD, width="top", beta=0.0)])
def test_the_reward_rises(method):
    run = made(method, iterations=20)
    run.run()
    scores = [m["reward/redness"] for m in run.tracker.metrics.values()]
    assert sum(scores[-3:]) > sum(scores[:3]) + 0.3


def test_a_resumed_run_goes_on_as_it_would_have(tmp_path):
    method = replace(METHOD, depth=2, depth_stay=1, depth_stop=3, width="top")
    through = made(method, iterations=4)
    through.run()
    for iterations in (2, 4):
        again = made(method, iterations=iterations)
        again.run_dir = tmp_path
        again.run()
    for one, two in zip(again.learner.parameters, through.learner.parameters, strict=True):
        assert torch.equal(one, two)


def test_the_defaults_are_the_papers():
    method = BranchGRPO()
    algorithm, plan = method.build({"r": 1.0}), method.plan(0)
    assert (plan.steps, plan.splits, plan.ways, plan.sde_steps) == (20, (0, 3, 6, 9), 2, tuple(range(19)))
    assert plan.correlation == pytest.approx(1 / 17)
    assert (algorithm.noise, algorithm.objective.low, algorithm.objective.kl) == (
        Noise("dance", 0.3),
        1e-3,
        0,
    )
    assert algorithm.credit.select.func is edges
    plan.check_group(16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": Noise("dance", 0.0)}, r"noise\.level must be above 0"),
        ({"splits": ()}, "splits must name at least one step"),
        ({"splits": (19,)}, "splits must rise and be among"),
        ({"spread": 0.0}, "spread must be positive"),
        ({"depth": 20}, r"depth must lie in 0\.\.19"),
        ({"depth": 4, "depth_stop": 2}, "within depth_stop"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        BranchGRPO(**given)


def test_a_group_that_does_not_fill_the_tree_is_refused():
    with pytest.raises(ValueError, match=r"prompts\.group must be 8: 2 ways at 3 splits, got 4"):
        made(replace(METHOD, splits=(0, 1, 2)))
