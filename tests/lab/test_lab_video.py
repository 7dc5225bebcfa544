"""The lab's video model: plain diffusers draws what our policy draws, and most of it moves as asked."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from toys import initial

from mmalign.contracts import PolicySettings
from mmalign.lab.clips import FRAMES, SIDE
from mmalign.lab.pretrain_video import scores
from mmalign.pipelines import load
from mmalign.sde import Noise
from mmalign.testing import prompts_of

FOLDER = Path(__file__).parents[2] / "assets/lab/video"
HELD_OUT = FOLDER.parent / "prompts/video_heldout.txt"


@pytest.fixture(scope="module")
def policy():
    size = {"height": SIDE, "width": SIDE, "frames": FRAMES}
    return load(PolicySettings(str(FOLDER), max_sequence_length=16, **size), Noise())


@pytest.mark.slow
def test_plain_diffusers_draws_the_same(policy):
    from diffusers import WanPipeline

    texts = HELD_OUT.read_text().splitlines()[:2]
    prompts = prompts_of(texts, 1)
    ours = policy.images(prompts, 4, (0, "test"))
    pipeline = WanPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        texts,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=16,
        latents=initial(prompts, policy.shape, (0, "test")),
        output_type="pt",
    ).frames
    assert ours.shape == (2, FRAMES, 3, SIDE, SIDE)
    assert_close(ours, torch.as_tensor(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_it_moves_more_often_than_not_as_it_is_asked_and_not_always(policy):
    texts = HELD_OUT.read_text().splitlines()[:40]
    found = scores(policy.images(prompts_of(texts, 1), 8, (0, "quality")), texts)
    assert 0.5 < found["direction"] < 0.85
    assert found["static"] < 0.15
    assert found["strict"] < 0.3
