"""CLIPScore and RefCLIPScore of captions, on the lab's CLIP and on its own arithmetic."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmalign.lab import compose, parse, render
from mmalign.lab.clip import CLIP
from mmalign.records import Outcome
from mmalign.rewardmodels import load
from mmalign.testing import check_reward, prompts_of

LAB_CLIP = Path(__file__).resolve().parents[2] / "assets/lab/clip"
SHOWN = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder, files = tmp_path_factory.mktemp("shown"), []
    for number, prompt in enumerate(SHOWN):
        files.append(str(folder / f"{number}.png"))
        Image.fromarray(render(compose(parse(prompt), random.Random(number)))).save(files[-1])
    return files


def outcome(files: list[str], captions: list[str], **extra) -> Outcome:
    told = [{"image": file, **extra} for file in files]
    return Outcome(prompts_of(["describe"] * len(files), 1, told), captions)


def embedded(files: list[str], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    clip = CLIP.load(LAB_CLIP)
    pixels = [torch.tensor(list(Image.open(f).convert("RGB").tobytes())).reshape(64, 64, 3) for f in files]
    images = torch.stack(pixels).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        return clip.encode_images(images), clip.encode_ids(clip.ids(texts))


def test_both_scores_by_hand(pictures):
    reference = "a green star"
    reward = load("caption_clip_score", model=str(LAB_CLIP), before="", references=True)
    signal = reward(outcome(pictures, SHOWN, reference=reference))
    seen, read = embedded(pictures, [*SHOWN, reference])
    for i in range(2):
        own = 2.5 * max(0.0, float(seen[i] @ read[i]))
        against = max(0.0, float(read[i] @ read[2]))
        assert signal.details[i]["clip_score"] == pytest.approx(own, abs=1e-4)
        harmonic = 2 / (1 / own + 1 / against) if own and against else 0.0
        assert float(signal.values[i]) == pytest.approx(harmonic, abs=1e-4)


def test_of_several_references_the_nearest_counts(pictures):
    reward = load("caption_clip_score", model=str(LAB_CLIP), before="", references=True)
    one = reward(outcome(pictures, SHOWN, references=["a green star", SHOWN[0]]))
    best = reward(outcome(pictures, SHOWN, references=[SHOWN[0]]))
    assert float(one.values[0]) == pytest.approx(float(best.values[0]), abs=1e-5)


def test_a_caption_that_fits_is_rated_above_one_that_does_not(pictures):
    reward = load("caption_clip_score", model=str(LAB_CLIP), before="")
    right, wrong = (reward(outcome(pictures, texts)).values for texts in (SHOWN, SHOWN[::-1]))
    assert (right > wrong + 0.5).all()
    check_reward(reward, outcome(pictures, SHOWN))


def test_what_is_not_known_has_no_verdict(pictures, tmp_path):
    reward = load("caption_clip_score", model=str(LAB_CLIP), references=True)
    signal = reward(outcome(pictures, SHOWN))
    assert not signal.valid.any()
    assert "no reference" in signal.details[0]["missing"]
    plain = load("caption_clip_score", model=str(LAB_CLIP))
    signal = plain(outcome([str(tmp_path / "none.png"), pictures[1]], SHOWN))
    assert signal.valid[:, 0].tolist() == [False, True]
    assert "cannot be read as a picture" in signal.details[0]["missing"]
