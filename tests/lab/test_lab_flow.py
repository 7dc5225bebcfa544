"""The shipped model: plain diffusers draws with it, well enough to read and badly enough to be improved."""

import numpy as np
import pytest
import torch
from runs import ROOT

from mmalign.lab.pretrain_flow import sample
from mmalign.lab.pretrain_score import score_pipeline
from mmalign.lab.prompts import held_out_prompts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(ROOT / "assets/lab/flow")


def test_the_lab_model_leaves_something_to_learn_and_asks_for_guidance(pipeline):
    plain, guided = (score_pipeline(pipeline, held_out_prompts(), 1, 10, g).share() for g in (1.0, 2.5))
    assert 0.15 < plain[0] < 0.35, "strict, without guidance"
    assert 0.25 < guided[0] < 0.60, "strict, with guidance 2.5"
    assert guided[0] > plain[0] + 0.04
    assert guided[1] > plain[1] + 0.04, "soft"


def test_the_emoji_model_draws_what_it_is_asked_for():
    from diffusers import StableDiffusion3Pipeline

    emoji = StableDiffusion3Pipeline.from_pretrained(ROOT / "assets/lab/emoji")
    drawn = sample(emoji, ["angry face", "broccoli", "black circle"], steps=10, guidance=2.5, seed=0)
    face, broccoli, black = (np.asarray(picture, dtype=float)[16:48, 16:48].mean((0, 1)) for picture in drawn)
    assert face[0] > face[1] > face[2] + 20, "yellow"
    assert broccoli.argmax() == 1, "green"
    assert black.max() < 90


def test_held_out_emoji_are_not_among_the_trained_ones():
    train, held_out = (
        (ROOT / f"assets/lab/emoji/prompts_{split}.txt").read_text().splitlines()
        for split in ("train", "heldout")
    )
    assert (len(set(train)), len(set(held_out))) == (1518, 80)
    assert not set(train) & set(held_out)


def test_the_shipped_teachers_fit_the_student_and_are_no_base_models():
    from mmalign.config import load_config
    from mmalign.pipelines import load
    from mmalign.sde import Noise

    config = load_config(ROOT / "assets/recipes/lab_distill.yaml")
    policy = load(config.policy, Noise())
    fresh = [p.detach().clone() for p in policy.module.parameters() if p.requires_grad]
    seen = []
    for folder in config.algorithm.teachers.values():
        policy.load(ROOT / folder)
        taught = [p.detach().clone() for p in policy.module.parameters() if p.requires_grad]
        assert any((a - b).abs().max() > 1e-3 for a, b in zip(taught, fresh, strict=True))
        seen.append(taught)
    assert not all(map(torch.equal, *seen))


def test_every_trained_prompt_has_a_teacher_that_the_recipe_knows():
    from mmalign.config import load_config
    from mmalign.data import read_prompts
    from mmalign.lab.prompts import teacher_of, train_prompts

    teachers = load_config(ROOT / "assets/recipes/lab_distill.yaml").algorithm.teachers
    prompts = read_prompts(ROOT / "assets/lab/prompts/train_taught.jsonl")
    assert [prompt.text for prompt in prompts] == train_prompts()
    assert all(prompt.extra["teacher"] == teacher_of(prompt.text) for prompt in prompts)
    assert {prompt.extra["teacher"] for prompt in prompts} == set(teachers)
    for name in teachers:
        own = (ROOT / f"assets/lab/prompts/heldout_{name}.txt").read_text().splitlines()
        assert own == [prompt for prompt in held_out_prompts() if teacher_of(prompt) == name]
