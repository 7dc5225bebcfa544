import random

import numpy as np
import pytest

from mmalign.lab import compose, parse, render
from mmalign.lab.corruptions import CORRUPTIONS, LEAST, SEEN, UNSEEN, VISIBLE, corrupt


def picture(size: int = 64) -> np.ndarray:
    return render(compose(parse("a red circle left of a blue star"), random.Random(1)), size) / 255


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [64, 128])
def test_damage_is_visible_where_its_mask_says_and_nowhere_else(kind, size):
    clean = picture(size)
    found = corrupt(clean, kind, np.random.default_rng(0), strength=0.7)
    change = np.abs(found.picture - clean).max(-1)
    assert found.mask.shape == (size, size)
    assert found.mask.mean() >= LEAST
    assert (change[found.mask] > VISIBLE).all()
    assert (change[~found.mask] <= VISIBLE).all()
    assert found.picture.min() >= 0
    assert found.picture.max() <= 1


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_damage_is_drawn_from_the_generator_alone_and_spares_the_original(kind):
    clean, before = picture(), picture()
    one, other = (corrupt(clean, kind, np.random.default_rng(3)).picture for _ in range(2))
    assert (one == other).all()
    assert (clean == before).all()
    assert (one != corrupt(clean, kind, np.random.default_rng(4)).picture).any()


@pytest.mark.parametrize("kind", ["oversharpening", "checkerboard", "grain", "bleeding", "blobs", "holes"])
def test_more_strength_is_more_damage_on_average(kind):
    def size(strength: float) -> float:
        draws = (corrupt(picture(), kind, np.random.default_rng(i), strength) for i in range(12))
        return float(np.mean([np.abs(found.picture - picture()).mean() for found in draws]))

    assert size(0.1) < size(0.5) < size(1.0)


def test_kinds_are_either_trained_on_or_only_tested():
    assert set(SEEN) | set(UNSEEN) == set(CORRUPTIONS)
    assert not set(SEEN) & set(UNSEEN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((picture(), "rust", np.random.default_rng(0)), "kind must be one of blobs.*got 'rust'"),
        ((np.zeros((3, 64, 64)), "blobs", np.random.default_rng(0)), r"square picture .*\(3, 64, 64\)"),
        ((picture(), "blobs", np.random.default_rng(0), 2.0), r"strength must lie in \(0, 1\], got 2.0"),
    ],
)
def test_what_cannot_be_damaged_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        corrupt(*arguments)
