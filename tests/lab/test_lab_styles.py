import random

import numpy as np
import pytest

from mmalign.lab import compose, parse, render, sample_task
from mmalign.lab.render import BACKGROUND, NIGHT, PALE, STYLES
from mmalign.lab.verifier import read_scene


def scenes(count: int):
    rng = random.Random("styles")
    return [compose(sample_task(rng, "attribute_binding"), rng) for _ in range(count)]


@pytest.mark.parametrize("style", STYLES)
def test_a_style_draws_the_same_things_at_the_same_places(style):
    ground = NIGHT if style == "night" else BACKGROUND
    for scene in scenes(4):
        plain = np.abs(render(scene).astype(int) - BACKGROUND).max(-1) > 8
        styled = np.abs(render(scene, style=style).astype(int) - ground).max(-1) > 8
        # Faint edges of pale things fall below the threshold, and nothing else differs.
        assert (plain ^ styled).mean() < 0.03
        assert (plain & styled).sum() > 0.8 * plain.sum()


def test_plain_is_the_style_of_a_picture_without_one():
    scene = scenes(1)[0]
    assert (render(scene) == render(scene, style="plain")).all()


def test_pastel_takes_half_of_every_step_away_from_the_ground():
    scene = scenes(1)[0]
    step = render(scene).astype(float) - BACKGROUND
    assert np.abs(render(scene, style="pastel") - (BACKGROUND + PALE * step)).max() <= 1


def test_the_verifier_reads_a_pastel_picture_once_its_contrast_is_put_back():
    for scene in scenes(6):
        pale = render(scene, style="pastel").astype(float)
        restored = (BACKGROUND + (pale - BACKGROUND) / PALE).clip(0, 255).round().astype(np.uint8)
        found = {(thing.shape, thing.color) for thing in read_scene(restored).things}
        assert found == {(thing.shape, thing.color) for thing in scene.things}


@pytest.mark.parametrize("style", ["outlined", "striped", "pastel"])
def test_styles_are_told_apart_by_what_they_change(style):
    scene = compose(parse("a red circle"), random.Random(0))
    plain, styled = render(scene).astype(int), render(scene, style=style).astype(int)
    dark, changed = styled.max(-1) < 60, np.abs(styled - plain).max(-1) > 20
    assert changed.sum() > 30
    assert (dark.sum() > 30) == (style == "outlined")


def test_an_unknown_style_is_named():
    with pytest.raises(ValueError, match=r"style must be one of plain, pastel.*got 'cubist'"):
        render(scenes(1)[0], style="cubist")
