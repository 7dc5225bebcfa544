"""Clips in which a subject stays itself, or not, and their labels."""

import random

import numpy as np
import pytest

from mmalign.lab.clip_verifier import score_clip
from mmalign.lab.clips import parse_clip
from mmalign.lab.identity_clips import KINDS, draw_identity_clip, draw_identity_clips, reference_picture
from mmalign.lab.scenes import BACKGROUND

GROUND = np.array(BACKGROUND)


def drawn(kind: str, count: int = 12, split: str = "train"):
    rng = random.Random(f"{kind} {split}")
    return [draw_identity_clip(rng, kind, split) for _ in range(count)]


def shows(clip, frame: int) -> np.ndarray:
    """The color in the middle of the box of a frame, NaN where there is none."""
    box = clip.boxes[frame]
    if box is None:
        return np.full(3, np.nan)
    side = clip.frames.shape[1]
    left, top, right, bottom = (int(side * edge) for edge in box)
    inside = clip.frames[frame, top : bottom + 1, left : right + 1].reshape(-1, 3).astype(float)
    return inside[np.abs(inside - GROUND).sum(1).argmax()]


def test_a_kept_clip_is_what_its_prompt_asks_for():
    for clip in drawn("kept"):
        assert clip.kept
        assert score_clip(clip.frames, parse_clip(clip.prompt)).strict
        assert all(clip.boxes)


def test_the_reference_is_the_first_thing_of_the_prompt():
    for clip in drawn("swapped"):
        _, color, shape, *_ = clip.prompt.split()
        assert np.array_equal(clip.reference, reference_picture(color, shape))


def test_of_another_subject_the_prompt_tells_and_not_the_reference():
    for clip in drawn("another"):
        assert not clip.kept
        assert score_clip(clip.frames, parse_clip(clip.prompt)).strict
        _, color, shape, *_ = clip.prompt.split()
        assert not np.array_equal(clip.reference, reference_picture(color, shape))


@pytest.mark.parametrize("kind", ["swapped", "vanished"])
def test_other_clips_are_not_what_their_prompts_ask_for(kind):
    for clip in drawn(kind):
        assert not clip.kept
        assert not score_clip(clip.frames, parse_clip(clip.prompt)).strict


def test_what_vanishes_is_there_first_and_does_not_come_back():
    for clip in drawn("vanished"):
        there = [box is not None for box in clip.boxes]
        assert there[:2] == [True, True]
        assert not there[-1]
        assert sorted(there, reverse=True) == there


def test_a_swap_is_at_one_moment():
    """Frames are those of the right subject or of another; the change is one, from or to the right one."""
    kinds = set()
    for clip in drawn("swapped", 40):
        same = [bool(np.abs(shows(clip, f) - shows(clip, 0)).max() < 60) for f in range(9)]
        if all(same):
            continue  # only the shape was swapped
        assert sorted(same, reverse=True) == same
        rgb = clip.reference[16, 16].astype(float)
        kinds.add(bool(np.abs(rgb - shows(clip, 0)).max() < 60))
    assert kinds == {True, False}


def test_boxes_hold_the_things():
    for clip in drawn("kept"):
        if " and " in clip.prompt:
            continue
        for frame, box in zip(clip.frames, clip.boxes, strict=True):
            rows, columns = np.nonzero((np.abs(frame.astype(int) - GROUND) > 40).any(-1))
            left, top, right, bottom = (32 * edge for edge in box)
            assert left - 1 <= columns.min()
            assert columns.max() <= right + 1
            assert top - 1 <= rows.min()
            assert rows.max() <= bottom + 1


def test_half_are_kept_splits_are_kept_apart_and_seeds_repeat():
    clips = draw_identity_clips(24, "heldout", 3)
    assert [sum(clip.kind == kind for clip in clips) for kind in KINDS] == [12, 4, 4, 4]
    named = [clip for clip in clips if clip.kind != "another"]
    assert all(parse_clip(clip.prompt).held_out for clip in named)
    again = draw_identity_clips(24, "heldout", 3)
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(clips, again, strict=True))
    train = [clip for clip in draw_identity_clips(8, "train", 3) if clip.kind != "another"]
    assert not any(parse_clip(clip.prompt).held_out for clip in train)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of kept, swapped, vanished, another"):
        draw_identity_clip(random.Random(0), "lost")
