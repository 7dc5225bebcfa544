"""Samples that are noised again, and samples that are given: what the policy makes of them."""

import zipfile

import pytest
import torch
from pairs import write
from PIL import Image
from torch.testing import assert_close
from training import trainer

from mmalign.algorithms.diffusion_dpo import DiffusionDPO
from mmalign.algorithms.distill import Taught
from mmalign.data import PromptSource, read_prompts
from mmalign.objectives import REFERENCE
from mmalign.pipelines.flow import read_picture
from mmalign.records import Minibatch, Plan, Prompts, Renoise
from mmalign.rewardmodels.preference import Preference
from mmalign.sde import Noise, levels

KEY = (0, "test")


def noise_of(replay):
    sigma = replay["sigma"][..., None, None, None]
    return (replay["x"] - (1 - sigma) * replay["clean"][:, None]) / sigma


# ---- levels


@pytest.mark.parametrize("law", ["schedule", "grid", "uniform"])
@pytest.mark.parametrize("span", [(0.0, 1.0), (0.1, 0.9)])
def test_one_level_lies_in_each_part_of_the_span(law, span):
    sigmas = torch.tensor([1.0, 0.95, 0.85, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01, 0.0])
    low, high = (levels(Renoise(4, law, span), sigmas, torch.full((1, 4), end))[0] for end in (0.999999, 0.0))
    drawn = levels(Renoise(4, law, span), sigmas, torch.rand(100, 4))
    assert ((drawn >= low) & (drawn <= high)).all()
    assert (drawn.diff() <= 0).all()
    assert (drawn > 0).all()
    if law == "uniform":
        assert_close(high, 1 - span[0] - (span[1] - span[0]) * torch.arange(4) / 4)
    if law == "grid":
        assert set(drawn.flatten().tolist()) <= set(sigmas[:-1].tolist())
    if law == "grid" and span == (0.1, 0.9):
        assert set(drawn.flatten().tolist()) == set(sigmas[1:9].tolist())  # without the first, to nine tenths


def test_between_its_points_the_schedule_is_straight():
    sigmas = torch.tensor([1.0, 0.8, 0.4, 0.0])
    found = levels(Renoise(3), sigmas, torch.full((1, 3), 0.5))
    assert_close(found, torch.tensor([[0.9, 0.6, 0.2]]))


def test_members_are_noised_alike_where_the_plan_says_so_in_any_batch(make, prompts):
    policy = make()
    for shared in (False, True):
        plan = Plan(5, renoise=Renoise(3, shared=shared))
        replay = policy.sample(prompts, plan, KEY).replay
        noise = noise_of(replay)
        for other in (1, 2):
            assert torch.equal(replay["sigma"][0], replay["sigma"][other]) == shared
            assert torch.allclose(noise[0], noise[other], atol=1e-4) == shared
        assert not torch.equal(replay["sigma"][0], replay["sigma"][3])  # another group
        part = policy.sample(prompts.take(torch.tensor([4, 1])), plan, KEY).replay
        for name in ("x", "sigma", "clean"):
            assert_close(part[name], replay[name][[4, 1]], atol=1e-4, rtol=0)


def test_nothing_of_the_way_is_kept_and_the_solver_is_the_plans_own_affair(make, prompts):
    policy = make()
    found = [policy.sample(prompts, Plan(steps, renoise=Renoise(3)), KEY) for steps in (4, 8)]
    for trajectory in found:
        assert trajectory.replay.keys() == {"x", "sigma", "state", "clean"}
        assert trajectory.log_prob.shape == (6, 3)
        (pick,) = policy.picks(trajectory, torch.arange(6), 100)
        now = policy.evaluate(trajectory, pick)
        assert now.noised.x.shape == now.velocity.shape == (18, 4, 8, 8)


# ---- given samples


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path)


def test_given_pairs_are_encoded_and_noised_alike(make, pairs):
    policy = make()
    prompts = PromptSource(read_prompts(pairs), 3, 2, 0).at(0)
    plan = Plan(6, renoise=Renoise(3, "uniform", shared=True), given=True)
    found = policy.sample(prompts, plan, KEY)
    assert policy.forwards.sample == 0
    assert found.outcome.media.shape == (6, 3, 32, 32)
    replay = found.replay
    assert_close(replay["clean"], policy.adapter.latents(found.outcome.media))
    noise = noise_of(replay)
    assert torch.equal(replay["sigma"][0::2], replay["sigma"][1::2])
    assert_close(noise[0::2], noise[1::2], atol=1e-4, rtol=1e-4)
    assert not torch.equal(replay["sigma"][0], replay["sigma"][2])


def test_given_pairs_train_a_real_pipeline(make, pairs):
    policy = make()
    source = PromptSource(read_prompts(pairs), 3, 2, 0)
    method = DiffusionDPO(pairs="given", beta=500.0, renoise=Renoise(2, "uniform", shared=True))
    found = trainer(method, 3, policy=policy, prompts=source, reward=Preference(), updates=1)
    found.run()
    accuracy = [row["accuracy"] for row in found.tracker.metrics.values()]
    assert accuracy[0] == 0.5
    assert accuracy[-1] > 0.5


def test_a_prompt_without_a_picture_is_named(make):
    prompts = Prompts(["a dog"], torch.zeros(1).long(), torch.zeros(1).long(), [{}])
    with pytest.raises(ValueError, match="prompt 'a dog' names no picture"):
        make().sample(prompts, Plan(4, renoise=Renoise(shared=True), given=True), (0,))


def test_a_picture_is_cropped_in_its_middle_and_scaled(tmp_path):
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (16, 0, 48, 32))
    wide.save(tmp_path / "wide.png")
    found = read_picture(str(tmp_path / "wide.png"), 16, 16)
    assert found.shape == (3, 16, 16)
    inside = found[:, :, 2:-2]  # the filter blurs the outer edge
    assert_close(inside, torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand_as(inside))
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.write(tmp_path / "wide.png", "inside/wide.png")
    assert torch.equal(read_picture(str(tmp_path / "some.zip/inside/wide.png"), 16, 16), found)
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"no\.png cannot be read as a picture"):
        read_picture(str(tmp_path / "no.png"), 16, 16)


# ---- guidance of one forward


def test_without_teachers_the_base_model_teaches_with_guidance(make, prompts):
    policy = make(Noise("flow", 0.7))
    trajectory = policy.sample(prompts, Plan(4, (0, 1)), (0,))
    (pick,) = policy.picks(trajectory, torch.arange(6), 100)
    batch = Minibatch(trajectory, pick, torch.zeros(1, len(pick)), torch.ones(len(pick)))
    policy.copies.save(REFERENCE)
    lesson = Taught((REFERENCE,), guidance=3.0).lesson(policy, batch)
    with torch.no_grad():
        guided, plain = (policy.evaluate(trajectory, pick, guidance) for guidance in (3.0, None))
    assert torch.equal(lesson.velocity, guided.velocity)
    assert not torch.allclose(guided.velocity, plain.velocity)
