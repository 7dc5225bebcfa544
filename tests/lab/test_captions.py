import io
import json
import random
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from mmalign.lab.caption_data import COUNTS, as_png, line, write_lists
from mmalign.lab.captions import (
    CARELESS,
    Mistakes,
    as_json,
    describe,
    draw_scene,
    from_json,
    is_held_out,
    spoil,
    write,
)
from mmalign.lab.questions import ask, multiple_choice, single_choice
from mmalign.lab.render import render
from mmalign.lab.scenes import Scene, Thing, Word

SCENE = Scene(
    (Thing("circle", "red", "large", 14, 14, 11.5), Thing("star", "blue", "small", 50, 20, 7.0)),
    Word("cat", "green", 32, 54, 1.6),
)
CAPTIONS = Path(__file__).parents[2] / "assets/lab/captions"


def test_a_complete_caption_says_everything():
    assert write(describe(SCENE)) == (
        "There are two things: a large red circle at the top left and a small blue star at the top right. "
        'The red circle is left of the blue star. The word "cat" is written in green at the bottom.'
    )


def test_a_captioner_without_mistakes_says_the_truth():
    assert spoil(describe(SCENE), Mistakes(), random.Random(0)) == describe(SCENE)


@pytest.mark.parametrize("name", [field.name for field in fields(Mistakes)])
def test_every_mistake_changes_the_caption_in_its_own_way(name):
    truth = describe(SCENE)
    said = spoil(truth, replace(Mistakes(), **{name: 1.0}), random.Random(1))
    kind, _, what = name.partition("_")
    told, expected = {
        "thing": (len(said.things), {"omit": 1, "invent": 3}),
        "color": ({thing.color for thing in said.things}, {"omit": {None}}),
        "size": ({thing.size for thing in said.things}, {"omit": {None}}),
        "place": ({thing.place for thing in said.things}, {"omit": {None}}),
        "count": (said.count, {"omit": None}),
        "relation": (said.links, {"omit": ()}),
        "word": (said.word, {"omit": None}),
        "shape": ([thing.shape for thing in said.things], {"wrong": ["ring", "cross"]}),
    }[what]
    assert told == expected[kind] if kind in expected else said != truth


def test_what_a_thing_is_wrongly_called_it_is_called_in_relations_too():
    said = spoil(describe(SCENE), Mistakes(wrong_shape=1.0), random.Random(0))
    assert said.links[0].first == ("red", "ring")


def test_a_chance_outside_of_its_range_is_refused():
    with pytest.raises(ValueError, match="omit_word is a chance"):
        Mistakes(omit_word=1.5)


def test_careless_captions_leave_out_a_third_and_spoil_a_tenth_of_attributes():
    rng = random.Random(0)
    said = [thing for _ in range(300) for thing in spoil(describe(draw_scene(rng)), CARELESS, rng).things]
    silent = np.mean([thing.size is None for thing in said])
    assert abs(silent - CARELESS.omit_size) < 0.06


def test_scenes_hold_what_a_caption_can_tell_apart():
    rng = random.Random(0)
    for _ in range(100):
        scene = draw_scene(rng)
        assert len({(thing.color, thing.shape) for thing in scene.things}) == len(scene.things)
        assert not is_held_out(scene)
        assert from_json(json.loads(json.dumps(as_json(scene)))) == scene
    assert is_held_out(draw_scene(rng, "heldout"))
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        draw_scene(rng, "test")


@pytest.mark.parametrize(
    "found", [{}, {"things": [{"shape": "cube"}]}, {"things": [dict(vars(SCENE.things[0]), color="pink")]}]
)
def test_what_is_no_scene_is_named(found):
    with pytest.raises(ValueError, match="scene: "):
        from_json(found)


def test_questions_have_the_answers_that_the_scene_gives():
    asked = {question.question: question for question in single_choice(SCENE, random.Random(0))}
    assert asked["What color is the circle?"].answers == ("red",)
    assert asked["What shape is the blue thing?"].answers == ("star",)
    assert asked["How large is the red circle?"].answers == ("large",)
    assert asked["Where is the red circle seen from the blue star?"].answers == ("left of",)
    assert asked["How many things are there?"].answers == ("two",)
    assert asked["Which word is written?"].answers == ("cat",)
    colors, shapes = multiple_choice(SCENE, random.Random(0))
    assert set(colors.answers) == {"red", "blue"}
    assert set(shapes.answers) == {"circle", "star"}


def test_the_right_choice_is_among_the_choices_at_any_place_and_a_wrong_one_too():
    rng = random.Random(0)
    places = set()
    for _ in range(40):
        scene = draw_scene(rng)
        for question in [*single_choice(scene, rng), *multiple_choice(scene, rng)]:
            assert set(question.answers) < set(question.choices)
            assert len(set(question.choices)) == len(question.choices)
            places.add(question.choices.index(question.answers[0]))
    assert places == {0, 1, 2, 3}
    assert ask("Who?", ["a", "b", "c"]) == "Who? a, b or c?"


def test_where_a_thing_is_goes_unasked_near_the_border_of_a_region():
    near = Scene((Thing("circle", "red", "small", 22, 10, 7.0),))
    assert not [q for q in single_choice(near, random.Random(0)) if q.kind == "position"]


def test_pictures_are_stored_bit_for_bit():
    from PIL import Image

    picture = render(SCENE)
    assert (np.asarray(Image.open(io.BytesIO(as_png(picture))).convert("RGB")) == picture).all()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(as_png(noise)))) == noise).all()


def test_a_line_has_all_that_captioners_and_rewards_ask_for():
    found = line(SCENE, "1.png", random.Random(0))
    assert found["image"] == "images.zip/1.png"
    assert from_json(found["scene"]) == SCENE
    assert all(asked["answer"] in asked["choices"] for asked in found["questions"])


def test_the_same_lists_are_written_again(tmp_path):
    counts = {"train": 3, "heldout": 2}
    for name in ("one", "two"):
        write_lists(tmp_path / name, counts)
    for file in ("train.jsonl", "heldout.jsonl", "images.zip"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_shipped_lists_show_their_scenes_and_share_none():
    from PIL import Image

    split, seen = {}, set()
    with zipfile.ZipFile(CAPTIONS / "images.zip") as archive:
        for name, count in COUNTS.items():
            lines = [json.loads(text) for text in (CAPTIONS / f"{name}.jsonl").read_text().splitlines()]
            split[name] = [from_json(found["scene"]) for found in lines]
            assert len(lines) == count
            seen |= set(split[name])
            shown = Image.open(io.BytesIO(archive.read(lines[7]["image"].partition("/")[2]))).convert("RGB")
            assert (np.asarray(shown) == render(split[name][7])).all()
    assert len(seen) == sum(COUNTS.values())
    assert all(is_held_out(scene) for scene in split["heldout"])
    assert not any(is_held_out(scene) for scene in split["train"] + split["validation"])
