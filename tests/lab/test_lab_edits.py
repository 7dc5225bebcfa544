"""Edits of the lab: instructions are edits, targets show them, and the verifier sees what is wrong."""

import json
import random
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.lab import heldout
from mmalign.lab.caption_data import as_png
from mmalign.lab.captions import from_json
from mmalign.lab.edit_data import write_lists
from mmalign.lab.edit_verifier import judge_edit, matched, score_edit
from mmalign.lab.edits import (
    KINDS,
    Edit,
    Referent,
    apply,
    draw_edit,
    find,
    parse_edit,
    parse_plan,
    write_edit,
    write_plan,
)
from mmalign.lab.render import render
from mmalign.lab.scenes import COLORS, SHAPES, Scene, Thing
from mmalign.lab.tasks import apart


def drawn(count, kind=None, split="train", seed=0):
    rng = random.Random(seed)
    return [draw_edit(rng, split, kind) for _ in range(count)]


RED_STAR = Thing("star", "red", "medium", 16.0, 20.0, 9.4)
BLUE_CIRCLE = Thing("circle", "blue", "medium", 46.0, 40.0, 9.4)
PAIR = Scene((RED_STAR, BLUE_CIRCLE))


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_instruction_is_its_edit_and_splits_have_nothing_in_common(kind, split):
    for source, edit, target in drawn(12, kind, split):
        assert edit.kind == kind
        assert parse_edit(write_edit(edit)) == edit
        assert parse_plan(write_plan(edit)) == edit
        assert not heldout.shows_held_out(source)
        assert heldout.shows_held_out(target) == (split == "heldout")
        assert len({(thing.shape, thing.color) for thing in target.things}) == len(target.things)
        for i, thing in enumerate(target.things):
            assert all(apart(thing, other) for other in target.things[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_right_and_the_source_earns_nothing(kind):
    for source, edit, target in drawn(20, kind, seed=1):
        verdict = score_edit(render(target), source, edit)
        assert (verdict.strict, verdict.soft) == (True, 1), (edit, verdict)
        before = score_edit(render(source), source, edit)
        assert before.change == before.soft == 0, (edit, before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "swap"])
def test_what_nobody_spoke_of_counts_where_it_changes(kind):
    seen = 0
    for source, edit, target in drawn(30, kind, seed=2):
        spoken = {str(r) for r in (edit.subject, edit.anchor) if r}
        bystanders = [
            t for t in source.things if not any(w in (t.shape, f"{t.color} {t.shape}") for w in spoken)
        ]
        if not bystanders or bystanders[0] not in target.things:
            continue
        seen += 1
        other = bystanders[0]
        recolored = replace(other, color=next(c for c in COLORS if c != other.color))
        lost = Scene(tuple(t for t in target.things if t != other))
        tinted = Scene(tuple(recolored if t == other else t for t in target.things))
        whole = judge_edit(target, source, edit)
        for worse in (tinted, lost):
            verdict = judge_edit(worse, source, edit)
            assert verdict.change == whole.change == 1
            assert max(verdict.stay, verdict.soft) < 1
            assert not verdict.strict
        assert judge_edit(lost, source, edit).stay < judge_edit(tinted, source, edit).stay
    assert seen > 3


def test_each_kind_is_judged_by_what_it_asks():
    def verdict(text, *things):
        return judge_edit(Scene(things), PAIR, parse_edit(text))

    green, moved = replace(RED_STAR, color="green"), replace(RED_STAR, x=48.0, y=14.0)
    assert verdict("make the star green", green, BLUE_CIRCLE).strict
    assert verdict("make the star green", replace(green, shape="ring"), BLUE_CIRCLE).change == 1
    assert verdict("make the star green", replace(green, shape="ring"), BLUE_CIRCLE).stay < 1
    assert verdict("make the star green", replace(green, x=22.0), BLUE_CIRCLE).stay < 1
    assert verdict("turn the star into a ring", replace(RED_STAR, shape="ring"), BLUE_CIRCLE).strict
    assert verdict("turn the star into a ring", replace(green, shape="ring"), BLUE_CIRCLE).stay < 1
    small = replace(RED_STAR, size="small", radius=7.0)
    assert verdict("make the star small", small, BLUE_CIRCLE).strict
    assert verdict("put the star on the right", moved, BLUE_CIRCLE).strict
    assert verdict("put the star above the circle", moved, BLUE_CIRCLE).strict
    assert verdict("put the star right of the circle", moved, BLUE_CIRCLE).change == 0
    assert verdict("put the star on the right", replace(moved, color="green"), BLUE_CIRCLE).change == 0.5
    assert verdict("remove the star", BLUE_CIRCLE).strict
    assert verdict("remove the star", moved, BLUE_CIRCLE).change == 0
    assert verdict("remove the star", green, BLUE_CIRCLE).change == 0
    new = Thing("ring", "red", "medium", 16.0, 48.0, 9.4)
    assert verdict("add a red ring left of the circle", *PAIR.things, new).strict
    assert verdict("add a red ring right of the circle", *PAIR.things, new).change == 0.5
    assert verdict("add a red ring", *PAIR.things, replace(new, color="cyan")).change == 0.5
    assert verdict("add a red ring", *PAIR.things, new, replace(new, x=46.0, y=12.0)).extras == 1
    there, here = replace(RED_STAR, x=46.0, y=40.0), replace(BLUE_CIRCLE, x=16.0, y=20.0)
    assert verdict("swap the star and the circle", there, here).strict
    assert verdict("swap the star and the circle", there, BLUE_CIRCLE).change == 0.5


def test_a_new_picture_that_shows_what_was_asked_is_no_edit():
    """The whole scene drawn anew, elsewhere: the change is there, and the rest did not stay."""
    source = Scene((RED_STAR, BLUE_CIRCLE, Thing("cross", "green", "medium", 46.0, 14.0, 9.4)))
    anew = Scene((replace(RED_STAR, color="yellow", x=40.0), replace(BLUE_CIRCLE, x=14.0), source.things[2]))
    verdict = judge_edit(anew, source, parse_edit("make the star yellow"))
    assert verdict.soft < 0.6
    assert not verdict.strict


def test_writing_that_appears_is_an_extra():
    from mmalign.lab.scenes import Word

    target = Scene((replace(RED_STAR, color="green"), BLUE_CIRCLE), Word("at", "red", 40.0, 12.0))
    verdict = judge_edit(target, PAIR, parse_edit("make the star green"))
    assert (verdict.extras, verdict.strict, verdict.change) == (2, False, 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(KINDS))
def test_scores_lie_in_0_to_1_for_any_picture(seed, kind):
    rng = random.Random(seed)
    source, edit, _ = draw_edit(rng, "train", kind)
    noise = np.random.default_rng(seed % 2**31).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    other, _, target = draw_edit(rng, "train")
    for picture in (noise, render(other), render(target)):
        verdict = score_edit(picture, source, edit)
        assert all(0 <= value <= 1 for value in (verdict.change, verdict.stay, verdict.soft))
        assert not verdict.strict or verdict.soft == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(3)))
def test_the_order_of_what_is_seen_does_not_matter(seed, order):
    source, edit, target = draw_edit(random.Random(seed))
    shuffled = Scene(tuple(target.things[i] for i in order if i < len(target.things)))
    whole = Scene(target.things[:3])
    first, second = judge_edit(whole, source, edit), judge_edit(shuffled, source, edit)
    assert first.soft == pytest.approx(second.soft)
    assert first.strict == second.strict


def test_no_thing_is_taken_for_two():
    twice = matched([RED_STAR, replace(RED_STAR, color="green")], [RED_STAR])
    assert sorted(twice, key=str) == [0, None]
    assert matched([RED_STAR], []) == [None]
    assert matched([RED_STAR], [replace(RED_STAR, x=40.0)]) == [None]


def test_what_is_no_edit_is_refused():
    for text in ("make the star", "paint the star red", "add a ring", "swap the star", "remove a star"):
        with pytest.raises(ValueError, match="is not an instruction of the lab"):
            parse_edit(text)
    with pytest.raises(ValueError, match="2 things that 'the star' could mean"):
        find(Scene((RED_STAR, replace(RED_STAR, color="green", x=40.0))), Referent("star"))
    with pytest.raises(ValueError, match="0 things that 'the ring' could mean"):
        score_edit(render(PAIR), PAIR, parse_edit("remove the ring"))
    for wrong in (
        {"kind": "paint", "subject": Referent("star")},
        {"kind": "recolor", "subject": Referent("star")},
        {"kind": "recolor", "subject": Referent("star"), "value": "large"},
        {"kind": "remove", "subject": Referent("star"), "value": "red"},
        {"kind": "move", "subject": Referent("star"), "value": "on the left", "relation": "above"},
        {"kind": "swap", "subject": Referent("star")},
        {"kind": "add", "subject": Referent("star")},
        {"kind": "move", "subject": Referent("star"), "relation": "above"},
    ):
        with pytest.raises(ValueError, match="Edit: "):
            Edit(**wrong)
    for split, kind in (("test", None), ("train", "paint")):
        with pytest.raises(ValueError, match="draw_edit"):
            draw_edit(random.Random(0), split, kind)


def test_a_plan_whose_parts_do_not_agree_is_none():
    plan = write_plan(parse_edit("make the star red"))
    assert plan == "task: make the star red; target: the star; ability: color"
    for wrong in (
        "make the star red",
        plan.replace("color", "shape"),
        plan.replace("the star;", "the ring;"),
    ):
        with pytest.raises(ValueError, match="parse_plan"):
            parse_plan(wrong)


def test_an_edit_that_changes_nothing_or_finds_no_room_is_none():
    rng = random.Random(0)
    assert apply(PAIR, parse_edit("make the star red"), rng) is None
    assert apply(PAIR, parse_edit("put the star left of the circle"), rng) is None
    near = Scene((RED_STAR, Thing("circle", "blue", "medium", 38.0, 20.0, 9.4)))
    assert apply(near, parse_edit("make the star large"), rng) is None
    full = Scene(
        tuple(
            Thing(SHAPES[i], "red", "medium", 16.0 + 32 * (i % 2), 16.0 + 32 * (i // 2), 9.4)
            for i in range(4)
        )
    )
    assert apply(full, parse_edit("add a blue ring"), rng) is None


def test_the_lists_of_the_repository_are_what_the_module_writes(tmp_path):
    from pathlib import Path

    folder = Path(__file__).resolve().parents[2] / "assets/lab/edits"
    write_lists(tmp_path, {"train": 5})
    lines = (folder / "train.jsonl").read_text().splitlines()
    assert (tmp_path / "train.jsonl").read_text().splitlines() == lines[:5]
    with zipfile.ZipFile(folder / "sources.zip") as archive:
        for name in ("train", "validation", "heldout"):
            for text in (folder / f"{name}.jsonl").read_text().splitlines()[::9]:
                row = json.loads(text)
                source, edit = from_json(row["scene"]), parse_edit(row["prompt"])
                assert parse_plan(row["plan"]) == edit
                assert row["category"] == edit.kind
                assert apply(source, edit, random.Random(0)) is not None or edit.kind in ("move", "add")
                picture = archive.read(row["source"].removeprefix("sources.zip/"))
                assert picture == as_png(render(source))
