"""Rewards of videos: what moves and how, who stays who they are, and judges of pictures on frames."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmalign.lab.clips import Clip, compose_clip, render_clip, sample_clip_task, write_clip_prompt
from mmalign.lab.scenes import COLORS, Scene
from mmalign.records import Masks, Outcome, Prompts, RewardSignal, Unit
from mmalign.rewardmodels import load
from mmalign.rewardmodels.framewise import Framewise, TemporalConsistency, consistency
from mmalign.rewardmodels.identity import Identity, confusion
from mmalign.rewardmodels.lab_video import LabVideo
from mmalign.rewardmodels.motion import Motion, optical_flow, way_of
from mmalign.rewardmodels.trackers import TemplateTracker, Track
from mmalign.testing import check_reward

TERMS = ("presence", "identity", "cycle", "size", "gate")


def video(clip: Clip) -> torch.Tensor:
    return torch.from_numpy(render_clip(clip)).permute(0, 3, 1, 2).float() / 255


def outcome(videos, texts=None, extra=None) -> Outcome:
    count = len(videos)
    names = torch.arange(count)
    texts = texts or ["a clip"] * count
    return Outcome(Prompts(texts, names, 0 * names, extra or [{}] * count), torch.stack(list(videos)))


def clips(count, categories=("motion", "speed"), seed=0):
    rng = random.Random(seed)
    tasks = [sample_clip_task(rng, rng.choice(categories)) for _ in range(count)]
    return [(task, compose_clip(task, rng)) for task in tasks]


def changed(clip, change):
    rows = [[change(f, thing) for thing in scene.things] for f, scene in enumerate(clip.frames)]
    return Clip(tuple(Scene(tuple(thing for thing in row if thing)) for row in rows))


REWARDS = {
    "lab_video": LabVideo(),
    "lab_video by frame": LabVideo(grain="frame"),
    "direction": Motion("direction"),
    "amount by frame": Motion("amount", "frame"),
    "smoothness": Motion("smoothness"),
    "identity": Identity(),
    "identity by frame": Identity(grain="frame"),
    "framewise": Framewise("contrast"),
}


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS.keys())
def test_it_keeps_the_contract(reward):
    found = clips(4)
    check_reward(
        reward, outcome([video(clip) for _, clip in found], [write_clip_prompt(task) for task, _ in found])
    )


# ---- the lab


def test_the_lab_judges_clips_whole_or_by_frame():
    found = clips(2, ("motion",)) + clips(4, ("event",))
    shown = [video(clip) for _, clip in found]
    shown[0][4] = shown[0][4, :, :1, :1].clone()  # nothing but ground
    given = outcome(shown, [write_clip_prompt(task) for task, _ in found])
    whole, frames = LabVideo()(given), LabVideo(grain="frame")(given)
    assert frames.unit is Unit.FRAME
    assert frames.values.shape == (6, 9)
    assert_close(frames.values.mean(1, keepdim=True), whole.values)
    assert frames.values[0, 4] == 0
    assert frames.where.mask[0, 4, :, 0, 0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    strict = LabVideo("strict")(given)
    assert strict.values[:, 0].tolist() == [0, 1, 1, 1, 1, 1]
    way = LabVideo("direction")(given)
    assert way.valid[:, 0].tolist() == [task.actors[0].does == "moves" for task, _ in found]


def test_a_prompt_of_another_world_has_no_verdict():
    (_, clip), *_ = clips(1)
    said = LabVideo()(outcome([video(clip)], ["a dog on a beach"]))
    assert not said.valid.any()
    assert "parse_clip" in said.details[0]["missing"]
    for settings, match in (
        ({"measure": "good"}, "measure"),
        ({"grain": "pixel"}, "grain"),
        ({"measure": "strict", "grain": "frame"}, "goes with"),
    ):
        with pytest.raises(ValueError, match=match):
            LabVideo(**settings)


# ---- motion


def test_flow_is_the_shift_of_a_picture():
    generator = torch.Generator().manual_seed(0)
    texture = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 94, 94, generator=generator), 11, 1)
    shifts = [(0, 0), (1, 0), (0, -2), (3, 2), (-6, 5)]
    first = torch.cat([texture[..., 10:74, 10:74]] * len(shifts))
    second = torch.cat([texture[..., 10 - y : 74 - y, 10 - x : 74 - x] for x, y in shifts])
    flow, sure = optical_flow(first, second)
    inner = (slice(None), slice(8, -8), slice(8, -8))
    for i, shift in enumerate(shifts):
        assert_close(
            flow[i][inner].flatten(1).median(1).values, torch.tensor(shift).float(), atol=0.25, rtol=0
        )
    assert (sure[0] > 0).float().mean() > 0.9
    assert not optical_flow(torch.full((1, 1, 32, 32), 0.5), torch.full((1, 1, 32, 32), 0.5))[0].any()


def test_motion_of_clips_is_what_was_drawn():
    found = clips(12)
    given = outcome([video(clip) for _, clip in found], [write_clip_prompt(task) for task, _ in found])
    assert (Motion("direction")(given).values > 0.95).all()
    said = Motion("amount")(given)
    for detail, (_, clip) in zip(said.details, found, strict=True):
        a, b = clip.frames[0].things[0], clip.frames[1].things[0]
        true = ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5 / (64 * 2**0.5)
        assert detail["motion"] == pytest.approx(true, rel=0.2)
        assert not detail["static"]
    assert (Motion("smoothness")(given).values > 0.85).all()
    back = Outcome(given.prompts, given.media.flip(1))
    assert (Motion("direction")(back).values < -0.95).all()


def test_a_frozen_video_is_static_and_earns_nothing():
    found = clips(4)
    given = outcome(
        [video(clip)[:1].expand(9, -1, -1, -1) for _, clip in found], [write_clip_prompt(t) for t, _ in found]
    )
    for measure in ("amount", "smoothness", "direction"):
        said = Motion(measure)(given)
        assert not said.values.any()
        assert all(detail["static"] for detail in said.details)


def test_jerky_motion_is_less_smooth_and_the_frame_says_where():
    (_, clip), *_ = clips(1, ("speed",), seed=3)
    jerk = changed(clip, lambda f, thing: replace(clip.frames[max(0, f - (f % 2))].things[0]))
    even, rough = (Motion("smoothness")(outcome([video(c)])).values.item() for c in (clip, jerk))
    assert rough < even - 0.3
    by_frame = Motion("amount", "frame")(outcome([video(jerk)])).values[0]
    assert (by_frame[1::2] < 0.1).all()
    assert (by_frame[2::2] > 0.5).all()


def test_the_way_is_read_off_the_prompt():
    assert way_of("a red circle moves left", {}).tolist() == [-1, 0]
    assert way_of("zoom in", {"direction": [0, 2]}).tolist() == [0, 2]
    assert way_of("a kite", {}).isnan().all()
    assert way_of("first left, then right", {}).isnan().all()
    found = Motion("direction")(outcome([video(clips(1)[0][1])], ["a kite"]))
    assert not found.valid.any()


def test_settings_of_motion_are_checked():
    for settings, match in (
        ({"measure": "much"}, "measure"),
        ({"enough": 0.001}, "static < enough"),
        ({"side": 8}, "side"),
    ):
        with pytest.raises(ValueError, match=match):
            Motion(**settings)
    with pytest.raises(ValueError, match="one frame does not move"):
        Motion()(outcome([torch.rand(1, 3, 16, 16)]))


# ---- identity


def planted(kind: str, clip: Clip, rng: random.Random) -> Clip:
    thing = clip.frames[0].things[0]
    if kind == "freeze":
        return Clip(clip.frames[:1] * len(clip.frames))
    if kind == "vanish":
        return changed(clip, lambda f, one: one if f < 5 else None)
    if kind == "swap":
        color = rng.choice([c for c in COLORS if c != thing.color])
        return changed(clip, lambda f, one: replace(one, color=color) if f >= 4 else one)
    across = [26 if place < 32 else -26 for place in (thing.x, thing.y)]

    def leap(f, one):
        x, y = (min(max(p + d, 14), 50) for p, d in zip((one.x, one.y), across, strict=True))
        return replace(one, x=x, y=y) if f >= 4 else one

    return changed(clip, leap)


def terms(clip: Clip):
    (found,) = Identity().terms(video(clip), {})
    return np.array([getattr(found, name) for name in TERMS]), found.reward


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize(
    ("kind", "right"),
    [("swap", "identity"), ("vanish", "presence"), ("teleport", "cycle"), ("freeze", "gate")],
)
def test_what_is_planted_lowers_the_right_term(kind, right, seed):
    """In at least 95 of 100 clips; in as many each other term stays within what clips differ by anyway."""
    rng = random.Random(7)
    before, after, lower = [], [], 0
    for _, clip in clips(100, seed=seed):
        was, reward = terms(clip)
        now, less = terms(planted(kind, clip, rng))
        before.append(was)
        after.append(now)
        lower += less < reward - 0.05
    before, after = np.array(before), np.array(after)
    place = TERMS.index(right)
    assert (after[:, place] < before[:, place] - 0.1).sum() >= 95
    assert lower >= 95
    noise = np.quantile(before, 0.99, 0) - np.quantile(before, 0.01, 0)
    for i, name in enumerate(TERMS):
        if i != place:
            moved = np.abs(before[:, i] - after[:, i]) > noise[i]
            assert moved.sum() <= 5, name


def test_a_subject_that_leaps_by_its_own_width_is_not_followed_back():
    """The edge of where it was before lies within reach, and its middle does not."""
    _, clip = clips(8, seed=12)[7]
    (found,) = Identity().terms(video(planted("teleport", clip, random.Random(7))), {})
    assert found.presence == 1
    assert found.cycle == 0


def test_a_moving_thing_stays_who_it_is_and_so_it_does_backwards():
    for _, clip in clips(6):
        now, reward = terms(clip)
        assert reward > 0.85
        back, _ = terms(Clip(clip.frames[::-1]))
        assert_close(torch.tensor(back), torch.tensor(now), atol=0.15, rtol=0)


def test_where_nothing_stands_out_there_is_nobody():
    empty = torch.full((9, 3, 32, 32), 0.9)
    said = Identity()(outcome([empty, video(clips(1)[0][1])]))
    assert said.values[0] == 0
    assert said.details[0]["subjects"] == 0
    assert torch.isfinite(said.values).all()
    assert said.values[1] > 0.85


def test_clips_together_are_clips_one_by_one():
    shown = [video(clip) for _, clip in clips(3)]
    together = Identity()(outcome(shown)).values
    assert torch.equal(together, torch.cat([Identity()(outcome([one])).values for one in shown]))


def test_two_subjects_that_trade_places_are_confused():
    rng = random.Random(1)
    task = sample_clip_task(rng, "two_motions")
    clip = compose_clip(task, rng)
    a, b = (thing for thing in clip.frames[0].things)
    traded = changed(
        clip,
        lambda f, one: (
            one
            if f < 4
            else replace(
                one,
                shape=b.shape if one.shape == a.shape else a.shape,
                color=b.color if one.color == a.color else a.color,
            )
        ),
    )
    honest, mixed = (Identity(subjects=2).terms(video(c), {}) for c in (clip, traded))
    assert len(honest) == len(mixed) == 2
    assert confusion(honest) == 0
    assert confusion(mixed) > 0.05


def test_a_box_names_the_subject():
    rng = random.Random(1)
    clip = compose_clip(sample_clip_task(rng, "two_motions"), rng)
    thing = clip.frames[0].things[1]
    box = [
        (thing.x - thing.extent) / 64,
        (thing.y - thing.extent) / 64,
        (thing.x + thing.extent) / 64,
        (thing.y + thing.extent) / 64,
    ]
    (found,) = Identity(least=0).terms(video(clip), {"box": box})
    assert found.presence == 1
    for bad in ([0, 0, 2, 1], [0.5, 0, 0.2, 1], "left"):
        with pytest.raises(ValueError, match="box"):
            Identity().terms(video(clip), {"box": bad})


def test_of_a_box_the_subject_in_it_is_followed():
    """A frozen clip does not move because its box is wider than what is in it."""
    for _, clip in clips(6):
        thing = clip.frames[0].things[0]
        sides = [place + sign * (thing.extent + 2) for sign in (-1, 1) for place in (thing.x, thing.y)]
        box = {"box": [min(1.0, max(0.0, side / 64)) for side in sides]}
        shown = video(clip)
        boxed, found = (Identity().terms(shown, extra)[0] for extra in (box, {}))
        for name in TERMS:
            assert getattr(boxed, name) == pytest.approx(getattr(found, name), abs=0.15), name
        (frozen,) = Identity().terms(shown[:1].expand(9, -1, -1, -1), box)
        assert frozen.gate == 0


def test_several_references_are_refused_and_not_passed_over():
    rng = random.Random(1)
    clip = compose_clip(sample_clip_task(rng, "two_motions"), rng)
    with pytest.raises(
        ValueError, match=r"identity: it takes one \"reference_image\" a prompt, got \['a.png'"
    ):
        Identity().terms(video(clip), {"reference_image": ["a.png", "b.png"]})


class Still:
    """A tracker of one's own: the subject never leaves its place."""

    def track(self, frames, start, search=True):
        return Track(start.expand(len(frames), -1, -1).clone(), torch.ones(len(frames), dtype=torch.bool))


def test_a_tracker_of_ones_own_fits_the_contract(monkeypatch):
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    reward = Identity(tracker="test_rewards_video:Still")
    (found,) = reward.terms(video(clips(1)[0][1]), {})
    assert found.gate == 0
    assert found.cycle == 1
    with pytest.raises(TypeError, match="has a method track"):
        Identity(tracker="mmalign.rewardmodels.statistics:Contrast")


class Blind:
    """Sees its subject nowhere, or says that it does and shows nothing."""

    def __init__(self, visible: bool) -> None:
        self.visible = visible

    def track(self, frames, start, search=True):
        return Track(
            torch.zeros(len(frames), *start.shape, dtype=torch.bool), torch.full((len(frames),), self.visible)
        )


@pytest.mark.parametrize("visible", [False, True])
@pytest.mark.parametrize("grain", ["sample", "frame"])
def test_a_subject_that_a_tracker_never_sees_is_worth_nothing(visible, grain):
    rng = random.Random(1)
    clip = compose_clip(sample_clip_task(rng, "two_motions"), rng)
    reward = Identity(subjects=2, grain=grain)
    reward._tracker = Blind(visible)
    said = reward(outcome([video(clip)]))
    assert said.details[0]["subjects"] == 2
    assert said.valid.all()
    assert not said.values.any()


def test_a_track_has_its_shapes():
    with pytest.raises(ValueError, match="masks must be bool"):
        Track(torch.zeros(3, 4, 4), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="whether it is visible"):
        Track(torch.zeros(3, 4, 4, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    nobody = TemplateTracker().track(torch.rand(3, 3, 8, 8), torch.zeros(8, 8, dtype=torch.bool))
    assert not nobody.visible.any()


# ---- judges of pictures


def test_every_frame_is_asked_about():
    generator = torch.Generator().manual_seed(0)
    given = outcome(torch.rand(2, 5, 3, 8, 8, generator=generator))
    plain = load("contrast")
    expected = torch.stack(
        [plain(Outcome(given.prompts, given.media[:, f])).values[:, 0] for f in range(5)], 1
    )
    said = Framewise("contrast")(given)
    assert said.name == "contrast"
    assert said.unit is Unit.FRAME
    assert_close(said.values, expected)
    assert_close(Framewise("contrast", grain="sample")(given).values, expected.mean(1, keepdim=True))
    every = Framewise("contrast", every=2)(given).values
    assert_close(every, expected[:, [0, 0, 2, 2, 4]])
    assert isinstance(said.where, Masks)


class Frames:
    """Judges frames already."""

    name = "frames"

    def __call__(self, outcome):
        return RewardSignal(self.name, torch.zeros(len(outcome.media), 2), Unit.FRAME)


def test_what_cannot_be_asked_about_frames_is_said():
    with pytest.raises(ValueError, match="compares pairs"):
        Framewise("lab_pairwise")
    with pytest.raises(ValueError, match="every must be"):
        Framewise("contrast", every=0)


def test_consistency_is_its_formula(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    found = consistency(torch.stack([torch.stack([a, a, a]), torch.stack([a, b, b])]))
    assert_close(found, torch.tensor([[1.0, 1.0], [0.0, 0.5]]))
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False).save_pretrained(tmp_path)
    reward = TemporalConsistency(str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    moving = torch.rand(4, 3, 28, 28, generator=generator)
    given = outcome([moving[:1].expand(4, -1, -1, -1), moving])
    said = reward(given)
    assert_close(said.values[0], torch.ones(1))
    assert said.values[1] < 0.999
    frames = TemporalConsistency(str(tmp_path), grain="frame")(given)
    assert frames.values.shape == (2, 4)
    assert_close(frames.values[:, 1:].mean(1, keepdim=True), said.values)
