"""Pairs of clips, held against the exact verifier of clips, and the captioner that learns to watch them."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmalign.lab.clip_pairs import (
    DIMENSIONS,
    EIGHTH,
    TIES,
    draw_judged,
    draw_pair,
    looked_at,
    reason,
    spoiled,
)
from mmalign.lab.clip_verifier import judge_clip
from mmalign.lab.clips import Actor, ClipTask, parse_clip
from mmalign.lab.pretrain_watcher import MARKS, WatcherPretraining, pretrain_watcher
from mmalign.rewardmodels.descore import answer_of

ROOT = Path(__file__).parents[2]
QUICKLY = ClipTask((Actor("red", "circle", "moves", "right", speed="quickly"),))


def pairs(count: int = 120, split: str = "train"):
    rng = random.Random(f"pairs {split}")
    return [draw_pair(rng, split) for _ in range(count)]


def verdict(judged, prompt: str):
    return judge_clip(judged.clip.frames, parse_clip(prompt))


def test_what_is_without_a_fault_is_what_the_prompt_asks_for_and_what_has_one_is_not():
    for pair in pairs():
        for side in (pair.chosen, pair.rejected):
            assert verdict(side, pair.prompt).strict == (not side.faults)
        if not pair.tie:
            assert not pair.chosen.faults
            assert pair.rejected.faults == {pair.kind}
        else:
            assert pair.chosen.faults == pair.rejected.faults


def test_each_fault_lowers_what_it_is_a_fault_of():
    rng = random.Random(0)
    for fault in DIMENSIONS:
        for _ in range(20):
            found = judge_clip(draw_judged(QUICKLY, [fault], rng).clip.frames, QUICKLY)
            actor = found.actors[0]
            wrong = {
                "appearance": actor.there.max() < 1,
                "direction": found.direction < 0.5,
                "speed": found.direction == 1 and actor.there.min() == 1 and actor.does.mean() < 0.8,
                "identity": actor.there[0] == 1 and actor.there[-1] < 1,
            }
            assert wrong[fault], fault


@pytest.mark.slow
def test_pairs_are_ties_as_often_as_said_and_of_every_kind():
    kinds = Counter(pair.kind for pair in pairs(600))
    assert abs(kinds[""] / 600 - TIES) < 4 * np.sqrt(TIES * (1 - TIES) / 600)
    assert all(kinds[kind] > 40 for kind in DIMENSIONS)


@pytest.mark.slow
def test_held_out_prompts_are_never_trained_on():
    assert not {pair.prompt for pair in pairs(200)} & {pair.prompt for pair in pairs(200, "heldout")}
    assert all(parse_clip(pair.prompt).held_out for pair in pairs(40, "heldout"))


def test_the_reasoning_tells_what_is_there_and_gives_the_verdict_of_each_dimension():
    frames = looked_at(3)
    assert frames == [0, 4, 8]
    for pair in pairs(40):
        for side in (pair.chosen, pair.rejected):
            text = reason(side, frames)
            assert answer_of(text) == side.scores
            told = text.split(":")[0].split(", ")
            for number, words in zip(frames, told, strict=True):
                things = side.clip.frames[number].things
                places = {f"{t.color} {t.shape} {int(t.x // EIGHTH)} {int(t.y // EIGHTH)}" for t in things}
                assert words in places or words == "none"


def test_what_an_actor_does_is_told_as_it_is():
    rng = random.Random(3)
    told = {fault: reason(draw_judged(QUICKLY, [fault], rng), looked_at(3)) for fault in DIMENSIONS}
    assert "moves right slowly, lasts" in told["speed"]
    assert "moves right" not in told["direction"]
    assert "vanishes" in told["identity"] or "changes" in told["identity"]
    assert "red circle" not in told["appearance"]


def test_a_fault_that_an_actor_cannot_have_is_refused():
    with pytest.raises(ValueError, match="'speed' is no fault of an actor that moves at speed None"):
        spoiled(replace(QUICKLY.actors[0], speed=None), "speed", QUICKLY.actors, random.Random(0))


# ---- the watcher


@pytest.fixture(scope="module")
def watcher(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("watcher")
    start = str(ROOT / "assets/lab/captioner")
    pretrain_watcher(WatcherPretraining(start=start, steps=2, pairs=1, save_every=1), out)
    return out / "watcher"


def test_the_watcher_spells_every_prompt_and_thought_and_keeps_what_it_knew(watcher):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    words = AutoProcessor.from_pretrained(watcher).tokenizer
    old = AutoProcessor.from_pretrained(ROOT / "assets/lab/captioner").tokenizer
    assert old.get_vocab().items() <= words.get_vocab().items()
    assert all(len(words(mark, add_special_tokens=False)["input_ids"]) == 1 for mark in MARKS)
    for pair in pairs(30, "heldout"):
        for text in (pair.prompt, reason(pair.chosen, looked_at(3)), reason(pair.rejected, looked_at(3))):
            ids = words(text, add_special_tokens=False)["input_ids"]
            assert words.unk_token_id not in ids
            assert words.decode(ids).replace(" ", "") == text.replace(" ", "")
    with pytest.raises(ValueError, match="precision is 'fp32' or 'bf16', got 'fp16'"):
        WatcherPretraining(precision="fp16")
    with pytest.raises(ValueError, match=r"was begun with other settings of \['pairs'\]"):
        pretrain_watcher(
            WatcherPretraining(start=str(ROOT / "assets/lab/captioner"), pairs=2), watcher.parent
        )
    model = AutoModelForImageTextToText.from_pretrained(watcher)
    assert len(model.get_input_embeddings().weight) == len(words)
