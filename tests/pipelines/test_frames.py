"""Credit by frames: a step of a video has one log-probability a frame, and each frame its own advantage."""

import pytest
import torch
from families import wan
from torch.testing import assert_close
from training import trainer

from mmalign.algorithms.diffusion_nft import DiffusionNFT
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.contracts import LoraSettings, PolicySettings
from mmalign.data import Prompt, PromptSource
from mmalign.forward_process import Matching
from mmalign.pipelines import load
from mmalign.records import Masks, Minibatch, Noised, Plan, Renoise, RewardSignal, Unit, Whole
from mmalign.rewardmodels.inputs import of_frames
from mmalign.sde import Noise
from mmalign.testing import check_policy, prompts_of

KEY = (0, "frames")
FRAMES, LATENT = 5, 3  # the first frame, and two of two each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("wan")
    wan().save_pretrained(path)
    return str(path)


def make(folder, split="whole", noise=None):
    settings = PolicySettings(
        folder, height=16, width=24, frames=FRAMES, max_sequence_length=16, lora=LoraSettings(4, 6)
    )
    return load(settings, noise or FlowGRPO().noise, split=split)


class LastFrame:
    """Brightness of the last frame alone, at its own grain; the other frames are all alike."""

    name = "last"

    def __call__(self, outcome):
        videos = outcome.media
        values = torch.zeros(videos.shape[:2])
        values[:, -1] = videos[:, -1].flatten(1).mean(1)
        return RewardSignal(self.name, values, Unit.FRAME, where=of_frames(videos))


def test_the_policy_keeps_its_contract(folder):
    policy = make(folder, "frames")
    check_policy(policy, prompts_of(["a cat", "a dog"], 3), Plan(4, (0, 2)))


def test_frames_add_up_to_the_whole(folder):
    prompts = prompts_of(["a cat", "a dog"], 2)
    plan = Plan(4, (0, 1, 2))
    whole, frames, places = (
        make(folder, split).sample(prompts, plan, KEY) for split in ("whole", "frames", "places")
    )
    assert torch.equal(whole.outcome.media, frames.outcome.media)
    assert whole.log_prob.shape == (4, 3)
    assert frames.log_prob.shape == (4, 3, LATENT)
    assert places.log_prob.shape == (4, 3, LATENT, 4, 6)
    assert_close(frames.log_prob.mean(2), whole.log_prob)
    assert_close(places.log_prob.mean((3, 4)), frames.log_prob)


def test_a_frame_lies_on_the_part_of_the_latent_that_stands_for_it(folder):
    policy = make(folder, "frames")
    trajectory = policy.sample(prompts_of(["a cat"], 2), Plan(3, (0,)), KEY)
    footprint = policy.locate(of_frames(trajectory.outcome.media), trajectory)
    assert footprint.shape == (2, FRAMES, 1, LATENT)
    assert footprint[0, :, 0].tolist() == [[1, 0, 0], [0, 0.5, 0], [0, 0.5, 0], [0, 0, 0.5], [0, 0, 0.5]]
    assert policy.locate(Whole(), trajectory).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="a video of 5 frames needs masks of as many"):
        policy.locate(Masks(torch.ones(2, 4, 4, 1, 1)), trajectory)
    by_place = make(folder, "places")
    drawn = by_place.sample(prompts_of(["a cat"], 2), Plan(3, (0,)), KEY)
    assert_close(by_place.locate(of_frames(drawn.outcome.media), drawn)[0, :, 0, :, 0, 0], footprint[0, :, 0])


def test_pictures_have_no_frames(tiny):
    with pytest.raises(ValueError, match="credit by frames needs a model of videos"):
        load(PolicySettings(str(tiny), max_sequence_length=12), Noise(), split="frames")


def advantages(folder, method, reward):
    """One iteration of a method, and the credit that it gave."""
    policy = make(folder, "frames" if method.frames else "whole", method.build({reward.name: 1.0}).noise)
    prompts = PromptSource([Prompt("a cat", {}), Prompt("a dog", {})], 2, 4, 0)
    found = trainer(method, 1, policy=policy, prompts=prompts, reward=reward, batch=8, updates=1)
    trajectory = policy.sample(prompts.at(0), found.algorithm.plans(0, 0)[0], KEY)
    signals = found.scorer(trajectory.outcome).signals
    return policy, found, trajectory, found.algorithm.credit(signals, trajectory, policy.locate)


@pytest.mark.parametrize(
    "method", [FlowGRPO(steps=3, frames=True), DiffusionNFT(steps=2, renoise=Renoise(2), frames=True)]
)
def test_a_frame_answers_for_itself(folder, method):
    """A reward of the last frame gives credit to the last part of the latent, and to no other."""
    _, found, trajectory, credit = advantages(folder, method, LastFrame())
    values = credit.values.expand(1, *trajectory.log_prob.shape[:2], LATENT)
    assert not values[..., :2].any()
    assert values[..., 2].abs().min() > 1e-3
    assert_close(credit.weight.expand_as(values[0]).sum(), torch.tensor(1.0))
    before = {name: p.detach().clone() for name, p in found.policy.module.named_parameters()}
    found.run()
    moved = {n for n, p in found.policy.module.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(".lora_" in name for name in moved)
    (metrics,) = found.tracker.metrics.values()
    if isinstance(method, FlowGRPO):
        assert abs(metrics["ratio"] - 1) < 1e-5


class Bright:
    """A reward of whole videos."""

    name = "bright"

    def __call__(self, outcome):
        return RewardSignal(self.name, outcome.media.flatten(1).mean(1)[:, None])


def test_where_frames_agree_their_gradient_is_that_of_the_whole(folder):
    """On the first update, where every ratio is 1."""
    found = []
    for frames in (False, True):
        method = FlowGRPO(steps=3, kl=0.0, frames=frames)
        policy, run, trajectory, credit = advantages(folder, method, Bright())
        rows = torch.arange(len(trajectory))
        total = 0.0
        for pick in policy.picks(trajectory, rows, 64):
            at = (pick.rows, pick.columns)
            site = trajectory.log_prob.shape[2:]
            values = credit.values.expand(1, *trajectory.log_prob.shape)[:, at[0], at[1]]
            weight = credit.weight.expand(*trajectory.log_prob.shape)[at]
            assert values.shape[2:] == site
            loss, _ = run.algorithm.objective(policy, Minibatch(trajectory, pick, values, weight, fresh=True))
            total = total + loss.sum()
        total.backward()
        found.append({n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None})
    whole, split = found
    assert whole.keys() == split.keys()
    for name in whole:
        assert_close(whole[name], split[name], atol=1e-7, rtol=1e-4)


def test_errors_of_frames_are_means_over_their_places():
    generator = torch.Generator().manual_seed(0)
    clean, noise, velocity = (torch.randn(2, 4, 3, 5, 5, generator=generator) for _ in range(3))
    sigma = torch.tensor([0.3, 0.8]).reshape(2, 1, 1, 1, 1)
    state = Noised((1 - sigma) * clean + sigma * noise, clean, sigma)
    for error in (Matching(), Matching("t2"), Matching("elbo"), Matching("one", power=0.5)):
        frames = error(state, velocity, 1)
        assert frames.shape == (2, 3)
        for f in range(3):
            part = Noised(state.x[:, :, f], clean[:, :, f], sigma[:, :, 0])
            assert_close(frames[:, f], error(part, velocity[:, :, f]))
    assert_close(Matching()(state, velocity, 1).mean(1), Matching()(state, velocity))
