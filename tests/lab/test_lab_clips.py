"""Scenes that move: prompts are tasks, clips show what is asked, and the verifier sees what is wrong."""

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest

from mmalign.lab.clip_verifier import judge_clip, read_clip, score_clip
from mmalign.lab.clips import (
    CATEGORIES,
    FRAMES,
    MIX,
    Actor,
    Clip,
    ClipTask,
    compose_clip,
    list_clip_prompts,
    parse_clip,
    render_clip,
    sample_clip_task,
    write_clip_prompt,
)
from mmalign.lab.scenes import CANVAS, Scene

LENGTHS = [(9, 32), (8, 32), (12, 32), (16, 32), (9, 64), (16, 64)]  # frames, and pixels along a side


def drawn(count, category=None, split="train", seed=0, frames=FRAMES):
    rng = random.Random(seed)
    tasks = [sample_clip_task(rng, category, split) for _ in range(count)]
    return [(task, compose_clip(task, rng, frames)) for task in tasks]


def changed(clip, change):
    """The clip with `change(frame number, thing)` in place of each thing; None leaves it out."""
    rows = [[change(f, thing) for thing in scene.things] for f, scene in enumerate(clip.frames)]
    return Clip(tuple(Scene(tuple(thing for thing in row if thing)) for row in rows))


def soft(clip, task):
    return score_clip(render_clip(clip), task)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_prompt_is_its_task_and_splits_have_nothing_in_common(split):
    for category in CATEGORIES:
        for task, _ in drawn(30, category, split):
            assert parse_clip(write_clip_prompt(task)) == task
            assert task.category == category
            assert task.held_out == (split == "heldout")


def test_sentences_that_are_not_of_clips_are_refused():
    said = (
        "",
        "a red circle",
        "a red circle moves",
        "a red circle moves sideways",
        "a red circle moves left fast",
        "a red circle collide",
        "a red circle turns red",
        "a mauve circle stays",
        "a red circle and a blue square collide twice",
        "a red circle stays and a blue square stays and a green star stays",
    )
    for prompt in said:
        with pytest.raises(ValueError, match="parse_clip"):
            parse_clip(prompt)


@pytest.mark.parametrize("frames", sorted({frames for frames, _ in LENGTHS}))
def test_things_stay_inside_and_apart(frames):
    for _, clip in drawn(200, frames=frames):
        assert len(clip.frames) == frames
        for scene in clip.frames:
            for thing in scene.things:
                assert thing.extent <= min(thing.x, thing.y)
                assert max(thing.x, thing.y) <= CANVAS - thing.extent


@pytest.mark.parametrize(
    ("frames", "side", "noise"), [(9, 32, 0.0), *((*length, 0.04) for length in LENGTHS)]
)
def test_a_clip_that_shows_what_is_asked_is_right_in_every_frame(frames, side, noise):
    rng = np.random.default_rng(0)
    for category in CATEGORIES:
        for task, clip in drawn(12 if (frames, side) == (FRAMES, 32) else 6, category, frames=frames):
            pixels = render_clip(clip, side).transpose(0, 3, 1, 2) / 255
            verdict = score_clip((pixels + noise * rng.normal(size=pixels.shape)).clip(0, 1), task)
            assert verdict.strict, write_clip_prompt(task)
            assert verdict.soft == 1
            assert not verdict.static
            assert (verdict.direction is None) == (category in ("rest", "event", "collision"))


@pytest.mark.parametrize("frames", [8, 12, 16])
def test_clips_of_any_length_show_the_same_in_more_or_fewer_frames(frames):
    for category in ("motion", "speed"):
        (task, clip), (_, short) = (
            drawn(1, category, seed=3, frames=length)[0] for length in (frames, FRAMES)
        )
        for place in (0, -1):
            assert clip.frames[place].things[0].x == pytest.approx(short.frames[place].things[0].x)
            assert clip.frames[place].things[0].y == pytest.approx(short.frames[place].things[0].y)
        other = "slowly" if task.actors[0].speed == "quickly" else "quickly"
        if task.actors[0].speed:
            wrong = soft(clip, ClipTask((replace(task.actors[0], speed=other),)))
            assert max(wrong.frames) == 0.75
    task, clip = drawn(1, "motion", frames=frames)[0]
    assert max(soft(Clip(clip.frames[::-1]), task).frames) == 0.5


def test_clips_of_9_frames_are_those_that_the_included_models_learned_from():
    told = repr([clip for category in CATEGORIES for _, clip in drawn(40, category)])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "dabbfcaed19da652"


def test_clips_too_short_to_show_anything_are_refused():
    task = ClipTask((Actor("red", "circle", "appears"),))
    assert len(compose_clip(task, random.Random(0), 4).frames) == 4
    with pytest.raises(ValueError, match="at least 4 frames, got 3"):
        compose_clip(task, random.Random(0), 3)


def test_the_wrong_way_is_wrong_in_every_frame_and_backwards_is_the_wrong_way():
    for task, clip in drawn(12, "motion"):
        verdict = soft(Clip(clip.frames[::-1]), task)
        assert verdict.direction == 0
        assert max(verdict.frames) == 0.5  # everything is there, and does not do what was asked
        other = replace(
            task.actors[0],
            way={"left": "up", "right": "down", "up": "left", "down": "right"}[task.actors[0].way],
        )
        assert soft(clip, ClipTask((other,))).direction < 0.05


def test_a_frozen_clip_is_static_and_one_that_is_to_rest_is_not():
    for task, clip in drawn(8, "motion"):
        frozen = soft(Clip(clip.frames[:1] * FRAMES), task)
        assert frozen.static
        assert frozen.direction == 0
        assert frozen.soft == 0.5
    assert not any(soft(clip, task).static for task, clip in drawn(4, "rest"))


def test_one_wrong_frame_is_that_frame():
    for task, clip in drawn(8, "motion"):
        verdict = soft(changed(clip, lambda f, thing: None if f == 4 else thing), task)
        assert verdict.frames[4] == 0
        assert [f for f, value in enumerate(verdict.frames) if value < 1] == [4, 5]  # no step leads to 5
        extra = replace(
            clip.frames[6].things[0],
            x=CANVAS - clip.frames[6].things[0].x,
            y=CANVAS - clip.frames[6].things[0].y,
        )
        if abs(extra.x - clip.frames[6].things[0].x) + abs(extra.y - clip.frames[6].things[0].y) > 30:
            both = list(clip.frames)
            both[6] = Scene((*both[6].things, extra))
            verdict = soft(Clip(tuple(both)), task)
            assert verdict.extras == (0,) * 6 + (1, 0, 0)
            assert verdict.frames[6] == pytest.approx(0.25)


def test_speed_is_judged():
    for task, clip in drawn(12, "speed"):
        actor = task.actors[0]
        other = replace(actor, speed="quickly" if actor.speed == "slowly" else "slowly")
        verdict = soft(clip, ClipTask((other,)))
        assert verdict.direction == 1
        assert max(verdict.frames) == 0.75


def test_events_that_do_not_happen():
    task = ClipTask((Actor("red", "circle", "appears"),))
    clip = compose_clip(task, random.Random(0))
    assert soft(clip, task).strict
    away = soft(Clip(clip.frames[::-1]), task)
    assert away.soft < 0.75
    always = soft(Clip(clip.frames[-1:] * FRAMES), task)
    assert always.frames[0] == 0
    assert not always.strict
    turns = ClipTask((Actor("red", "circle", "turns", turned="blue"),))
    assert not soft(clip, turns).strict
    assert soft(compose_clip(turns, random.Random(0)), turns).strict


def test_things_that_only_meet_do_not_collide():
    for task, clip in drawn(4, "collision"):
        half = clip.frames[: FRAMES // 2 + 1]
        stuck = Clip(half + half[-1:] * (FRAMES - len(half)))
        assert soft(stuck, task).soft < 0.9
        apart = Clip(clip.frames[:1] * FRAMES)
        assert soft(apart, task).soft <= 0.5


def test_what_resembles_nothing_can_meet_as_well():
    task, clip = drawn(1, "collision")[0]
    blobs = [Scene(tuple(replace(thing, shape="blob") for thing in scene.things)) for scene in clip.frames]
    verdict = judge_clip(blobs, task)
    assert verdict.soft == pytest.approx(0.75)  # of the right color, and they do what is asked


def test_another_thing_in_its_place_is_half_right():
    for task, clip in drawn(6, "motion"):
        other = changed(
            clip, lambda f, thing: replace(thing, color="cyan" if thing.color != "cyan" else "red")
        )
        assert soft(other, task).soft == pytest.approx(0.75)


@pytest.mark.slow
def test_prompts_are_different_and_of_their_split():
    prompts = list_clip_prompts(60, "heldout")
    assert len(set(prompts)) == 60
    assert all(parse_clip(prompt).held_out for prompt in prompts)
    assert {parse_clip(prompt).category for prompt in prompts} == set(MIX)
    with pytest.raises(ValueError, match="has only"):
        list_clip_prompts(1000, "train", categories=("rest",))


def test_clips_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="a clip is"):
        read_clip(np.zeros((3, 32, 32)))
    with pytest.raises(ValueError, match="side that divides 64"):
        read_clip(np.zeros((2, 3, 24, 24)))
    assert (
        judge_clip(read_clip(np.full((9, 3, 32, 32), 0.9)), parse_clip("a red circle moves left")).soft == 0
    )
