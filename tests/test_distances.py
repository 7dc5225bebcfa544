"""Distances between sets of pictures against independent formulas and laws that they must keep."""

import pytest
import torch
from torch.testing import assert_close

from mmalign.distances import (
    Distances,
    compare,
    extracted,
    kid,
    kid_parts,
    pixels,
    precision_recall,
    variety,
)


def cloud(count: int, size: int = 6, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).double() + shift


def test_kid_is_the_formula_written_out():
    x, y = cloud(5), cloud(7, shift=0.5, seed=1)

    def k(a, b):
        return (float(sum(p * q for p, q in zip(a, b, strict=True))) / 6 + 1) ** 3

    same_x = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    same_y = sum(k(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
    across = sum(k(a, b) for a in x for b in y) / 35
    assert kid(x, y) == pytest.approx(same_x + same_y - 2 * across, rel=1e-9)


def test_kid_is_unbiased_and_sees_a_shift():
    """Over many draws of one law its mean is 0, where the biased estimate would be far above."""
    found = torch.tensor([kid(cloud(8, seed=2 * i), cloud(8, seed=2 * i + 1)) for i in range(400)])
    assert abs(found.mean()) < 3 * found.std() / 20
    assert (found < 0).any()
    shifted = torch.tensor([kid(cloud(8, seed=i), cloud(8, shift=1.0, seed=i + 1)) for i in range(50)])
    assert shifted.mean() > 10 * found.std() / 20


def test_parts_of_a_kid_have_it_as_their_mean_and_spread_as_it_does():
    """What a bootstrap over the parts tells of the error is what fresh draws of the pictures show."""
    references = cloud(60, shift=0.4, seed=1)
    draws = [cloud(40, seed=2 + i) for i in range(300)]
    parts = torch.stack([kid_parts(x, references) for x in draws])
    kids = torch.tensor([kid(x, references) for x in draws]).double()
    assert_close(parts.mean(1), kids)
    told = (parts.var(1) / 40).mean().sqrt()
    assert 0.8 < told / kids.std() < 1.25


def test_kid_does_not_ask_for_an_order():
    x, y = cloud(9), cloud(6, shift=0.3, seed=1)
    assert kid(x, y) == pytest.approx(kid(y, x))
    assert kid(x[torch.randperm(9)], y) == pytest.approx(kid(x, y))


def test_precision_is_of_the_pictures_and_recall_of_the_references():
    references = torch.cat([cloud(40), cloud(40, shift=30.0, seed=1)])  # two modes
    dropped = cloud(40, seed=2)  # one of them alone
    precision, recall = precision_recall(dropped, references)
    assert precision > 0.7
    assert recall < 0.55
    stray = torch.cat([references + 1e-6, cloud(80, shift=-60.0, seed=3)])
    precision, recall = precision_recall(stray, references)
    assert precision == pytest.approx(0.5)
    assert recall == 1


def test_neighbors_are_those_of_a_naive_search():
    x, y, k = cloud(12), cloud(15, seed=4), 2

    def inside(point, among):
        for j, other in enumerate(among):
            radius = sorted(float((other - a).norm()) for i, a in enumerate(among) if i != j)[k - 1]
            if float((point - other).norm()) <= radius:
                return True
        return False

    expected = sum(inside(p, y) for p in x) / 12, sum(inside(p, x) for p in y) / 15
    assert precision_recall(x, y, k) == pytest.approx(expected)


def test_equal_sets_cover_each_other():
    assert precision_recall(cloud(10), cloud(10)) == (1.0, 1.0)


def test_variety_is_the_mean_distance_inside_a_prompt():
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 3.0], [5.0, 0.0]])
    group = torch.tensor([0, 0, 1, 1, 2])
    assert variety(features, group) == pytest.approx((1.0 + 0.0) / 2)
    assert variety(features[4:], group[4:]) is None


def test_all_of_it_from_pictures():
    pictures = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = extracted(pixels, pictures, batch=5)
    assert features.shape == (24, 192)
    assert_close(features, pixels(pictures).double())
    found = compare(features[:12], torch.arange(12) // 3, features[12:])
    assert isinstance(found, Distances)
    assert found.kid_interval[0] < found.kid_interval[1]
    assert (found.pictures, found.references) == (12, 12)
    assert found.variety > 0


def test_too_few_pictures_are_said():
    with pytest.raises(ValueError, match="two pictures or more"):
        kid(cloud(1), cloud(5))
    with pytest.raises(ValueError, match="by 3 neighbors need more"):
        precision_recall(cloud(3), cloud(9))
