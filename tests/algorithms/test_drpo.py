"""DRPO (arXiv:2510.04474): brevity among right texts, wrong ones held against the likeliest of them."""

import math

import pytest
import torch
from torch.testing import assert_close
from words import ToyWriter, pictures, trainer

from mmalign.algorithms.drpo import DRPO, discriminated, sides, tilt
from mmalign.coupling import Population
from mmalign.credit import Peers
from mmalign.objectives import LAST
from mmalign.records import Outcome, Plan, RewardSignal


class Right:
    """1 for a text about a dog, else 0."""

    name = "right"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        found = [float("dog" in text.split()) for text in outcome.media]
        return RewardSignal(self.name, torch.tensor(found)[:, None])


class Colors:
    """How many colors a text names."""

    name = "colors"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        found = [float(len({"red", "blue"} & set(text.split()))) for text in outcome.media]
        return RewardSignal(self.name, torch.tensor(found)[:, None])


def test_short_right_texts_weigh_more_and_none_is_held_back():
    brevity = 1 - torch.tensor([500, 1000, 2000]).double() / 8000
    found = tilt(brevity, 0.1)
    assert_close(found, torch.tensor([1.7766, 0.9509, 0.2725]).double(), rtol=0, atol=5e-5)
    assert found.mean().item() == pytest.approx(1)
    assert found.min() > 0


def test_the_temperature_of_the_preference():
    brevity = torch.tensor([0.9, 0.8, 0.1]).double()
    assert_close(tilt(brevity, 1e6), torch.ones(3).double(), rtol=0, atol=1e-5)
    assert_close(tilt(brevity, 1e-4), torch.tensor([3.0, 0, 0]).double())


def test_prompts_of_one_kind_are_left_out():
    total = torch.tensor([1, 0, 1, 1, 0, 0, math.nan, 1]).double()
    group = torch.arange(8) // 2
    found = sides(total, torch.zeros(8).double(), group, 1.0, 0.1)
    assert_close(found, torch.tensor([1, -1, *[math.nan] * 6]).double(), equal_nan=True)


def test_one_wrong_text_counts_by_its_likelihood():
    likely, side = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1.5, 0.5, -1.0])
    for tau in (0.1, 10.0):
        assert_close(discriminated(likely, side, tau), torch.tensor((-1.5 - 1.0) / 2 + 3.0))


def population(now, last, side, words) -> Population:
    weight = words / words.sum()
    return Population(
        now, {LAST: last}, side[None, :, None].expand(1, *now.shape), weight, torch.zeros(len(now))
    )


def test_the_loss_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    now = torch.randn(5, 4, generator=generator).double().requires_grad_()
    last = now.detach() + 0.1 * torch.randn(5, 4, generator=generator).double()
    words = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).double()
    side = torch.tensor([1.5, 0.5, -1.0, -1.0, -1.0]).double()
    method = DRPO(tau=2.0, penalty=3.0, delta=1e-3)
    (loss,), _ = method.loss(population(now, last, side, words))
    s = [sum(now[i, t] for t in range(4) if words[i, t]) / words[i].sum() for i in range(5)]
    right = (1.5 * s[0] + 0.5 * s[1]) / 2
    wrong = 2.0 * math.log(sum(math.exp(float(s[i]) / 2.0) for i in (2, 3, 4)) / 3)
    ratios = [(now - last)[i, t].item() for i in range(5) for t in range(4) if words[i, t]]
    kl = sum(math.exp(d) - 1 - d for d in ratios) / len(ratios)
    found = loss.item()
    assert found == pytest.approx(float(-(right - wrong)) + 3.0 * (kl - 1e-3))
    loss.backward()
    assert not now.grad[words == 0].any()
    # No right text is made less likely: its gradient is the divergence's alone.
    assert (torch.autograd.grad(-right, now)[0][:2] <= 0).all()


def test_inside_the_trust_region_there_is_no_penalty():
    now = torch.zeros(2, 3).double().requires_grad_()
    side, words = torch.tensor([1.0, -1.0]).double(), torch.ones(2, 3).double()
    losses = [
        DRPO(penalty=penalty, delta=1e-4).loss(population(now, now.detach() + 1e-3, side, words))[0]
        for penalty in (0.0, 1000.0)
    ]
    gradients = [torch.autograd.grad(loss[0], now, retain_graph=True)[0] for loss in losses]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(*gradients)


def test_the_credit_of_a_batch():
    policy = ToyWriter(seed=4)
    trajectory = policy.sample(pictures().at(0), Plan(1), (0, "t"))
    signals = [Right()(trajectory.outcome), Colors()(trajectory.outcome)]
    method = DRPO("colors", longest=8, temperature=0.5)
    algorithm = method.build({"right": 1.0, "colors": 1.0})
    found = algorithm.credit(signals, trajectory, policy.locate, Peers(trajectory.outcome.prompts)).values[
        0, :, 0
    ]
    for one in (0, 1):
        rows = trajectory.group == one
        good = rows & (signals[0].values[:, 0] == 1)
        assert 0 < good.sum() < rows.sum(), "a group of one kind shows nothing"
        tilted = (signals[1].values[good, 0] / 0.5).exp()
        assert_close(found[good], tilted / tilted.mean(), rtol=1e-5, atol=1e-6)
        assert (found[rows & ~good] == -1).all()


def test_right_texts_get_likelier_and_shorter():
    one = trainer(DRPO(longest=8, temperature=0.1), 40, [Right()], updates=2)
    one.run()
    seen = list(one.tracker.metrics.values())
    assert sum(m["reward/right"] for m in seen[-5:]) > sum(m["reward/right"] for m in seen[:5]) + 1.0
    assert max(m.get("kl", 0.0) for m in seen) > 0
    words = [one.policy.sample(pictures(group=64).at(i), Plan(1), (1, "t")).mask.sum().item() for i in (0, 1)]
    before = ToyWriter().sample(pictures(group=64).at(0), Plan(1), (1, "t")).mask.sum().item()
    assert max(words) < before


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="prefer must name one of at least two rewards"):
        DRPO("colors").build({"right": 1.0})
    with pytest.raises(ValueError, match="tau must be positive"):
        DRPO(tau=0.0)
