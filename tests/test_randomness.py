"""Random streams are named: the key alone decides the numbers."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mmalign.randomness import generator, normals, seed_of

parts = st.one_of(st.integers(-(2**40), 2**40), st.text("ab1:|", max_size=4))
keys = st.lists(parts, min_size=1, max_size=4).map(tuple)


@given(key=keys, other=keys)
def test_keys_and_seeds_go_one_to_one(key, other):
    assert (seed_of(*key) == seed_of(*other)) == (key == other)
    assert 0 <= seed_of(*key) < 2**63


def test_a_number_and_its_text_are_different_parts():
    assert len({seed_of(1, 23), seed_of(12, 3), seed_of("1", 23), seed_of("1", "23"), seed_of(123)}) == 5


def test_seeds_are_the_same_in_every_process_and_release():
    assert seed_of(0, "noise", 3, 7) == 1995052992039258357


def test_a_row_of_noise_does_not_depend_on_its_neighbors():
    together = normals([generator(0, "noise", member) for member in range(4)], (2, 3))
    alone = normals([generator(0, "noise", 2)], (2, 3))
    assert torch.equal(together[2], alone[0])
    assert together.unique().numel() == 24


def test_a_stream_moves_on():
    streams = [generator(0, "noise", member) for member in range(2)]
    first, second = normals(streams, (5,)), normals(streams, (5,))
    assert not torch.equal(first, second)
    assert torch.equal(first, normals([generator(0, "noise", member) for member in range(2)], (5,)))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    normals([generator(1)], (100,))
    assert torch.equal(torch.randn(3), expected)


def test_normals_are_standard_normal_in_fp32():
    noise = normals([generator(0, "law")], (200_000,))
    assert noise.dtype == torch.float32
    assert_close(noise.mean(), torch.tensor(0.0), atol=0.012, rtol=0)
    assert_close(noise.std(), torch.tensor(1.0), atol=0.01, rtol=0)


def test_no_stream_gives_no_rows():
    assert normals([], (2, 3)).shape == (0, 2, 3)
