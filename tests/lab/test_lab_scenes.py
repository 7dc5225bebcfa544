import random
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.lab import (
    CATEGORIES,
    Group,
    Relation,
    Spelling,
    Task,
    compose,
    parse,
    render,
    sample_task,
    training_pair,
)
from mmalign.lab.heldout import (
    COLOR_SHAPE,
    COUNT_SHAPE,
    SHAPE_RELATION_SHAPE,
    SIZE_SHAPE,
    WORD,
    canonical,
    shows_held_out,
)
from mmalign.lab.prompts import held_out_prompts, list_prompts, train_prompts, validation_prompts
from mmalign.lab.scenes import (
    BACKGROUND,
    COLORS,
    INVERSE,
    LETTERS,
    SHAPES,
    WORDS,
    Scene,
    Thing,
    Word,
    relation,
)
from mmalign.lab.tasks import MIX, apart
from mmalign.lab.verifier import judge

LISTS = Path(__file__).parents[2] / "assets" / "lab" / "prompts"
seeds = st.integers(0, 2**32)
categories = st.sampled_from(CATEGORIES)
splits = st.sampled_from(["train", "heldout"])


@given(seeds, categories, splits)
def test_a_composed_scene_is_a_perfect_answer(seed, category, split):
    rng = random.Random(seed)
    task = sample_task(rng, category, split)
    assert task.category == category
    verdict = judge(compose(task, rng), task)
    assert verdict.strict
    assert verdict.soft == 1


@given(seeds, categories, splits)
def test_things_keep_apart_and_inside(seed, category, split):
    rng = random.Random(seed)
    scene = compose(sample_task(rng, category, split), rng)
    assert all(apart(first, second) for first, second in combinations(scene.things, 2))
    for thing in scene.things:
        assert min(thing.x, thing.y) >= thing.extent
        assert max(thing.x, thing.y) <= 64 - thing.extent


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", ["small", "large"])
def test_four_things_of_any_size_find_room(shape, size):
    task = Task((Group(shape, 4, None, size),))
    for seed in range(20):
        scene = compose(task, random.Random(seed))
        assert len(scene.things) == 4
        assert all(apart(first, second) for first, second in combinations(scene.things, 2))


def test_training_never_shows_a_held_out_combination():
    rng = random.Random(0)
    for _ in range(4000):
        task = sample_task(rng)
        assert not task.held_out
        scene = compose(task, rng)
        shown = {(thing.color, thing.shape) for thing in scene.things}
        shown |= {(thing.size, thing.shape) for thing in scene.things}
        shown |= {(n, shape) for shape, n in Counter(thing.shape for thing in scene.things).items()}
        shown |= {
            canonical(first.shape, relation(first, second), second.shape)
            for first, second in combinations(scene.things, 2)
        }
        shown |= {(scene.word.text,)} if scene.word else set()
        assert not shown & (COLOR_SHAPE | COUNT_SHAPE | SIZE_SHAPE | SHAPE_RELATION_SHAPE | WORD)


@given(seeds, categories)
def test_every_picture_of_a_held_out_task_is_held_out(seed, category):
    rng = random.Random(seed)
    assert shows_held_out(compose(sample_task(rng, category, "heldout"), rng))


def test_about_a_sixth_of_each_table_is_held_out_and_every_part_remains():
    shares = {
        "color": len(COLOR_SHAPE) / (len(COLORS) * len(SHAPES)),
        "count": len(COUNT_SHAPE) / (3 * len(SHAPES)),
        "size": len(SIZE_SHAPE) / (3 * len(SHAPES)),
        "relation": len(SHAPE_RELATION_SHAPE) / (2 * len(SHAPES) * (len(SHAPES) - 1)),
        "word": len(WORD) / len(WORDS),
    }
    assert all(0.15 <= share <= 0.2 for share in shares.values())
    assert set("".join(set(WORDS) - {word for (word,) in WORD})) == set(LETTERS)
    assert all(2 <= len(word) <= 4 for word in WORDS)
    # At most one fact about a pair of shapes is held out, so the pair itself remains.
    pairs = [frozenset((first, second)) for first, _, second in SHAPE_RELATION_SHAPE]
    assert len(set(pairs)) == len(pairs)


def test_the_mix_is_the_mix():
    rng = random.Random(0)
    drawn = Counter(sample_task(rng).category for _ in range(4000))
    for category, weight in MIX.items():
        assert drawn[category] / 4000 == pytest.approx(weight / sum(MIX.values()), abs=0.03)


@given(seeds)
def test_exactly_one_relation_holds_and_turns_into_its_inverse(seed):
    rng = random.Random(seed)
    scene = compose(sample_task(rng, "two_objects"), rng)
    first, second = scene.things
    assert relation(second, first) == INVERSE[relation(first, second)]
    assert list(scene.relations()) == [Relation(0, relation(first, second), 1)]


@given(seeds)
def test_composed_relations_and_places_are_clear(seed):
    rng = random.Random(seed)
    task = sample_task(rng, "position")
    scene = compose(task, rng)
    if task.relations:
        first, second = scene.things
        near, far = sorted((abs(first.x - second.x), abs(first.y - second.y)))
        assert near <= 0.65 * far
    else:
        (only,) = scene.things
        assert min(only.x, only.y, 64 - only.x, 64 - only.y) <= 22


def test_relations_follow_the_larger_offset():
    center = Thing("circle", "red", "small", 32, 32, 7)
    at = {"left of": (10, 40), "right of": (55, 20), "above": (40, 10), "below": (30, 50)}
    for kind, (x, y) in at.items():
        assert relation(Thing("ring", "blue", "small", x, y, 7), center) == kind


@pytest.mark.parametrize(
    "broken",
    [
        lambda: Group("dog"),
        lambda: Group("circle", color="pink"),
        lambda: Group("circle", size="medium"),
        lambda: Group("circle", count=0),
        lambda: Group("circle", count=5),
        lambda: Group("circle", count=2, place="on the left"),
        lambda: Spelling("zebra"),
        lambda: Task(),
        lambda: Task((Group("circle"),), word=Spelling("cat")),
        lambda: Task((Group("circle"), Group("circle", color="red"))),
        lambda: Task((Group("circle", 3), Group("star", 2))),
        lambda: Task((Group("circle"), Group("star")), (Relation(0, "behind", 1),)),
        lambda: Task((Group("circle"),), (Relation(0, "above", 1),)),
        lambda: sample_task(random.Random(0), "cats"),
        lambda: sample_task(random.Random(0), split="test"),
    ],
)
def test_impossible_tasks_are_refused(broken):
    with pytest.raises(ValueError, match=r"Group|Spelling|Task|sample_task"):
        broken()


def test_a_blank_scene_is_the_background():
    assert (render(Scene()) == BACKGROUND).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_area(shape):
    """Areas at radius 1, by hand; one full step of color per covered pixel."""
    area = {
        "circle": np.pi,
        "square": 1.8**2,
        "triangle": 2.4 * 2.15 / 2,
        "star": 10 * 0.5 * 1.3 * 0.58 * np.sin(np.pi / 5),
        "cross": 4 * 2 * 1.15 * 0.42 - 4 * 0.42**2,
        "ring": np.pi * (1.15**2 - 0.6**2),
    }
    picture = render(Scene((Thing(shape, "blue", "large", 31.3, 33.8, 11.5),)))
    step = np.array(COLORS["blue"]) - BACKGROUND
    covered = ((picture - np.array(BACKGROUND, float)) @ step).sum() / (step @ step)
    assert covered == pytest.approx(area[shape] * 11.5**2, rel=0.02)


def test_a_letter_covers_its_dots():
    """An L: a bar of 5 dots and a stem of 6 more, all sides thickened by 1/8 dot."""
    picture = render(Scene(word=Word("l", "red", 32, 32, cell=2.4)))
    step = np.array(COLORS["red"]) - BACKGROUND
    covered = ((picture - np.array(BACKGROUND, float)) @ step).sum() / (step @ step)
    assert covered == pytest.approx((5.25 * 1.25 + 6 * 1.25) * 2.4**2, rel=0.01)


def test_moving_a_thing_by_whole_pixels_moves_its_picture():
    here = render(Scene((Thing("star", "red", "medium", 25.4, 30.2, 9),)))
    there = render(Scene((Thing("star", "red", "medium", 32.4, 34.2, 9),)))
    assert (np.roll(here, (4, 7), axis=(0, 1)) == there).all()


def test_a_larger_picture_shows_the_same():
    scene = compose(parse("a red circle left of a blue square"), random.Random(0))
    coarse = render(scene, 256).reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(coarse - render(scene)).max() < 40


def test_the_same_seed_draws_the_same_pair():
    (picture, prompt), (again, same) = (training_pair(random.Random(5)) for _ in range(2))
    assert prompt == same
    assert (picture == again).all()
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8


def test_the_lists_in_the_repository_are_the_ones_we_would_write():
    assert (LISTS / "train.txt").read_text().splitlines() == train_prompts()
    assert (LISTS / "validation.txt").read_text().splitlines() == validation_prompts()
    assert (LISTS / "heldout.txt").read_text().splitlines() == held_out_prompts()


def test_the_lists_keep_the_splits_apart():
    train, held_out, validation = train_prompts(), held_out_prompts(), validation_prompts()
    assert len(set(train)) == len(train) == 2000
    assert len(set(held_out)) == len(held_out) == 105
    assert len(set(validation)) == len(validation) == 105
    assert not set(validation) & set(train)
    assert not any(parse(prompt).held_out for prompt in [*train, *validation])
    assert all(parse(prompt).held_out for prompt in held_out)
    assert Counter(parse(prompt).category for prompt in held_out) == {
        **dict.fromkeys(CATEGORIES, 17),
        "single_object": 3,
    }


def test_a_list_longer_than_the_split_is_refused():
    with pytest.raises(ValueError, match="has only 3 prompts, 4 were asked for"):
        list_prompts(4, "heldout", {"single_object": 1.0})


def test_the_lab_imports_no_heavy_package():
    code = "import sys, mmalign.lab; print({'torch', 'scipy', 'mmalign.pipelines'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
