"""What cannot be judged is refused with one message that names the reward and the mend."""

import pytest
import torch

from mmalign.rewardmodels import load
from mmalign.rewardmodels.inputs import frames, pictures, texts

TWO = ["a red circle", "two squares"]


def nan_in_the_second():
    media = torch.full((2, 3, 64, 64), 0.5)
    media[1, 0, 3, 3] = torch.nan
    return media


PICTURES = r"media must be \[samples, 3, height, width\]"
BAD = {
    "strings": (["a", "b"], TypeError, "judges pictures, and was given list.*with a policy that draws"),
    "one picture": (torch.rand(3, 64, 64), ValueError, PICTURES),
    "one channel": (torch.rand(2, 1, 64, 64), ValueError, PICTURES + r".*got \(2, 1, 64, 64\)"),
    "channels last": (torch.rand(2, 64, 64, 3), ValueError, PICTURES),
    "empty": (torch.rand(2, 3, 0, 0), ValueError, PICTURES),
    "too few": (torch.rand(1, 3, 64, 64), ValueError, r"ask for 2 pictures \(samples x views\), got 1"),
    "bytes": (torch.zeros(2, 3, 64, 64).byte(), ValueError, "must be floats.*torch.uint8; divide by 255"),
    "NaN": (nan_in_the_second(), ValueError, "1 of 2 pictures have NaN .* decode them in fp32"),
    "infinite": (torch.full((2, 3, 64, 64), torch.inf), ValueError, "2 of 2 pictures have NaN or infinite"),
    "other scale": (torch.rand(2, 3, 64, 64) * 2 - 1, ValueError, r"lie in \[0, 1\], got \[-.*clamp them"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_input_is_refused_and_what_would_be_right_is_said(case, outcome_of):
    media, error, said = BAD[case]
    with pytest.raises(error, match=f"^mine.*{said}") as found:
        pictures("mine", outcome_of(media, TWO))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["lab", "jpeg_compressibility", "jpeg_incompressibility"])
@pytest.mark.parametrize("case", BAD)
def test_every_reward_refuses_it_in_its_own_name(name, case, outcome_of):
    media, error, _ = BAD[case]
    with pytest.raises(error, match=f"^{name}"):
        load(name)(outcome_of(media, TWO))


def test_half_precision_and_rounding_at_the_ends_are_fine(outcome_of):
    media = torch.tensor([-1e-4, 1 + 5e-4]).reshape(2, 1, 1, 1).expand(2, 3, 8, 8)
    assert pictures("mine", outcome_of(media, TWO)).unique().tolist() == [0.0, 1.0]
    assert pictures("mine", outcome_of(media.half().clamp(0, 1), TWO)).dtype == torch.float32


def test_a_picture_is_a_video_of_one_frame(outcome_of):
    assert frames("mine", outcome_of(torch.rand(2, 3, 8, 8), TWO)).shape == (2, 1, 3, 8, 8)
    assert frames("mine", outcome_of(torch.rand(2, 5, 3, 8, 8), TWO)).shape == (2, 5, 3, 8, 8)
    with pytest.raises(ValueError, match=r"mine: media must be .* or "):
        frames("mine", outcome_of(torch.rand(2, 3, 5, 8, 8), TWO))


def test_completions_of_a_sample_share_its_prompt(outcome_of):
    assert texts(outcome_of(torch.rand(4, 3, 8, 8), ["a", "b"], views=2)) == ["a", "a", "b", "b"]
