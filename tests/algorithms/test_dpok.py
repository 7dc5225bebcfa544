"""DPOK: a baseline that is learned leaves the gradient's mean, lowers its variance, and resumes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from methods import N, assert_learns, run, trainer
from torch.testing import assert_close
from toys import Brightness, Redness, ToyFlow, names

from mmalign.algorithms.ddpo import DDPO
from mmalign.algorithms.dpok import DPOK, Value, ValueNet, ValueSettings, averaged, state_features
from mmalign.assembly import composed
from mmalign.compositions import MARBLE
from mmalign.config import ConfigError, validate
from mmalign.credit import Peers
from mmalign.plans import every_step
from mmalign.records import Advantage, Outcome, State, Trajectory
from mmalign.sde import Noise

T = 5
FAST = ValueSettings(learning_rate=1e-2, epochs=3, batch=64, width=32)
STEPS, GAIN = 3, torch.tensor([0.0, 4.0])  # of the chain below, and what its prompts are worth


class Chain:
    """States x(k + 1) = x(k) + z, z ~ N(m, 1) at m = 0, of prompts 0 and 1 in turn, from x(0) ~ N(0, 1).

    What it earns, x(3) + a number for its prompt, has the gradient 3 by m: one for each step.
    """

    def __init__(self, samples: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.z = torch.randn(samples, STEPS, generator=draw)
        start = torch.randn(samples, 1, generator=draw)
        path = torch.cat([start, start + self.z.cumsum(1)], 1)
        self.x, self.text = path[:, :STEPS], torch.eye(2).repeat(samples // 2, 1)
        self.earned = path[:, -1] + (self.text @ GAIN)
        prompts = replace(names(samples, 1), extra=[{}] * samples)
        actions = torch.ones(samples, STEPS)
        self.trajectory = Trajectory(Outcome(prompts, [""] * samples), actions, actions.bool(), {})

    def states(self, trajectory, pick):
        sigma = 1 - pick.columns / STEPS
        x = self.x[pick.rows, pick.columns].reshape(-1, 1, 1, 1)
        return State(x, sigma, self.text[pick.rows])

    def refined(self, value: Value) -> torch.Tensor:
        """What is left of what each sample earned, [B, S]."""
        weight = torch.full_like(self.x, 1 / self.x.numel())
        advantage = Advantage((self.earned - GAIN.mean())[None, :, None], weight, ("total",))
        left = value.refine(self, self.trajectory, advantage, Peers(self.trajectory.outcome.prompts)).values
        return left[0]


@pytest.mark.slow
def test_it_lowers_the_variance_of_a_gradient_that_is_known_and_leaves_its_mean():
    value = Value(FAST, math.inf)
    for seed in range(20):
        Chain(128, seed).refined(value)
    chain = Chain(2000, 20)
    left = chain.refined(value)  # these samples are met by what those before them have taught
    one = ((chain.earned - GAIN.mean())[:, None] * chain.z).sum(1).double()
    two = (left * chain.z).sum(1).double()
    for found in (one, two):
        assert abs(float(found.mean()) - STEPS) < 4 * float(found.std()) / len(found) ** 0.5
    # With the value itself, x(k) and the prompt's number, what is left at step k is what z add from there on:
    # a sum whose variance is 2 for z(k)^2 each, and 1 for each two of one sample.
    least = 2 * STEPS + STEPS * (STEPS - 1) / 2
    assert least * 0.9 < float(two.var()) < 1.3 * least
    assert float(two.var()) < 0.4 * float(one.var())
    assert value.observe([], chain.trajectory, None)["value/explained"] == pytest.approx(
        1 - (sum(range(1, STEPS + 1)) / STEPS) / (4 + 4), abs=0.06
    )  # of a variance of 4 for the path and 4 for the prompt, 3, 2 and 1 is left at the three steps


def test_it_is_asked_before_it_learns():
    """Else it would know the sample that it is subtracted from, and bias the gradient."""
    value = Value(FAST, math.inf)
    for seed in range(3):
        chain = Chain(32, seed)
        before = copy.deepcopy(value.net)
        left = chain.refined(value)
        x, text, sigma = state_features(chain, chain.trajectory, 8)
        features = torch.cat([x, text[:, None].expand(-1, STEPS, -1)], 2)
        asked = torch.zeros(32, STEPS)
        if before is not None:
            asked = before(features.flatten(0, 1), sigma.flatten()).reshape(32, STEPS).detach()
        assert_close(left, (chain.earned - GAIN.mean())[:, None] - asked)
        assert not left.requires_grad
    assert value.fits == 3


def test_the_network_is_its_formula_and_begins_at_0():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x, sigma = ValueNet(6, 5), torch.randn(4, 6), torch.tensor([1.0, 0.7, 0.5, 0.0])
        assert net(x, sigma).tolist() == [0, 0, 0, 0]
        torch.nn.init.normal_(net.head.weight)
    found = []
    for row, s in zip(x, sigma.tolist(), strict=True):
        waves = [f(math.pi * k * s) for f in (math.sin, math.cos) for k in range(1, 9)]
        hidden = row
        for layer, scale in zip(net.layers, net.scales, strict=True):
            by = 1 + scale.weight @ torch.tensor(waves) + scale.bias
            hidden = ((layer.weight @ hidden + layer.bias) * by).clamp(min=0)
        found.append(net.head.weight[0] @ hidden)
    assert_close(net(x, sigma), torch.stack(found))


def test_it_sees_latents_as_means_over_places():
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    assert_close(averaged(x, 2)[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert torch.equal(averaged(x, 8), x)
    assert averaged(torch.randn(3, 2, 9, 12, 20), 8).shape == (3, 2, 8, 8, 8)
    assert averaged(torch.randn(3, 2, 20), 8).shape == (3, 2, 8)


def weights(method, **settings):
    found, notes = run(method, 3, updates=2, **settings)
    return found.learner.parameters, notes


def test_at_learning_rate_0_it_is_no_baseline():
    """Then a sample is compared with the batch, as DDPO does it while a prompt's buffer is not full."""
    still = ValueSettings(learning_rate=0.0)
    for given in ({"kl": 0.1}, {"kl": 0.0, "clip": None}):
        mine, notes = weights(DPOK(steps=T, value=still, **{"clip": 1e-2} | given))
        theirs, _ = weights(DDPO(steps=T, buffer=10**6, least=10**6, **{"clip": 1e-2} | given))
        for a, b in zip(mine, theirs, strict=True):
            assert_close(a, b, atol=1e-6, rtol=0)
        assert all(m["value/explained"] == 0 for m in notes.metrics.values())
    learned, _ = weights(DPOK(steps=T, clip=None, kl=0.0, value=FAST))
    assert any(float((a - b).detach().abs().max()) > 1e-3 for a, b in zip(learned, mine, strict=True))


def test_compared_in_groups_it_begins_where_ddpo_stands():
    still = ValueSettings(learning_rate=0.0)
    mine, _ = weights(DPOK(steps=T, clip=None, kl=0.0, compare="group", value=still))
    theirs, _ = weights(DDPO(steps=T, clip=None))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compare", ["batch", "group"])
def test_it_learns_and_foretells_the_reward(compare):
    notes = assert_learns(DPOK(steps=T, clip=None, kl=0.01, compare=compare, value=FAST), updates=1)
    explained = [metrics["value/explained"] for metrics in notes.metrics.values()]
    assert explained[0] == 0
    assert sum(explained[-5:]) / 5 > 0.1


def test_it_costs_no_forwards():
    counts = run(DPOK(steps=T, clip=1e-2, value=FAST))[0].policy.forwards
    assert (counts.sample, counts.train, counts.reference) == (N * T, N * (T - 1), N * (T - 1))


def test_the_advantage_is_bounded_after_the_baseline():
    value = Value(FAST, 0.5)
    left = Chain(64, 0).refined(value)
    assert float(left.abs().max()) == 0.5


def test_what_has_no_verdict_teaches_it_nothing():
    chain = Chain(64, 0)
    odd = torch.arange(64) % 4 > 1
    weight = torch.where(odd, 0.0, 1.0)[:, None].expand(64, STEPS)
    states = {}
    for wrong in (0.0, 1e6):
        chain.earned = torch.where(odd, wrong, chain.earned)
        value = Value(FAST, math.inf)
        advantage = Advantage(chain.earned[None, :, None], weight, ("total",))
        found = value.refine(chain, chain.trajectory, advantage, Peers(chain.trajectory.outcome.prompts))
        states[wrong] = value.net.state_dict()
        assert found.values[0, odd].eq(0).all()
    assert all(torch.equal(states[0.0][name], states[1e6][name]) for name in states[0.0])


def test_a_latent_that_is_not_finite_teaches_it_nothing():
    value, chain = Value(FAST, math.inf), Chain(64, 0)
    chain.x[3, 1] = torch.nan
    chain.refined(value)
    assert all(p.isfinite().all() for p in value.net.parameters())
    assert value.fits == 1


def test_a_stopped_run_goes_on_with_its_value_bit_for_bit(tmp_path):
    method = DPOK(steps=T, clip=None, value=FAST)
    through, _ = run(method, 4)
    run(method, 2, run_dir=tmp_path)
    again, _ = run(method, 4, run_dir=tmp_path)
    for a, b in zip(through.learner.parameters, again.learner.parameters, strict=True):
        assert torch.equal(a, b)
    one, two = (found.algorithm.memory.state_dict() for found in (through, again))
    assert one["fits"] == two["fits"] == 4
    assert all(torch.equal(one["net"][name], two["net"][name]) for name in one["net"])
    for mine, theirs in zip(
        one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_of_another_width_is_refused_and_another_rate_is_taken(tmp_path):
    method = DPOK(steps=T, clip=None, value=FAST)
    run(method, 1, run_dir=tmp_path)
    wider = replace(method, value=replace(FAST, width=64))
    with pytest.raises(ValueError, match=r"algorithm\.value\.width is 64, and the checkpoint's is 32"):
        trainer(wider, 2, run_dir=tmp_path)[0].resume()
    slower, _ = trainer(replace(method, value=replace(FAST, learning_rate=1e-4)), 2, run_dir=tmp_path)
    slower.resume()
    assert slower.algorithm.memory.optimizer.param_groups[0]["lr"] == 1e-4
    finer, _ = trainer(replace(method, value=replace(FAST, places=1)), 2, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"fitted on states of 24 numbers, and these have 12.*value\.places"):
        finer.run()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise": Noise("ddim", 0.0)}, r"noise\.level must be above 0"),
        ({"compare": "prompt"}, "compare must be batch or group, got 'prompt'"),
        ({"advantage_clip": 0.0}, r"advantage_clip must be positive, got 0\.0"),
        ({"value": {"learning_rate": -1e-3}}, r"value\.learning_rate must be 0 or more, got -0\.001"),
        ({"value": {"learning_rate": math.inf}}, r"value\.learning_rate must be 0 or more, got inf"),
        *[
            ({"value": {name: 0}}, rf"value\.{name} must be at least 1, got 0")
            for name in ("epochs", "batch", "width", "places")
        ],
        ({"value": {"learning_rate": math.nan}}, r"value\.learning_rate must be 0 or more, got nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        DPOK(**{name: ValueSettings(**v) if name == "value" else v for name, v in given.items()})


def test_groups_of_one_need_the_batch_for_company():
    config = (
        "{policy: {model: m}, prompts: {file: p.txt, group: 1}, rewards: {lab: 1}, algorithm: {name: dpok%s}}"
    )
    assert validate(yaml.safe_load(config % ""), "run.yaml").algorithm == DPOK()
    with pytest.raises(ConfigError, match=r"prompts\.group must be at least 2"):
        validate(yaml.safe_load(config % ", compare: group"), "run.yaml")
    _, notes = run(DPOK(steps=T, clip=None, value=FAST), 2, members=1)
    assert notes.metrics[1]["value/loss"] > 0


def test_rewards_cannot_be_kept_apart():
    weighing = MARBLE().build({"redness": {0: 1.0}, "brightness": {0: 1.0}})
    algorithm = DPOK().build(weighing.shares)
    with pytest.raises(ConfigError, match="DPOK learns the value of one reward a sample"):
        composed(algorithm, weighing)


def test_a_policy_that_does_not_tell_its_states_is_refused():
    trajectory = ToyFlow(Noise("ddim")).sample(names(1, 2), every_step(T)(0, 0)[0], (0, "test"))
    with pytest.raises(TypeError, match="tells the states"):
        state_features(SimpleNamespace(), trajectory, 8)  # type: ignore[arg-type]


def test_several_rewards_are_one_return():
    _, notes = run(DPOK(steps=T, clip=None, value=FAST), 2, rewards=[Redness(), Brightness()])
    assert math.isfinite(notes.metrics[1]["value/loss"])


def test_the_defaults_are_the_papers():
    found = DPOK().build({"r": 1.0})
    assert found.plans(0, 0)[0].sde_steps == tuple(range(49))
    assert (found.objective.low, found.objective.high, found.objective.kl) == (1e-4, 1e-4, 0.01)
    assert found.copies == {"reference": 1.0}
    assert found.noise == Noise("ddim", 1.0)
