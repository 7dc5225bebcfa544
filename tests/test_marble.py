"""MARBLE in the loop: many rewards, one update (arXiv:2605.06507)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from free import Free
from test_updates import min_norm
from torch.testing import assert_close
from toys import Brightness, Notes, Redness, ToyFlow, source

from mmalign.algorithms.diffusion_nft import DiffusionNFT, NegativeAware
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.assembly import composed
from mmalign.compositions import MARBLE, Composition, Constrained, Limit
from mmalign.config import ConfigError
from mmalign.forward_process import Matching
from mmalign.records import Outcome, RewardSignal
from mmalign.scoring import Scorer
from mmalign.trainer import Trainer, TrainingSettings

NFT = DiffusionNFT(steps=4, std="group", kl=0.01)
REWARDS = (Redness(), Brightness())


class Silent(Brightness):
    """Has never a verdict."""

    def __call__(self, outcome: Outcome) -> RewardSignal:
        signal = super().__call__(outcome)
        return RewardSignal(self.name, torch.full_like(signal.values, torch.nan))


def trainer(
    composition: Composition,
    iterations: int = 1,
    rewards=REWARDS,
    method=NFT,
    folder: Path | None = None,
    **settings,
) -> tuple[Trainer, Notes]:
    composer, notes = composition.build({reward.name: {0: 1.0} for reward in rewards}), Notes()
    algorithm = composed(method.build(composer.shares), composer)
    usual = TrainingSettings(
        iterations=iterations, learning_rate=1e-2, batch=1000, updates=1, max_missing=1.0
    )
    found = Trainer(
        ToyFlow(algorithm.noise),
        algorithm,
        Scorer(list(rewards), 1.0),
        source(4, 8),
        replace(usual, **settings),
        tracker=notes,
        run_dir=folder,
        composer=composer,
    )
    return found, notes


def gradient(found: Trainer) -> torch.Tensor:
    found.step(0)
    return torch.cat([p.grad.flatten() for p in found.learner.parameters if p.grad is not None])


PLAIN = {"grad_clip": 1e9}
ALONE = replace(NFT, kl=0.0)


def apart() -> list[torch.Tensor]:
    """The gradient of each reward by itself, on the same samples."""
    return [gradient(trainer(MARBLE(), rewards=(one,), method=ALONE, **PLAIN)[0]).double() for one in REWARDS]


def test_the_gradient_is_the_shortest_vector_between_those_of_the_rewards():
    rows = torch.stack(apart())
    units = rows / rows.norm(dim=1, keepdim=True)
    expected = min_norm(units @ units.T) @ units * rows.norm(dim=1).mean()
    found = gradient(trainer(MARBLE(), method=ALONE, **PLAIN)[0]).double()
    assert_close(found, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_any_cut_into_minibatches_gives_the_same_direction(batch):
    whole = gradient(trainer(MARBLE(), **PLAIN)[0])
    assert_close(gradient(trainer(MARBLE(), batch=batch, **PLAIN)[0]), whole, rtol=1e-4, atol=1e-8)


def test_the_pull_to_the_base_model_stays_outside_of_the_balance():
    """At the base model it is 0; an update later it is not, and is the same whatever the balance."""
    found = []
    for kl in (1e-9, 5.0):
        one, _ = trainer(MARBLE(), 2, method=replace(NFT, kl=kl), **PLAIN)
        one.step(0)
        one.step(1)
        found.append(dict(one.algorithm.update.held))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_single_reward_trains_as_without_marble():
    weights = []
    for composition in (MARBLE(), Constrained()):
        one, _ = trainer(composition, 3, rewards=(Redness(),))
        one.run()
        weights.append([p.detach().clone() for p in one.learner.parameters])
    for mine, theirs in zip(*weights, strict=True):
        assert_close(mine, theirs, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:reward 'brightness'")
def test_a_reward_without_any_verdict_changes_nothing():
    mute = gradient(trainer(MARBLE(), rewards=(Redness(), Silent()), method=ALONE, **PLAIN)[0])
    assert_close(mute, apart()[0].float(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("advantage", [1.0, 9.0])
def test_the_loss_of_the_mixed_advantage_is_the_mixed_loss_unless_the_clamp_is_active(advantage):
    """The proposition of the paper; what is trained on between two looks is the mixed loss, always exact."""
    policy, shares = Free(), torch.tensor([0.3, 0.7])
    policy.live.data += 0.2
    apart = advantage * torch.stack([torch.linspace(-1, 1, 4), torch.tensor([1.0, -0.5, 0.2, 0.3])])
    objective = NegativeAware(1.0, 5.0, Matching("t", adaptive=True))
    batch = policy.batch(apart[0])
    losses, _ = objective(policy, replace(batch, advantage=apart))
    mixed = torch.autograd.grad((losses * shares).sum(), policy.live, retain_graph=True)[0]
    (loss,), _ = objective(policy, replace(batch, advantage=(shares @ apart)[None]))
    once = torch.autograd.grad(loss, policy.live)[0]
    if advantage == 1.0:
        assert_close(once, mixed, rtol=1e-5, atol=1e-7)
    else:
        assert (once - mixed).abs().max() > 1e-3


@pytest.mark.parametrize("every", [1, 5])
def test_k_rewards_cost_k_backwards_at_a_look_and_one_between(every):
    found, _ = trainer(MARBLE(every=every), 5)
    asked = {"grad": 0, "backward": 0}
    plain, whole = torch.autograd.grad, found.distributed.backward

    def counted(*given, **more):
        asked["grad"] += 1
        return plain(*given, **more)

    def backward(loss):
        asked["backward"] += 1
        whole(loss)

    found.distributed.backward = backward
    torch.autograd.grad = counted
    try:
        found.run()
    finally:
        torch.autograd.grad = plain
    looks = 5 if every == 1 else 1
    assert asked == {"grad": looks * (len(REWARDS) + 1), "backward": 5 - looks}  # + 1: the pull


@pytest.mark.parametrize("composition", [MARBLE(every=3), Constrained({"brightness": Limit(0.2, above=0.5)})])
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(composition, tmp_path):
    through, seen = trainer(composition, 5, folder=tmp_path / "a", save_every=2, updates=2)
    through.run()
    trainer(composition, 3, folder=tmp_path / "b", save_every=2, updates=2)[0].run()
    again, rest = trainer(composition, 5, folder=tmp_path / "b", save_every=2, updates=2)
    again.run()
    assert min(rest.metrics) == 3
    for one, two in zip(through.learner.parameters, again.learner.parameters, strict=True):
        assert torch.equal(one, two)
    for step, metrics in rest.metrics.items():
        for name, value in metrics.items():
            if name.startswith(("balance/", "composition/", "reward/", "loss")):
                assert value == seen.metrics[step][name], name


def test_both_rewards_rise_where_they_agree_little():
    found, notes = trainer(MARBLE(), 30, method=ALONE)
    found.run()
    for reward in REWARDS:
        curve = [metrics[f"reward/{reward.name}"] for metrics in notes.metrics.values()]
        assert sum(curve[-3:]) > sum(curve[:3]) + 0.1
    worst = [m["balance/cosine_worst"] for m in notes.metrics.values() if "balance/cosine_worst" in m]
    assert len(worst) == 3
    assert min(worst) > 0


def test_ratios_are_balanced_too():
    found, notes = trainer(MARBLE(every=1), 2, method=FlowGRPO(steps=4, clip=1e-2, kl=0.1))
    found.run()
    assert all(metrics["balance/cosine_worst"] > 0 for metrics in notes.metrics.values())


def test_methods_that_differentiate_a_sum_take_no_composition():
    from mmalign.algorithms.refl import ReFL

    composer = MARBLE().build({"a": {0: 1.0}})
    with pytest.raises(ConfigError, match="takes neither a composition nor weights"):
        composed(ReFL(steps=4).build(composer.shares), composer)
