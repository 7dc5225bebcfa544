import random

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from mmalign.lab import compose, parse, render, sample_task
from mmalign.lab.render import BACKGROUND, NIGHT, PALE, STYLES
from mmalign.lab.styles import READABLE, as_plain, style_of
from mmalign.lab.verifier import read_scene, score


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


def disturbed(picture: np.ndarray, blur: float, noise: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    picture = gaussian_filter(picture / 255, (blur, blur, 0)) + rng.normal(0, noise, picture.shape)
    return picture.clip(0, 1).transpose(2, 0, 1)


@pytest.mark.parametrize("style", STYLES)
def test_the_style_of_a_picture_is_read_off_it(style):
    rng = random.Random(f"read {style}")
    pictures = [render(compose(sample_task(rng), rng), style=style) for _ in range(60)]
    assert [style_of(picture) for picture in pictures] == [style] * 60
    found = [style_of(disturbed(picture, 0.8, 0.04, i)) for i, picture in enumerate(pictures)]
    assert found.count(style) >= 57


def test_a_blank_picture_is_plain():
    assert style_of(np.full((64, 64, 3), BACKGROUND, np.uint8)) == "plain"


@pytest.mark.parametrize("style", READABLE)
def test_the_verifier_reads_every_style_that_can_be_repainted(style):
    rng = random.Random(f"repaint {style}")
    right = 0
    for number in range(40):
        task = sample_task(rng)
        picture = disturbed(render(compose(task, rng), style=style), 0.6, 0.03, number)
        right += score(as_plain(picture, style).transpose(2, 0, 1), task).strict
    assert right >= 38


def test_a_style_that_hides_colors_is_not_repainted():
    with pytest.raises(ValueError, match="must be one of plain, pastel, night, striped, got 'outlined'"):
        as_plain(render(scenes(1)[0], style="outlined"), "outlined")
