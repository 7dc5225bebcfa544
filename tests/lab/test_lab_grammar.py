import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.lab import (
    CATEGORIES,
    Group,
    Relation,
    Spelling,
    Task,
    compose,
    parse,
    sample_task,
    tokens,
    vocabulary,
    write_caption,
    write_prompt,
)
from mmalign.lab.scenes import COLORS, RELATIONS, SHAPES, WORDS, Scene, Thing, Word
from mmalign.lab.tasks import PLACES, SAID_SIZES

maybe_color = st.none() | st.sampled_from(list(COLORS))
maybe_size = st.none() | st.sampled_from(SAID_SIZES)


@st.composite
def tasks(draw):
    """Any task that can be said, also ones that `sample_task` never draws."""
    kind = draw(st.sampled_from(["word", "place", "relation", "groups"]))
    if kind == "word":
        return Task(word=Spelling(draw(st.sampled_from(WORDS)), draw(maybe_color)))
    shapes = draw(st.permutations(SHAPES))
    if kind == "place":
        group = Group(shapes[0], 1, draw(maybe_color), draw(maybe_size), draw(st.sampled_from(PLACES)))
        return Task((group,))
    number = 2 if kind == "relation" else draw(st.integers(1, 3))
    counts = [1] * number
    if kind == "groups":
        counts[draw(st.integers(0, number - 1))] = draw(st.integers(1, 5 - number))
    groups = tuple(
        Group(shape, count, draw(maybe_color), draw(maybe_size))
        for shape, count in zip(shapes, counts, strict=False)
    )
    relations = (Relation(0, draw(st.sampled_from(RELATIONS)), 1),) if kind == "relation" else ()
    return Task(groups, relations)


@given(tasks())
def test_parse_inverts_write_prompt(task):
    assert parse(write_prompt(task)) == task


@given(tasks())
def test_prompts_are_short_and_use_the_vocabulary(task):
    prompt = write_prompt(task)
    assert len(prompt.split()) <= 14
    assert prompt == prompt.lower()
    assert set(tokens(prompt)) <= set(vocabulary())


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("a circle", "single_object"),
        ("a circle and a small star", "two_objects"),
        ("two blue stars", "counting"),
        ("three crosses", "counting"),
        ("a large red circle", "colors"),
        ("a red circle left of a blue square", "position"),
        ("a ring at the top", "position"),
        ("a red circle, a blue square and a green star", "attribute_binding"),
        ('the word "cat" in red', "text"),
    ],
)
def test_a_prompt_tells_its_category(prompt, category):
    assert parse(prompt).category == category
    assert write_prompt(parse(prompt)) == prompt


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a pink circle", "pink"),
        ("two dogs", "dogs"),
        ('the word "zebra"', "zebra"),
        ('the word "cat" in pink', "pink"),
        ("a c", "'c'"),
    ],
)
def test_parse_names_the_unknown_word(prompt, named):
    with pytest.raises(ValueError, match=named):
        parse(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a",
        "circle",
        "a circle circle",
        "two circle",
        "a circles",
        "a red small circle",
        "two circles on the left",
        "a circle and a circle",
        "a circle left of two stars",
        "three circles and two stars",
    ],
)
def test_parse_refuses_what_no_task_says(prompt):
    with pytest.raises(ValueError, match=r"parse|Task|Group"):
        parse(prompt)


def test_letters_are_tokens_only_between_quotation_marks():
    assert tokens('the word "cat" in red') == ["the", "word", '"', "c", "a", "t", '"', "in", "red"]
    assert tokens("a red circle, a star") == ["a", "red", "circle", ",", "a", "star"]


def test_the_vocabulary_has_no_token_that_no_prompt_contains():
    rng = random.Random(0)
    used = {
        token
        for split in ("train", "heldout")
        for category in CATEGORIES
        for _ in range(300)
        for token in tokens(write_prompt(sample_task(rng, category, split)))
    }
    assert used == set(vocabulary())


def test_a_caption_states_every_thing_and_every_relation():
    red = Thing("circle", "red", "small", 10, 10, 7)
    blue = Thing("square", "blue", "large", 50, 32, 11)
    assert write_caption(Scene((red, blue))) == (
        "a small red circle at the top left and a large blue square at the right; "
        "the small red circle is left of the large blue square"
    )
    assert write_caption(Scene(word=Word("cat", "cyan", 32, 32))) == 'the word "cat" in cyan in the center'


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_a_caption_of_n_things_has_a_sentence_for_each_pair(seed):
    rng = random.Random(seed)
    scene = compose(sample_task(rng, rng.choice(CATEGORIES[:-1])), rng)
    caption, number = write_caption(scene), len(scene.things)
    assert caption.count(";") == number * (number - 1) / 2
    for thing in scene.things:
        assert f"a {thing.size} {thing.color} {thing.shape}" in caption
