"""Balanced updates (MARBLE, arXiv:2605.06507) against closed forms and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmalign.updates import Balanced, Summed, min_norm


def gram(*rows: list[float]) -> torch.Tensor:
    vectors = torch.tensor(rows, dtype=torch.float64)
    return vectors @ vectors.T


def units(count: int, size: int, seed: int) -> torch.Tensor:
    rows = torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


class Quadratic:
    """Objectives whose gradients at 0 are given rows; a pull is a further row."""

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows = torch.tensor(rows)
        self.parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(len(rows[0]) - 1))]
        self.backwards = 0

    def losses(self, share: float = 1.0) -> torch.Tensor:
        return share * self.rows @ torch.cat([p.flatten() for p in self.parameters])

    def backward(self, loss: torch.Tensor) -> None:
        self.backwards += 1
        loss.backward()

    def step(self, update, names, speaks=None, minibatches: int = 1):
        """One update; gives its gradient and metrics."""
        for parameter in self.parameters:
            parameter.grad = None
        update.begin(names, speaks or [True] * len(names))
        for _ in range(minibatches):
            update.add(self.losses(1 / minibatches), self.parameters, self.backward)
        metrics = update.finish(self.parameters, lambda x: x)
        return torch.cat([p.grad.flatten() for p in self.parameters]), metrics


# The quadratic program


@pytest.mark.parametrize("angle", [0.1, 1.0, 2.0, 3.0])
def test_two_unit_vectors_share_alike_whatever_their_angle(angle):
    shares = min_norm(gram([1, 0], [math.cos(angle), math.sin(angle)]))
    assert_close(shares, torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("lengths", [(1.0, 3.0), (0.2, 1.0)])
@pytest.mark.parametrize("angle", [0.3, 1.2, 2.5])
def test_two_vectors_of_any_length_follow_the_closed_form(lengths, angle):
    """The point of a segment nearest to 0: a = clip(<v2 - v1, v2> / |v2 - v1|^2)."""
    one = torch.tensor([lengths[0], 0.0], dtype=torch.float64)
    two = lengths[1] * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    first = float((((two - one) @ two) / (two - one).square().sum()).clamp(0, 1))
    rows = torch.stack([one, two])
    assert_close(
        min_norm(rows @ rows.T), torch.tensor([first, 1 - first], dtype=torch.float64), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("seed", range(8))
def test_three_vectors_are_no_longer_than_any_point_of_a_fine_grid(seed):
    found, fine = units(3, 3, seed), 60
    q = found @ found.T
    shares = min_norm(q)
    grid = (
        torch.tensor(
            [(i, j, fine - i - j) for i in range(fine + 1) for j in range(fine + 1 - i)], dtype=torch.float64
        )
        / fine
    )
    least = float(((grid @ q) * grid).sum(1).min())
    assert float(shares @ q @ shares) <= least + 1e-12
    assert least - float(shares @ q @ shares) < 3 / fine  # and it is reached


def test_equal_vectors_give_that_vector_and_opposite_ones_give_none():
    same = min_norm(gram([0.6, 0.8], [0.6, 0.8], [0.6, 0.8]))
    assert_close(same.sum(), torch.tensor(1.0, dtype=torch.float64))
    against = min_norm(gram([1, 0], [-1, 0]))
    assert_close(against, torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(("count", "size", "seed"), itertools.product((2, 3, 5, 9), (4, 30), range(3)))
def test_no_objective_is_worsened(count, size, seed):
    """<d, u_k> >= |d|^2 for all, with equality where it has a share: the conditions of optimality."""
    found = units(count, size, seed)
    shares = min_norm(found @ found.T)
    direction = shares @ found
    slack = found @ direction - direction.square().sum()
    assert shares.min() >= 0
    assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert slack.min() > -1e-8
    assert slack[shares > 1e-9].abs().max() < 1e-8


# The update


def test_the_direction_has_the_mean_length_of_the_gradients():
    gradient, metrics = Quadratic([[10.0, 0.0], [0.0, 1.0]]).step(Balanced(), ("a", "b"))
    assert_close(gradient, torch.tensor([2.75, 2.75]))
    assert metrics["balance/cosine_worst"] == pytest.approx(math.sqrt(0.5))
    assert metrics["balance/conflict"] == pytest.approx(0)


def test_equal_shares_are_the_mean_and_the_small_gradient_loses():
    rows = [[10.0, 0.0, 0.0], [-0.5, 1.0, 0.0]]
    gradient, mean = Quadratic(rows).step(Balanced(shares="equal"), ("a", "b"))
    assert_close(gradient, torch.tensor(rows).mean(0))
    balanced = Quadratic(rows).step(Balanced(), ("a", "b"))[1]
    assert mean["balance/cosine_worst"] < 0 < balanced["balance/cosine_worst"]


def test_the_scale_of_a_reward_does_not_turn_the_direction():
    ways = []
    for scale in (1.0, 1000.0):
        gradient = Quadratic([[1.0, 0.2, 0.0], [-0.5 * scale, scale, scale]]).step(Balanced(), ("a", "b"))[0]
        ways.append(gradient / gradient.norm())
    assert_close(*ways)


def test_between_two_looks_one_backward_takes_the_smoothed_shares():
    problem, update = Quadratic([[1.0, 0.0], [0.8, 0.6], [-0.6, 0.8]]), Balanced(every=3, keep=0.5)
    names = ("a", "b", "c")
    problem.step(update, names)
    assert problem.backwards == 0
    newest = min_norm((problem.rows @ problem.rows.T).double())
    smoothed = 0.5 / 3 + 0.5 * newest
    assert_close(torch.tensor(list(update.held.values()), dtype=torch.float64), smoothed, atol=1e-6, rtol=0)
    assert sum(update.held.values()) == pytest.approx(1)
    for _ in range(2):
        gradient, metrics = problem.step(update, names)
        assert_close(gradient, smoothed.float() @ problem.rows)
        assert "balance/cosine_worst" not in metrics
    assert problem.backwards == 2
    assert "balance/cosine_worst" in problem.step(update, names)[1]
    assert problem.backwards == 2


def test_without_smoothing_the_newest_shares_are_held():
    problem, update = Quadratic([[1.0, 0.0], [0.8, 0.6], [-0.6, 0.8]]), Balanced(keep=0.0)
    problem.step(update, ("a", "b", "c"))
    newest = min_norm((problem.rows @ problem.rows.T).double())
    assert_close(torch.tensor(list(update.held.values()), dtype=torch.float64), newest, atol=1e-6, rtol=0)


def test_minibatches_add_up_before_they_are_balanced():
    rows = [[3.0, 1.0], [-1.0, 1.0]]
    whole = Quadratic(rows).step(Balanced(), ("a", "b"))[0]
    assert_close(Quadratic(rows).step(Balanced(), ("a", "b"), minibatches=3)[0], whole)


@pytest.mark.parametrize("every", [1, 2])
def test_a_pull_is_added_once_and_never_balanced(every):
    rows, pull = [[10.0, 0.0], [0.0, 1.0]], [-1.0, -2.0]
    update, problem = Balanced(every=every), Quadratic([*rows, pull])
    gradient, _ = problem.step(update, ("a", "b"))
    assert_close(gradient, torch.tensor([2.75 - 1, 2.75 - 2]))
    if every == 2:
        assert_close(problem.step(update, ("a", "b"))[0], torch.tensor([5.0 - 1, 0.5 - 2]))


def test_a_gradient_without_a_direction_takes_no_part():
    update = Balanced(keep=0.0)
    gradient, metrics = Quadratic([[3.0, 0.0], [0.0, 0.0]]).step(update, ("a", "b"))
    assert_close(gradient, torch.tensor([3.0, 0.0]))
    assert update.held == {"a": 1.0, "b": 0.0}
    assert "balance/cosine/b" not in metrics


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_left_for_the_learner_to_see(bad):
    update = Balanced()
    gradient, _ = Quadratic([[3.0, 0.0], [bad, 1.0]]).step(update, ("a", "b"))
    assert not gradient.isfinite().all()
    assert update.held == {"a": 0.5, "b": 0.5}


def test_an_objective_with_nothing_to_say_takes_no_part():
    """Its loss may have a gradient all the same: that of NFT pulls to the old policy where A = 0."""
    gradient, _ = Quadratic([[3.0, 0.0], [-1.0, 1.0]]).step(Balanced(), ("a", "b"), [True, False])
    assert_close(gradient, torch.tensor([3.0, 0.0]))


def test_one_objective_alone_is_as_summed():
    rows = [[3.0, -4.0]]
    for update in (Summed(), Balanced()):
        problem = Quadratic(rows)
        assert_close(problem.step(update, ("a",))[0], torch.tensor(rows[0]))
        assert problem.backwards == 1


def test_the_shares_and_the_count_are_state():
    problem, one = Quadratic([[1.0, 0.0], [0.8, 0.6], [-0.6, 0.8]]), Balanced(every=2)
    names = ("a", "b", "c")
    problem.step(one, names)
    other = Balanced(every=2)
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        assert torch.equal(problem.step(one, names)[0], problem.step(other, names)[0])
        assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 1.0}, {"keep": -0.1}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Balanced(**wrong)
