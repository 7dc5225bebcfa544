"""GARDO: who is pulled, when the reference moves, and what variety is worth (arXiv:2512.24138)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from methods import N, assert_learns, assert_resumes, run, trainer
from torch.testing import assert_close
from toys import Brightness, Redness, ToyFlow, names

from mmalign.algorithms.gardo import (
    GARDO,
    Gate,
    GatedCredit,
    distances,
    gated,
    next_share,
    pixels,
    uncertainty,
)
from mmalign.credit import center
from mmalign.objectives import ClippedRatio
from mmalign.records import Minibatch, Outcome, Plan, RewardSignal, Unit
from mmalign.sde import Noise

SMALL = GARDO(steps=5, clip=1e-2, kl=0.5)
NAN = float("nan")
WATCHED = {"rewards": [Redness(), Brightness()], "weights": {"brightness": 0.0}}


def test_where_all_rewards_agree_on_the_order_nobody_is_uncertain():
    proxy = torch.tensor([0.1, 5.0, 2.0, -3.0])
    watched = torch.stack([proxy * 10 - 3, proxy**3], 1)
    assert (uncertainty(proxy, watched) == 0).all()


def test_the_first_by_the_proxy_and_last_by_the_others_is_the_most_uncertain_and_gated_first():
    proxy = torch.tensor([1.0, 2.0, 9.0, 3.0])
    watched = torch.tensor([[2.0, 1.0], [3.0, 2.0], [0.0, 0.0], [9.0, 5.0]])
    doubt = uncertainty(proxy, watched)
    assert doubt.argmax() == 2
    assert_close(doubt[2], torch.tensor(0.75).double())  # it beats three of four, and none
    assert gated(doubt, 0.25).tolist() == [False, False, True, False]


def test_no_verdict_is_neither_good_nor_bad():
    proxy = torch.tensor([1.0, NAN, 3.0, 2.0])
    watched = torch.tensor([[1.0, NAN], [2.0, 2.0], [NAN, NAN], [0.0, NAN]])
    doubt = uncertainty(proxy, watched)
    assert doubt.isnan().tolist() == [False, True, True, False]
    assert_close(doubt[[0, 3]], torch.tensor([0 - 1 / 3, 1 / 3 - 0]).double())
    assert gated(doubt, 1.0).tolist() == [True, False, False, True]


@pytest.mark.parametrize(("share", "number"), [(0.0, 0), (0.1, 1), (0.24, 2), (0.5, 5), (1.0, 10)])
def test_the_gate_is_as_wide_as_its_share(share, number):
    doubt = torch.randn(10, generator=torch.Generator().manual_seed(0))
    chosen = gated(doubt, share)
    assert int(chosen.sum()) == number
    assert set(doubt[chosen].tolist()) == set(doubt.sort(descending=True).values[:number].tolist())


def test_the_share_follows_a_script():
    gate = Gate(0.1, 1.0, 100)
    seen = []
    for value in (0.3, 0.4, 0.35, 0.2, 0.3, 0.41):
        gate.look(value)
        seen.append(gate.share)
    assert seen == pytest.approx([0.1, 0.11, 0.11, 0.099, 0.099, 0.1089])
    assert next_share(0.19, 2.0, [1.0]) == 0.2
    assert next_share(0.021, 0.0, [1.0]) == 0.02
    assert next_share(0.1, 1.0, [1.0]) == next_share(0.1, 5.0, []) == 0.1


def test_only_the_last_twenty_iterations_are_looked_at():
    gate = Gate(0.1, 1.0, 100)
    for value in (9.0, *[1.0] * 20):
        gate.look(value)
    assert len(gate.past) == 20
    before = gate.share
    gate.look(2.0)  # above the last twenty, though not above the first
    assert gate.share == pytest.approx(1.1 * before)


def test_the_reference_moves_by_divergence_or_by_time():
    gate = Gate(0.1, reset_kl=0.5, reset_every=3)
    kept = []
    for i, kl in enumerate((0.1, 0.1, 0.1, 0.6, 0.1, 0.1, 0.1)):
        gate.note(i, {"kl": kl})
        kept.append(gate.keep(i))
    assert kept == [1, 1, 0, 0, 1, 1, 0]


def test_copies_of_a_picture_have_no_variety_and_the_odd_one_out_has():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    group = torch.tensor([0, 0, 0, 1, 1])
    assert distances(features, group, False).tolist() == pytest.approx([0, 0, 1, 2, 2])
    assert distances(features, group, True).tolist() == pytest.approx([0, 0, 3, 1, 1])
    same = torch.randn(1, 7).expand(4, -1)
    assert (distances(same, torch.zeros(4), True) == 0).all()
    assert distances(same[:1], torch.zeros(1), True).tolist() == [1.0]


@dataclass
class Features:
    """The channels of a picture as a vector."""

    name: str = "features"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, outcome.media.mean((2, 3)), Unit.CRITERION)


@pytest.mark.parametrize("by", ["pixels", "features"])
def test_good_samples_are_scaled_by_their_variety_and_bad_ones_stay(by):
    method = replace(SMALL, features=by, relative=False)
    weights = {"redness": 1.0, "brightness": 0.0, "features": 0.0}
    policy = ToyFlow(method.noise)
    trajectory = policy.sample(names(3, 4), Plan(5, (0, 1)), (0, "t"))
    signals = [model(trajectory.outcome) for model in (Redness(), Brightness(), Features())]
    credit = method.build(weights).credit
    assert isinstance(credit, GatedCredit)
    found = credit(signals, trajectory, policy.locate).values[0, :, 0]
    reward = signals[0].values.reshape(3, 4)
    plain = (reward - reward.mean(1, keepdim=True)).flatten()  # no standard deviation
    seen = pixels(trajectory.outcome) if by == "pixels" else signals[2].values
    scale = distances(seen, trajectory.group, False).float()
    assert_close(found, torch.where(plain > 0, plain * scale, plain))
    assert (plain > 0).any()


def pulled(share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the pull on a toy that has moved, with such a share gated; and without a gate."""
    policy = ToyFlow(Noise("flow", 0.7))
    trajectory = policy.sample(names(2, 4), Plan(5, (0, 1, 2, 3)), (0, "t"))
    pick = next(policy.picks(trajectory, torch.arange(8), 100))
    policy.copies.save("reference")
    with torch.no_grad():
        policy.module.last += 0.1
    chosen = gated(torch.arange(8.0), share)[pick.rows].float()
    mute = Minibatch(trajectory, pick, torch.zeros(1, 32), torch.full((32,), 1 / 32))
    found = []
    for batch in (replace(mute, pull=chosen), mute):
        policy.module.zero_grad()
        ClippedRatio(kl=1.0)(policy, batch)[0].sum().backward()
        found.append(policy.module.last.grad.clone())
    return found[0], found[1]


def test_a_full_gate_is_the_ordinary_kl_and_an_empty_one_is_none():
    whole, ordinary = pulled(1.0)
    assert torch.equal(whole, ordinary)
    assert ordinary.norm() > 0
    assert pulled(0.0)[0].norm() == 0
    assert 0 < pulled(0.5)[0].norm() < ordinary.norm() * 2


def test_after_a_reset_the_divergence_is_zero_and_the_optimizer_goes_on():
    found, _ = trainer(replace(SMALL, reset_every=1), **WATCHED)
    metrics = found.step(0)
    assert metrics["kl_max"] > 0
    assert metrics["gate/reset"] == 1
    for copy, live in zip(
        found.policy.copies.state_dict()["reference"], found.learner.parameters, strict=True
    ):
        assert torch.equal(copy, live)
    assert found.learner.optimizer.state_dict()["state"]
    held, _ = trainer(replace(SMALL, reset_every=9, reset_kl=1e9), **WATCHED)
    before = [p.clone() for p in held.learner.parameters]
    assert held.step(0)["gate/reset"] == 0
    assert all(map(torch.equal, held.policy.copies.state_dict()["reference"], before))


def test_what_it_does_is_logged():
    metrics = run(SMALL, **WATCHED)[1].metrics[0]
    assert metrics["gate/share"] == 0.1
    assert metrics["gate/uncertainty"] > 0


def test_forwards():
    counts = run(SMALL, **WATCHED)[0].policy.forwards
    assert (counts.sample, counts.train, counts.reference) == (N * 5, N * 4, N * 4)


def test_it_learns():
    assert_learns(replace(SMALL, kl=0.04), **WATCHED)


def test_it_resumes_with_its_gate_and_its_reference(tmp_path):
    assert_resumes(replace(SMALL, reset_every=2, share=0.2), tmp_path, iterations=7, **WATCHED)


def test_the_defaults_are_the_papers():
    built = GARDO().build({"r": 1.0, "other": 0.0})
    assert built.plans(0, 0)[0].sde_steps == tuple(range(9))
    assert built.objective == ClippedRatio(1e-4, 1e-4, 0.04)
    assert built.credit.normalize is center
    assert (built.memory.share, built.memory.reset_kl, built.memory.reset_every) == (0.1, 3e-4, 15)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"noise": Noise("flow", 0.0)}, r"noise\.level must be above 0"),
        ({"kl": 0.0}, "kl and reset_kl must be positive"),
        ({"share": 0.5}, r"share must lie in 0\.02\.\.0\.2"),
        ({"reset_every": 0}, "reset_every"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GARDO(**wrong)


def test_rewards_that_cannot_watch_are_refused():
    with pytest.raises(ValueError, match="at least one reward the weight 0"):
        GARDO().build({"r": 1.0})
    with pytest.raises(ValueError, match="features must be pixels or a reward of weight 0"):
        GARDO(features="dino").build({"r": 1.0, "other": 0.0})
