"""Losses in fp16: their gradients are scaled up so that none is lost, and what overflows is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from runs import ROOT
from test_trainer import FAST, ONE, gradient, trained, trainer
from torch import Tensor
from torch.testing import assert_close
from toys import Brightness, Notes, Redness, ToyFlow

from mmalign import checkpoints
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.assembly import composed
from mmalign.compositions import MARBLE
from mmalign.contracts import LoraSettings, Policy, PolicySettings
from mmalign.data import Prompt, PromptSource
from mmalign.distributed import Distributed
from mmalign.loss_scale import CEILING, FLOOR, LossScale
from mmalign.objectives import ClippedRatio
from mmalign.pipelines import load
from mmalign.records import Minibatch, Outcome, RewardSignal
from mmalign.scoring import Scorer
from mmalign.trainer import AVERAGE, Trainer, TrainingError, TrainingSettings


class Share(ClippedRatio):
    """A part of the loss, as that of one among many samples is; a large one overflows."""

    part = 1.0

    def __call__(self, policy: Policy, batch: Minibatch) -> Any:
        losses, measures = super().__call__(policy, batch)
        return losses * self.part, measures


def share(part: float) -> Any:
    kind = type("Part", (Share,), {"part": part})
    return lambda algorithm: replace(algorithm, objective=kind(1e-2, 1e-2))


def half(settings: TrainingSettings = FAST, **given: Any) -> Trainer:
    return trainer(settings, policy=ToyFlow(precision="fp16"), **given)


def scale(found: Trainer) -> LossScale:
    assert found.learner.scale is not None
    return found.learner.scale


# The scale


@pytest.mark.parametrize("patience", [2, 3])
def test_after_its_first_overflow_it_moves_as_that_of_torch(patience):
    theirs = torch.amp.GradScaler("cpu", 2.0**20, growth_interval=patience)
    ours, weight = LossScale(2.0**20, patience, overflows=1), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    for overflowed in torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.2:
        weight.grad = torch.full((1,), torch.inf if overflowed else 1.0)
        theirs.scale(torch.ones(1))  # is made by its first use
        theirs.step(optimizer)
        theirs.update()
        if overflowed:
            assert ours.fall()
        else:
            ours.rise()
        assert ours.value == theirs.get_scale()
        assert ours.good == theirs.state_dict()["_growth_tracker"]


def test_it_looks_for_its_place_at_once():
    found = LossScale(2.0**16)
    for power in (17, 18, 19):
        found.rise()
        assert found.value == 2.0**power
    assert found.fall()
    for _ in range(1999):
        found.rise()
        assert found.value == 2.0**18
    found.rise()
    assert found.value == 2.0**19


def test_it_stays_between_floor_and_ceiling():
    found = LossScale(2 * FLOOR)
    assert found.fall()
    assert not found.fall()
    assert (found.value, found.overflows) == (FLOOR, 1)
    found = LossScale(CEILING / 2)
    found.rise()
    found.rise()
    assert found.value == CEILING


def test_only_fp16_has_one():
    assert trainer().learner.scale is None
    assert trainer(policy=ToyFlow(precision="bf16")).learner.scale is None
    metrics = half().step(0)
    assert metrics["loss_scale"] == 2.0**18  # after two updates
    assert metrics["updates/overflowed"] == 0
    assert not {"loss_scale", "updates/overflowed"} & trainer().step(0).keys()


def test_it_is_refused_where_gradients_are_out_of_reach(monkeypatch):
    alone = Distributed("cpu")
    monkeypatch.setattr(Distributed, "kind", "deepspeed")
    with pytest.raises(ValueError, match=r"policy\.precision=fp16 .*=bf16, or launch with .*fsdp2\.yaml"):
        half(distributed=alone)


# The gradient


def test_what_fp16_rounds_to_zero_is_learned_all_the_same():
    """As where a sample is one of thousands, each of which has as many numbers."""
    exact, scaled, lost = (make(ONE, change=share(2.0**-22)) for make in (trainer, half, half))
    scale(scaled).value = 2.0**26
    scale(lost).value = 1.0
    wanted = gradient(exact)
    assert wanted.norm() > 0
    assert not gradient(lost).any()
    assert_close(gradient(scaled), wanted, atol=2e-3 * float(wanted.abs().max()), rtol=0)


def test_the_scale_changes_neither_gradient_nor_what_is_clipped():
    free, clipped = (replace(ONE, grad_clip=limit) for limit in (1e9, 1e-3))
    for settings in (free, clipped):
        plain, scaled = half(settings), half(settings)
        scale(plain).value, scale(scaled).value = 2.0**12, 2.0**16
        assert torch.equal(gradient(plain), gradient(scaled))
    assert float(gradient(half(clipped)).norm()) == pytest.approx(1e-3, rel=1e-3)
    assert half(clipped).step(0)["grad_norm"] == pytest.approx(half(free).step(0)["grad_norm"], rel=1e-3)
    assert half(free).step(0)["grad_norm"] == pytest.approx(trainer(free).step(0)["grad_norm"], rel=1e-2)


def test_gradients_that_are_looked_at_apart_are_scaled_too():
    """MARBLE differentiates each objective by itself."""

    def apart(policy: ToyFlow) -> Trainer:
        rewards = [Redness(), Brightness()]
        balanced = MARBLE(every=1).build({"redness": {0: 1.0}, "brightness": {0: 1.0}})
        return trainer(ONE, rewards=rewards, policy=policy, composer=balanced, change=lambda a: composed(
            share(2.0**-22)(a), balanced
        ))  # fmt: skip

    exact, scaled = apart(ToyFlow()), apart(ToyFlow(precision="fp16"))
    scale(scaled).value = 2.0**26
    wanted = gradient(exact)
    assert wanted.norm() > 0
    assert_close(gradient(scaled), wanted, atol=5e-3 * float(wanted.abs().max()), rtol=0)


@pytest.fixture(scope="module")
def lab() -> Callable[[str, float, float], Tensor]:
    """`lab(precision, part, scale)`: the gradient of an update of the lab's model, always over one batch."""
    method, sampled = FlowGRPO(steps=3, clip=0.5, kl=0.0), []
    prompts = PromptSource([Prompt("a red circle"), Prompt("two blue squares above a star")], 2, 2, 0)

    def update(precision: str, part: float, value: float) -> Tensor:
        algorithm = share(part)(method.build({"redness": 1.0}))
        given = PolicySettings(str(ROOT / "assets/lab/flow"), precision=precision, lora=LoraSettings(4, 8))
        policy = load(given, algorithm.noise)
        with torch.no_grad():
            for i, p in enumerate(p for p in policy.module.parameters() if p.requires_grad):
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        sample = policy.sample
        policy.sample = lambda *how: sampled[0] if sampled else sampled.append(sample(*how)) or sampled[0]
        found = Trainer(policy, algorithm, Scorer([Redness()]), prompts, ONE)
        if found.learner.scale is not None:
            found.learner.scale.value = value
        return gradient(found)

    return update


@pytest.mark.slow
def test_gradients_of_the_lab_are_those_of_fp32_to_the_accuracy_of_fp16(lab):
    part = 1e-6  # of a loss, what one of some ten thousand actions has
    exact = lab("fp32", part, 1.0)
    assert exact.norm() > 0
    assert not lab("fp16", part, 1.0).any()
    found = lab("fp16", part, 2.0**32)
    assert (found - exact).norm() < 0.01 * exact.norm()
    assert (lab("bf16", part, 1.0) - exact).norm() > (found - exact).norm()


# What overflows


def test_an_update_that_overflows_is_left_out_and_halves_the_scale():
    notes = Notes()
    found = half(replace(FAST, iterations=1, updates=1), tracker=notes)
    scale(found).value = 2.0**40
    before, average = trained(found), [p.clone() for p in found.policy.copies.state_dict()[AVERAGE]]
    found.run()
    assert scale(found).value == 2.0**39
    assert all(map(torch.equal, before, trained(found)))
    assert all(map(torch.equal, average, found.policy.copies.state_dict()[AVERAGE]))
    assert not found.learner.optimizer.state_dict()["state"]
    metrics = notes.metrics[0]
    assert (metrics["updates"], metrics["updates/bad"], metrics["updates/overflowed"]) == (0, 0, 1)
    assert metrics["loss_scale"] == 2.0**39
    assert torch.isfinite(torch.tensor(list(metrics.values()))).all()


def test_overflows_do_not_stop_a_run_and_it_learns_once_the_scale_fits():
    notes = Notes()
    found = half(replace(FAST, iterations=6, max_bad_steps=1), tracker=notes)
    scale(found).value = 2.0**30
    found.run()
    metrics = notes.metrics[5]
    assert metrics["updates/overflowed"] >= 3
    assert metrics["updates"] == 12 - metrics["updates/overflowed"] > 0
    assert metrics["updates/bad"] == 0
    assert metrics["loss_scale"] == 2.0 ** (30 - metrics["updates/overflowed"])


def test_a_gradient_that_overflows_at_every_scale_stops_the_run():
    notes = Notes()
    found = half(replace(FAST, iterations=9, max_bad_steps=3), change=share(1e12), tracker=notes)
    scale(found).value = 4.0
    before = trained(found)
    with pytest.raises(TrainingError, match=r"3 updates in a row .* not finite"):
        found.run()
    assert (scale(found).value, scale(found).overflows, found.learner.bad) == (FLOOR, 2, 3)
    assert all(map(torch.equal, before, trained(found)))


def test_a_loss_that_is_no_number_is_no_matter_of_scale():
    found = half(replace(FAST, iterations=9, max_bad_steps=3), change=share(float("nan")))
    with pytest.raises(TrainingError, match=r"3 updates in a row .* loss nan"):
        found.run()
    assert (scale(found).value, scale(found).overflows) == (2.0**16, 0)


# Checkpoints


class Fatal(Redness):
    """Ends the process in its third iteration, as far as a test can."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, outcome: Outcome) -> RewardSignal:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().__call__(outcome)


def test_a_run_that_was_killed_goes_on_with_its_scale(tmp_path):
    settings = replace(FAST, iterations=8, updates=1, save_every=1, learning_rate=1e-2)

    def run(folder: str, reward: Redness) -> tuple[Trainer, Notes]:
        notes = Notes()
        found = half(settings, rewards=[reward], tracker=notes, run_dir=tmp_path / folder)
        scale(found).value, scale(found).patience = 2.0**26, 3
        try:
            found.run()
        except KeyboardInterrupt:
            assert isinstance(reward, Fatal)
        return found, notes

    (whole, told), (killed, _) = run("whole", Redness()), run("killed", Fatal())
    assert killed.iteration == 2
    assert scale(killed).overflows > 0
    again, more = run("killed", Redness())
    assert more.metrics.keys() == set(range(2, 8))
    assert len({told.metrics[i]["loss_scale"] for i in range(4, 8)}) > 1
    for name in ("updates", "updates/overflowed", "loss_scale", "loss", "reward/redness"):
        assert [more.metrics[i].get(name) for i in range(2, 8)] == [
            told.metrics[i].get(name) for i in range(2, 8)
        ]
    assert all(map(torch.equal, trained(again), trained(whole)))
    states = [
        checkpoints.read_state(tmp_path / run / "checkpoints/step_000008") for run in ("whole", "killed")
    ]
    assert states[0]["loss_scale"] == states[1]["loss_scale"] == scale(whole).state_dict()
