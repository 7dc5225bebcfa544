"""The size of a real JPEG file."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.lab import compose, parse, render
from mmalign.rewardmodels import load
from mmalign.testing import check_reward


def noise(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("quality", [95, 40])
def test_a_verdict_is_the_size_of_the_file_on_disk_in_kilobytes(quality, tmp_path, outcome_of):
    pixels = noise(2, 3, 40, 56)
    reward = load("jpeg_incompressibility", quality=quality)
    found = reward(outcome_of(pixels / 255, ["a", "b"])).values
    for picture, kilobytes in zip(pixels, found[:, 0].tolist(), strict=True):
        file = tmp_path / "picture.jpg"
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, quality=quality)
        assert kilobytes == pytest.approx(file.stat().st_size / 1000)


def test_noise_is_large_and_flat_is_small_and_the_signs_are_opposite(outcome_of):
    media = torch.stack([noise(3, 64, 64) / 255, torch.full((3, 64, 64), 0.5)])
    large, flat = load("jpeg_incompressibility")(outcome_of(media, ["a", "b"])).values[:, 0]
    assert large > 5 * flat > 0
    opposite = load("jpeg_compressibility")(outcome_of(media, ["a", "b"])).values[:, 0]
    assert opposite.tolist() == [-large, -flat]


def test_a_picture_that_was_compressed_more_is_smaller_at_every_rung(outcome_of):
    """Saved at falling quality, read back, and judged at one quality."""
    drawn = render(compose(parse("a red circle left of a blue star"), random.Random(1)), 64)
    grain = np.random.default_rng(0).integers(-20, 21, drawn.shape)
    picture, rungs = Image.fromarray((drawn + grain).clip(0, 255).astype(np.uint8)), []
    for quality in (95, 75, 50, 25, 10, 5):
        picture.save(file := io.BytesIO(), "JPEG", quality=quality)
        rungs.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255)
    sizes = load("jpeg_incompressibility")(outcome_of(torch.stack(rungs), list("abcdef"))).values[:, 0]
    assert (sizes.diff() < 0).all()


def test_a_video_counts_as_the_mean_of_its_frames(outcome_of):
    video = noise(2, 3, 3, 32, 32) / 255
    video[0, 1] = 0
    reward = load("jpeg_incompressibility")
    single = reward(outcome_of(video.flatten(0, 1), list("abcdef"))).values
    whole = reward(outcome_of(video, ["a", "b"])).values
    assert whole[:, 0].tolist() == pytest.approx(single.reshape(2, 3).mean(1).tolist())


@pytest.mark.parametrize("name", ["jpeg_compressibility", "jpeg_incompressibility"])
def test_it_keeps_the_contract(name, outcome_of):
    check_reward(load(name), outcome_of(noise(3, 3, 32, 32) / 255, ["a", "b", "c"]))
    check_reward(load(name), outcome_of(noise(3, 2, 3, 32, 32) / 255, ["a", "b", "c"]))
