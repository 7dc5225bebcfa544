import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmalign.lab import Scene, Thing, Word, compose, render, sample_task
from mmalign.lab.layout import KINDS, SHADES, layout
from mmalign.lab.pretrain_data import draw_lab
from mmalign.lab.pretrain_flow import FlowSize, Reader, build_transformer, middle, velocity_error
from mmalign.lab.pretrain_text import TextSize
from mmalign.lab.scenes import BACKGROUND, COLORS


def names(cells: np.ndarray) -> list[list[str]]:
    return [[KINDS[kind] for kind in row] for row in cells[0]]


def test_a_thing_marks_the_cells_under_it_with_shape_and_color():
    cells = layout(Scene((Thing("star", "cyan", "medium", 20.0, 44.0, 9.0),)), side=8)
    rows, columns = np.nonzero(cells[0])
    assert (set(rows), set(columns)) == ({4, 5, 6}, {1, 2, 3})
    assert {KINDS[kind] for kind in cells[0][cells[0] > 0]} == {"star"}
    assert {SHADES[shade] for shade in cells[1][cells[1] > 0]} == {"cyan"}


def test_a_word_marks_its_letters_from_left_to_right():
    cells = layout(Scene(word=Word("hat", "green", 32.0, 32.0)), side=16)
    seen = list(dict.fromkeys(name for name in names(cells)[8] if name != "ground"))
    assert seen == ["h", "a", "t"]
    assert {SHADES[shade] for shade in np.unique(cells[1])} == {"ground", "green"}


@pytest.mark.parametrize("seed", range(40))
def test_marks_agree_with_the_picture(seed: int):
    rng = random.Random(seed)
    scene = compose(sample_task(rng), rng)
    cells = layout(scene, side=8)
    blocks = render(scene).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(8, 8, 64, 3)
    inked = (np.abs(blocks.astype(int) - np.array(BACKGROUND)).max(-1) > 8).mean(-1)
    assert not (cells[0][inked == 0] > 0).mean() > 0.2, "ground is called something"
    assert (cells[1][inked > 0.5] > 0).all(), "something is called ground"
    for row, column in zip(*np.nonzero((inked > 0.5) & (cells[1] > 0)), strict=True):
        mean = blocks[row, column].reshape(-1, 3).mean(0) - np.array(BACKGROUND)
        tints = {name: np.array(rgb) - np.array(BACKGROUND) for name, rgb in COLORS.items()}
        closest = max(tints, key=lambda name: mean @ tints[name] / np.linalg.norm(tints[name]))
        assert closest == SHADES[cells[1, row, column]]


def test_lab_data_knows_its_layout():
    data = draw_lab(3, seed=1)
    assert data.layout is not None
    assert data.layout.shape == (3, 2, 8, 8)
    assert data.layout.dtype == torch.uint8
    assert data.layout.flatten(1).any(1).all()


def test_reading_is_a_cross_entropy_of_kind_and_of_shade():
    reader, hidden = Reader(8), torch.zeros(1, 4, 8)
    torch.nn.init.zeros_(reader.kind.bias)
    torch.nn.init.zeros_(reader.shade.bias)
    told = reader(hidden, torch.zeros(1, 2, 2, 2, dtype=torch.uint8))
    assert_close(told, torch.log(torch.tensor([len(KINDS) * len(SHADES)]).float()))


def test_naming_teaches_the_first_half_of_the_network_alone():
    torch.manual_seed(0)
    transformer = build_transformer(FlowSize(layers=4, heads=1), TextSize(clip_width=32), (8, 8, 8))
    text = torch.randn(2, 6, 64), torch.randn(2, 64)
    with middle(transformer) as seen:
        velocity_error(transformer, torch.randn(2, 8, 8, 8), text, torch.Generator().manual_seed(0))
    assert len(seen) == 1
    layouts = torch.zeros(2, 2, 8, 8, dtype=torch.uint8)
    Reader(32)(seen[0], layouts).sum().backward()
    reached = [
        any(p.grad is not None for p in block.parameters()) for block in transformer.transformer_blocks
    ]
    assert reached == [True, True, False, False]
    assert not transformer.transformer_blocks[1]._forward_hooks, "the hook is taken off again"
