"""LIReFL: one step with a gradient anywhere on the way, a frozen reward of latents, and no decoder."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import ROOT
from torch import Tensor, nn
from torch.testing import assert_close

from mmalign.algorithms.lirefl import LIReFL, covered
from mmalign.contracts import LoraSettings, PolicySettings
from mmalign.data import PromptSource, read_prompts
from mmalign.pipelines import load
from mmalign.pipelines.flow import FlowPolicy
from mmalign.records import Minibatch, Outcome, Pick, Plan, Prompts, Renoise, RewardSignal, Trajectory
from mmalign.rewardmodels.latent_identity import IdentityNetwork, LatentIdentity
from mmalign.scoring import Scorer
from mmalign.sde import Noise
from mmalign.testing import prompts_of
from mmalign.trainer import Trainer, TrainingSettings

KEY = (0, "test")
BASE = str(ROOT / "assets/lab/video")
CLIPS = ROOT / "assets/lab/video_identity/train.jsonl"
STEPS = 4


class Silent(nn.Module):
    """A decoder that must not be asked."""

    def forward(self, *args: object, **kwargs: object) -> None:
        raise AssertionError("something was decoded")


def shut(vae: nn.Module) -> None:
    """Make any use of its decoder an error."""
    vae.decoder = Silent()
    vae.decode = vae.decoder.forward


@pytest.fixture
def policy() -> FlowPolicy:
    """The lab's video model with adapters that already do something."""
    settings = PolicySettings(
        BASE,
        height=32,
        width=32,
        frames=9,
        max_sequence_length=16,
        lora=LoraSettings(4, 8, ("attn1.to_q", "attn1.to_v")),
    )
    found = load(settings, Noise(level=0.0))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trained(found):
            p.add_(0.05 * torch.randn(p.shape, generator=draw))
    return found


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A reward network of one block, not trained."""
    from diffusers import WanTransformer3DModel

    folder = tmp_path_factory.mktemp("identity")
    transformer = WanTransformer3DModel.from_pretrained(BASE, subfolder="transformer").float()
    IdentityNetwork(transformer, 1).save(folder, BASE)
    return folder


@pytest.fixture
def reward(network) -> LatentIdentity:
    return LatentIdentity(str(network))


@dataclass
class Brightness:
    """A reward of latents that one can compute by hand: minus the mean square of the first channel."""

    name: str = "latent_identity"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, outcome.media.flatten(1).mean(1, keepdim=True))

    def on_latents(self, prompts: Prompts, z: Tensor, sigma: Tensor) -> Tensor:
        return -(1 + sigma) * z[:, 0].square().mean((1, 2, 3))


def trained(policy: FlowPolicy) -> list[nn.Parameter]:
    return [p for p in policy.module.parameters() if p.requires_grad]


def clips(count: int) -> Prompts:
    given = read_prompts(CLIPS)[:count]
    return prompts_of([p.text for p in given], 1, [p.extra for p in given])


def plan_at(step: int, steps: int = STEPS) -> Plan:
    return Plan(steps, given=True, renoise=Renoise(1), halt=steps - step)


def prepared(policy: FlowPolicy, method: LIReFL, reward: object, plan: Plan, count: int = 2):
    """The objective, and all actions of a few clips as one minibatch."""
    algorithm = method.build({reward.name: 1.0})
    algorithm.through.meet([reward])
    trajectory = policy.sample(clips(count), plan, KEY)
    pick = Pick(*trajectory.mask.nonzero(as_tuple=True))
    weight = torch.full((len(pick),), 1 / len(pick))
    return algorithm.objective, Minibatch(trajectory, pick, torch.ones(1, len(pick)), weight)


def gradient(policy: FlowPolicy, method: LIReFL, reward: object, plan: Plan) -> Tensor:
    objective, batch = prepared(policy, method, reward, plan)
    return flat(torch.autograd.grad(objective(policy, batch)[0].sum(), trained(policy)))


def flat(tensors) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def denoised(policy: FlowPolicy, trajectory: Trajectory, x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity by plain diffusers."""
    pipeline = policy.adapter.pipeline
    embeds, _ = pipeline.encode_prompt(
        trajectory.outcome.prompts.text, do_classifier_free_guidance=False, max_sequence_length=16
    )
    return pipeline.transformer(x, 1000 * sigma.expand(len(x)), embeds, return_dict=False)[0]


def flow_matching(policy: FlowPolicy, batch: Minibatch, weight: Tensor) -> Tensor:
    """The supervised loss, written out; weight: [n, f, h, w]."""
    replay = batch.trajectory.replay
    x, sigma, clean = replay["x"][:, 0], replay["sigma"][:, 0], replay["clean"]
    share = sigma.reshape(-1, 1, 1, 1, 1)
    noise = (x - (1 - share) * clean) / share
    miss = denoised(policy, batch.trajectory, x, sigma) - (noise - clean)
    return (weight[:, None] * miss.square()).mean()


# ---- where the gradient is


@pytest.mark.parametrize("step", [0, 2, STEPS - 1])
def test_one_forward_of_the_sample_has_a_gradient_and_none_before(policy, reward, step):
    seen: list[tuple[bool, Tensor]] = []

    def note(module: nn.Module, args: tuple, inputs: dict) -> None:
        seen.append((torch.is_grad_enabled(), inputs["hidden_states"].detach()))

    policy.module.register_forward_pre_hook(note, with_kwargs=True)
    objective, batch = prepared(policy, LIReFL(STEPS), reward, plan_at(step))
    objective(policy, batch)[0].sum().backward()
    assert [enabled for enabled, _ in seen] == [False] * step + [True, True]
    (supervised, drawn), replay = [x for _, x in seen[step:]], batch.trajectory.replay
    assert torch.equal(supervised, replay["x"][:, 0])
    assert torch.equal(drawn, replay["halted"])
    assert policy.forwards.sample == 2 * step
    assert policy.forwards.train == 2 * 2


def test_the_halted_state_is_that_of_the_plain_ode(policy):
    noise, halted = (policy.sample(clips(2), plan_at(step), KEY) for step in (0, 3))
    x, sigmas = noise.replay["halted"], noise.sigmas
    with torch.no_grad():
        for sigma, after in pairwise(sigmas[:4]):
            x = x + (after - sigma) * denoised(policy, noise, x, sigma)
    assert_close(halted.replay["halted"], x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_the_gradient_is_that_of_the_formula(policy, step):
    method = LIReFL(STEPS, reward_weight=0.7, box_weight=3.0)
    objective, batch = prepared(policy, method, Brightness(), plan_at(step))
    found = flat(torch.autograd.grad(objective(policy, batch)[0].sum(), trained(policy)))
    replay, (sigma, after) = batch.trajectory.replay, batch.trajectory.sigmas[step : step + 2]
    z = replay["halted"]
    z = z + (after - sigma) * denoised(policy, batch.trajectory, z, sigma)
    extras = batch.trajectory.outcome.prompts.extra
    weight = 1 + 2 * torch.stack([covered(extra["boxes"], (5, 8, 8)) for extra in extras])
    reward = -(1 + after) * z[:, 0].square().mean((1, 2, 3))
    loss = flow_matching(policy, batch, weight) - 0.7 * reward.mean()
    exact = flat(torch.autograd.grad(loss, trained(policy)))
    assert (found - exact).norm() < 1e-4 * exact.norm()


def test_without_a_reward_it_is_supervised_learning(policy):
    method = LIReFL(STEPS, reward_weight=0.0, box_weight=1.0)
    (plan,) = method.build({"latent_identity": 1.0}).plans(0, 0)
    objective, batch = prepared(policy, method, Brightness(), plan)
    assert policy.forwards.sample == 0
    found = flat(torch.autograd.grad(objective(policy, batch)[0].sum(), trained(policy)))
    assert policy.forwards.train == 2
    loss = flow_matching(policy, batch, torch.ones(2, 5, 8, 8))
    exact = flat(torch.autograd.grad(loss, trained(policy)))
    assert (found - exact).norm() < 1e-4 * exact.norm()


def test_the_supervised_half_knows_nothing_of_the_reward(policy):
    """The noised clips are those of the run without a reward, so that arms differ in the reward alone."""
    with_reward = policy.sample(clips(2), plan_at(1), KEY).replay
    alone = policy.sample(clips(2), replace(plan_at(1), halt=0), KEY).replay
    for name in ("x", "sigma", "clean"):
        assert torch.equal(with_reward[name], alone[name])


def test_steps_are_drawn_uniformly_over_the_whole_way():
    plans = LIReFL(steps=10).build({"r": 1.0}).plans
    drawn = Counter(10 - plans(i, 0)[0].halt for i in range(3000))
    assert set(drawn) == set(range(10))
    assert sum((count - 300) ** 2 / 300 for count in drawn.values()) < 27.9  # chi-squared, 9, p = .001
    assert [plans(i, 3) for i in range(5)] == [plans(i, 3) for i in range(5)]


def test_what_is_kept_does_not_grow_with_the_steps(policy, reward):
    def kept(steps: int) -> tuple[int, int]:
        objective, batch = prepared(policy, LIReFL(steps), reward, plan_at(steps - 1, steps))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            objective(policy, batch)
        return sum(sizes), sum(t.numel() for t in batch.trajectory.replay.values())

    assert kept(2) == kept(8)


# ---- training


def run(policy: FlowPolicy, reward: object, iterations: int = 2, **settings: float) -> Trainer:
    algorithm = LIReFL(STEPS, **settings).build({reward.name: 1.0})
    source = PromptSource(read_prompts(CLIPS)[:4], 4, 1, 0)
    training = TrainingSettings(iterations=iterations, learning_rate=0.01, updates=1, batch=4)
    found = Trainer(policy, algorithm, Scorer([reward]), source, training)
    found.run()
    return found


def test_a_run_decodes_nothing_and_changes_the_adapters_alone(policy, reward):
    shut(policy.adapter.pipeline.vae)
    shut(reward._space.pipeline.vae)
    judge = {name: t.clone() for name, t in reward._network.state_dict().items()}
    frozen = {name: p.detach().clone() for name, p in policy.module.named_parameters() if not p.requires_grad}
    before = flat(trained(policy)).detach().clone()
    run(policy, reward, reward_weight=1.0)
    assert not torch.equal(flat(trained(policy)), before)
    assert all(torch.equal(p, frozen[n]) for n, p in policy.module.named_parameters() if n in frozen)
    assert all(torch.equal(t, judge[name]) for name, t in reward._network.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in reward._network.parameters())


def test_the_decoder_would_have_been_noticed(policy):
    shut(policy.adapter.pipeline.vae)
    with pytest.raises(AssertionError, match="something was decoded"):
        policy.sample(clips(1), Plan(1), KEY)


def test_the_reward_network_passes_a_gradient_on(policy, reward):
    alone = gradient(policy, LIReFL(STEPS, reward_weight=0.0), reward, replace(plan_at(1), halt=0))
    both = gradient(policy, LIReFL(STEPS, reward_weight=1.0), reward, plan_at(1))
    assert (both - alone).norm() > 1e-6
    assert both.isfinite().all()


@pytest.mark.slow
def test_the_reward_rises(policy):
    def score() -> float:
        """Of the latents behind every step, under the noise of the test."""
        found = []
        for step in range(STEPS):
            objective, batch = prepared(policy, LIReFL(STEPS), Brightness(), plan_at(step))
            found.append(objective(policy, batch)[1]["latent_reward"].mean())
        return float(torch.stack(found).mean())

    with torch.no_grad():
        before = score()
        with torch.enable_grad():
            run(policy, Brightness(), iterations=8, reward_weight=3.0)
        assert score() > before + 0.02


def test_a_reward_that_reads_no_latents_is_refused():
    class Pixels:
        name = "pixels"

        def __call__(self, outcome: Outcome) -> RewardSignal: ...

    through = LIReFL(STEPS).build({"pixels": 1.0}).through
    with pytest.raises(TypeError, match=r"'pixels' cannot read latents.* one that has `on_latents`"):
        through.meet([Pixels()])


def test_watched_rewards_need_no_latents():
    class Pixels:
        name = "pixels"

        def __call__(self, outcome: Outcome) -> RewardSignal: ...

    through = LIReFL(STEPS).build({"pixels": 0.0, "latent_identity": 2.0}).through
    through.meet([Pixels(), Brightness()])
    assert [weight for weight, _ in through.models] == [2.0]


# ---- what prompts give


def test_given_videos_are_those_of_the_file_and_their_latents_the_encoders(policy):
    trajectory = policy.sample(clips(2), plan_at(0), KEY)
    media = trajectory.outcome.media
    assert media.shape == (2, 9, 3, 32, 32)
    vae = policy.adapter.pipeline.vae
    raw = vae.encode(media.transpose(1, 2) * 2 - 1).latent_dist.mode()
    mean, std = (
        torch.tensor(m).reshape(1, -1, 1, 1, 1) for m in (vae.config.latents_mean, vae.config.latents_std)
    )
    assert_close(trajectory.replay["clean"], (raw - mean) / std)


@pytest.mark.parametrize(
    ("extra", "said"),
    [({}, "gives no video"), ({"video": ["a.png"]}, "its video has 1 frames, and the model makes 9")],
)
def test_a_prompt_without_its_video_is_refused(policy, extra, said):
    with pytest.raises(ValueError, match=said):
        policy.sample(prompts_of(["a red circle moves left"], 1, [extra]), plan_at(0), KEY)


def test_a_run_on_prompts_without_videos_is_refused_before_it_starts(tmp_path, monkeypatch, network):
    from mmalign.assembly import assemble
    from mmalign.config import ConfigError, load_config

    monkeypatch.chdir(ROOT)
    overrides = ["prompts.file=assets/lab/video_identity/heldout.jsonl", f"run.dir={tmp_path}"]
    overrides += [f"rewards.latent_identity.model={network}"]
    config = load_config("assets/recipes/lab_latent_identity.yaml", overrides)
    with pytest.raises(ConfigError, match='lirefl learns from the "video" of each prompt, and 96 of 96'):
        assemble(config, write=False)


# ---- boxes


def test_a_box_covers_its_share_of_every_place():
    quarter = covered([[0.0, 0.0, 0.5, 0.5]], (1, 4, 4))
    assert quarter.tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]]
    between = covered([[0.125, 0.0, 0.375, 0.25]], (4, 4))  # half of two places
    assert between[0].tolist() == [0.5, 0.5, 0, 0]
    assert not between[1:].any()


def test_the_area_of_a_box_is_kept():
    box = [0.13, 0.27, 0.61, 0.9]
    assert float(covered([box], (8, 8)).mean()) == pytest.approx(0.48 * 0.63, abs=1e-6)


def test_frames_of_a_latent_are_means_over_what_they_stand_for():
    whole = [0.0, 0.0, 1.0, 1.0]
    found = covered([whole, None, whole, None, None], (3, 2, 2))
    assert found.mean((1, 2)).tolist() == [1.0, 0.5, 0.0]


def test_several_boxes_do_not_add_up():
    whole = [0.0, 0.0, 1.0, 1.0]
    assert covered([[whole, whole]], (2, 2)).tolist() == [[1, 1], [1, 1]]
    assert covered(None, (3, 2, 2)).shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([None] * 4, "1 more than a multiple of 2 for 3 frames"),
        ("left", "must have an entry for each frame"),
        ([[0.0, 0.0, 2.0, 1.0]], r"got \[0.0, 0.0, 2.0, 1.0\]"),
        ([[0.0, 0.0, 1.0]], r"a box is \[left, top, right, bottom\]"),
    ],
)
def test_boxes_that_are_none_are_refused(boxes, said):
    with pytest.raises(ValueError, match=said):
        covered(boxes, (3, 2, 2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"reward_weight": -1.0}, "reward_weight must not be negative"),
        ({"box_weight": 0.0}, "box_weight must be positive"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        LIReFL(**settings)


def test_only_given_samples_may_be_noised_again_beside_a_halt():
    with pytest.raises(ValueError, match="not noised again, unless those are given"):
        Plan(4, halt=2, renoise=Renoise(1))
