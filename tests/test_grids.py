import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from mmalign.grids import CELL, Panel, contact_sheet, cut, fit, font, gallery, grid, to_pil, wrap, write


def pictures(count, size=64, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_a_picture_keeps_its_values_to_half_a_level():
    image = pictures(1)[0]
    assert_close(pixels(to_pil(image)), image, atol=0.5 / 255 + 1e-6, rtol=0)


def test_small_pictures_grow_by_whole_pixels_and_large_ones_shrink():
    small = to_pil(pictures(1, 64)[0])
    assert fit(small).size == (CELL, CELL)
    assert_close(pixels(fit(small))[:, ::3, ::3], pixels(small))
    assert fit(Image.new("RGB", (1024, 512))).size == (CELL, CELL // 2)


def test_lines_are_no_wider_than_asked():
    face = font(13)
    lines = wrap(
        "a large green triangle on the left of a small yellow star and averyveryverylongword" * 3,
        120,
        face,
        5,
    )
    assert len(lines) == 5
    assert max(face.getlength(text) for text in lines) <= 120
    assert wrap("two words", 500, face) == ["two words"]


def test_every_picture_lies_in_the_grid_once():
    levels = range(10, 250, 20)
    images = torch.zeros(len(levels), 3, 8, 8)
    images[:, 0] = torch.tensor(levels)[:, None, None] / 255
    sheet = np.array(grid(["first", "second"], [Panel("base", images[:6]), Panel("trained", images[6:])]))
    for level in levels:
        assert (sheet == [level, 0, 0]).all(2).sum() == CELL * CELL


def test_captions_are_drawn_below():
    images = torch.ones(2, 3, 8, 8)
    bare, told = grid(["x"], [Panel("", images)]), grid(["x"], [Panel("", images, ["lab 0.50", "lab 1.00"])])
    assert told.height > bare.height
    assert (np.array(told)[bare.height - 16 :] < 200).any()


def test_a_panel_of_what_is_edited_has_one_column():
    source, drawn = torch.zeros(2, 3, 16, 16), torch.full((4, 3, 8, 8), 0.5)
    alone, both = (
        grid(["a", "b"], [Panel("", drawn)]),
        grid(["a", "b"], [Panel("source", source), Panel("", drawn)]),
    )
    assert 0 < both.width - alone.width - CELL < CELL / 4
    black = (np.array(both) == 0).all(2)
    assert black.sum() == 2 * CELL * CELL
    grey = (np.array(both) == 128).all(2)
    assert grey.sum() == 4 * CELL * CELL


@pytest.mark.parametrize("counts", [(4, 3), (3, 3), (0, 0)])
def test_panels_that_do_not_fit_their_prompts_are_refused(counts):
    with pytest.raises(ValueError, match="as many pictures for each of the 2 prompts"):
        grid(["a", "b"], [Panel("", pictures(count, 8)) for count in counts])


def test_a_gallery_needs_nothing_but_itself():
    page = gallery(["a <b>", "c"], [Panel("base", pictures(4, 8), ["r 1", "r 2", "r 3", "r 4"])], "title")
    assert len(re.findall(r'<img src="data:image/png;base64,', page)) == 4
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in page
    assert "a &lt;b&gt;" in page


def test_long_grids_take_several_files(tmp_path):
    panel = Panel("", pictures(10, 8))
    found = write(tmp_path / "deep" / "grid.png", list("abcde"), [panel], "t", rows_per_page=2)
    assert [path.name for path in found] == ["grid.png", "grid_2.png", "grid_3.png", "grid.html"]
    assert_close(cut(panel, 5, slice(2, 4)).images, panel.images[4:8])


def test_a_video_is_a_sheet_of_its_frames():
    video = torch.arange(5).reshape(5, 1, 1, 1).expand(5, 3, 4, 6) / 10
    sheet = contact_sheet(video)
    assert sheet.shape == (3, 2 * 4, 3 * 6)
    assert [sheet[0, 4 * (i // 3), 6 * (i % 3)].item() for i in range(6)] == pytest.approx(
        [0.0, 0.1, 0.2, 0.3, 0.4, 1.0]  # the last place is empty
    )
    long = torch.linspace(0, 1, 33).reshape(33, 1, 1, 1).expand(33, 3, 2, 2)
    assert contact_sheet(long).shape == (3, 6, 6)
    assert contact_sheet(long)[0, -1, -1] == 1
    assert to_pil(video).size == (18, 8)
