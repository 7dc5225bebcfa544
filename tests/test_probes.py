"""Probes of rewards: what they change, what they find, and that they are the same every time."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from toys import names

from mmalign.cli import main
from mmalign.probes import PICTURES, TEXTS, changed, compared, probe, probe_all
from mmalign.records import Outcome, RewardSignal

CAPTION = "A red cat sits on a mat. It looks left."


def pictures(count: int = 6, size: int = 24) -> Outcome:
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=draw) * 0.5 + 0.25
    media = torch.nn.functional.interpolate(coarse, [size, size], mode="bilinear")
    return Outcome(names(1, count), media)


def texts() -> Outcome:
    return Outcome(names(1, 2), [CAPTION, "Two dogs."])


@dataclass
class Saturation:
    """A reward that can be hacked: how far colors are from gray."""

    name: str = "saturation"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, (outcome.media.amax(1) - outcome.media.amin(1)).mean((1, 2))[:, None])


@dataclass
class Brightness:
    """A reward that no change of colors at one brightness moves."""

    name: str = "brightness"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        luma = outcome.media.new_tensor((0.299, 0.587, 0.114))[:, None, None]
        return RewardSignal(self.name, (outcome.media * luma).sum(1).mean((1, 2))[:, None].round(decimals=4))


@dataclass
class Length:
    name: str = "length"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, torch.tensor([[float(len(text))] for text in outcome.media]))


@pytest.mark.parametrize("name", PICTURES)
def test_nothing_changed_gains_nothing_and_a_tie_is_no_win(name):
    found = probe(Saturation(), pictures(), name, strength=0.0)
    assert (found.gain, found.win, found.samples, found.suspicious) == (0.0, 0.0, 6, False)


def test_gain_and_win_are_their_formulas():
    before = torch.tensor([1.0, 3.0, 5.0, math.nan]).double()
    after = torch.tensor([2.0, 3.0, 4.5, 9.0]).double()
    found = compared("r", "contrast", 1.0, before, after)
    assert found.gain == pytest.approx((0.5 / 3) / math.sqrt(8 / 3))
    assert found.win == pytest.approx(1 / 3)
    assert found.samples == 3
    assert compared("r", "x", 1.0, torch.ones(2), torch.ones(2)).gain == 0
    assert compared("r", "x", 1.0, torch.ones(2), torch.zeros(2)).gain == -math.inf
    assert compared("r", "x", 1.0, torch.full((2,), math.nan), torch.ones(2)).samples == 0


def test_a_reward_that_can_be_hacked_is_found_out_and_one_that_cannot_is_not():
    assert probe(Saturation(), pictures(), "saturation").suspicious
    sound = probe(Brightness(), pictures(), "saturation")
    assert not sound.suspicious
    assert abs(sound.gain) < 0.01
    assert probe(Length(), texts(), "padding").suspicious


def test_more_strength_is_more_gain():
    gains = [probe(Saturation(), pictures(), "saturation", s).gain for s in (0.0, 0.25, 0.5, 1.0)]
    assert gains == sorted(set(gains))


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_picture_has_its_shape_range_and_type_every_time(name, dtype):
    outcome = pictures()
    outcome = replace(outcome, media=outcome.media.to(dtype))
    kept = outcome.media.clone()
    one, two = (changed(outcome, name).media for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(outcome.media, kept)
    assert (one.shape, one.dtype) == (kept.shape, kept.dtype)
    assert one.min() >= 0
    assert one.max() <= 1
    assert not torch.equal(one, kept)


@pytest.mark.parametrize("name", PICTURES)
def test_frames_of_a_video_are_changed_as_pictures(name):
    one = pictures()
    video = replace(one, media=one.media[:, None].repeat(1, 3, 1, 1, 1))
    assert_close(changed(video, name).media, changed(one, name).media[:, None].repeat(1, 3, 1, 1, 1))


@pytest.mark.parametrize("name", TEXTS)
def test_a_rewritten_text_says_no_more_of_the_picture(name):
    outcome = texts()
    found = changed(outcome, name).media
    assert found == changed(outcome, name).media
    assert outcome.media[0] == CAPTION
    assert found[0] != CAPTION
    assert "red cat sits on a mat" in found[0]


def test_the_prompt_is_printed_at_the_foot_and_nowhere_else():
    outcome = pictures(2, size=64)
    other = replace(outcome, prompts=replace(outcome.prompts, text=["a long prompt", "another"]))
    one, two = changed(outcome, "print").media, changed(other, "print").media
    assert torch.equal(one[:, :, :50], outcome.media[:, :, :50])
    assert not torch.equal(one, two)


def test_every_probe_is_asked_against_one_look_at_the_samples():
    asked = []

    class Counted(Saturation):
        def __call__(self, outcome: Outcome) -> RewardSignal:
            asked.append(len(outcome.media))
            return super().__call__(outcome)

    found = probe_all(Counted(), pictures())
    assert [one.probe for one in found] == list(PICTURES)
    assert asked == [6] * (len(PICTURES) + 1)
    assert [one.probe for one in probe_all(Length(), texts())] == list(TEXTS)


def test_what_is_no_probe_is_refused():
    with pytest.raises(
        ValueError, match="there is no probe 'praise' of these samples; it is one of contrast"
    ):
        changed(pictures(), "praise")
    with pytest.raises(ValueError, match=r"strength of a probe must lie in \[0, 1\], got 2"):
        changed(pictures(), "contrast", 2)


def test_the_command_probes_a_folder(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, picture in enumerate(pictures(size=32).media):
        pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"a_red_circle_{i}.png")
    out = tmp_path / "probes.json"
    given = ["probe", str(folder), "--rewards", "colorfulness", "contrast", "--json", str(out)]
    assert main([*given, "--probes", "saturation", "vignette"]) == 0
    rows = json.loads(out.read_text())
    assert [(row["reward"], row["probe"]) for row in rows] == [
        (reward, name) for reward in ("colorfulness", "contrast") for name in ("saturation", "vignette")
    ]
    assert rows[0]["suspicious"]
    assert "saturation" in capsys.readouterr().out
    assert main([*given, "--probes", "magic"]) == 2
    assert "there is no probe 'magic'" in capsys.readouterr().err
    for command in ("probe", "evaluate"):
        assert main([command, str(folder), "--rewards", "contrast", "lab_pairwise"]) == 2
        assert "'lab_pairwise' compares pictures of one prompt" in capsys.readouterr().err
