"""What CenterNet's decoding says of heat maps made by hand, and its weights of real photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import moves, write
from torch.testing import assert_close

from mmalign.records import Outcome
from mmalign.rewardmodels import load
from mmalign.rewardmodels.detectors import CHANNEL, COCO, CenterNet, ZeroShot, load_detector, peaks
from mmalign.testing import check_reward, prompts_of

WEIGHTS = Path(__file__).parents[2] / "data" / "detector"
needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "centernet.json").is_file(),
    reason="no weights in data/detector: python scripts/fetch_assets.py detector",
)


def test_peaks_are_places_that_no_neighbor_exceeds_and_boxes_lie_around_them():
    heat = torch.zeros(6, 8)
    heat[2, 3], heat[2, 4], heat[5, 7], heat[0, 0] = 0.9, 0.8, 0.6, 0.2
    sides = torch.zeros(6, 8, 4)
    sides[2, 3] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scores, boxes = peaks(heat, sides, stride=4, least=0.3)
    assert scores.tolist() == pytest.approx(
        [0.9, 0.6]
    )  # its neighbor is none, and the last is not sure enough
    assert boxes.tolist() == [[12 - 1, 8 - 2, 12 + 3, 8 + 4], [28, 20, 28, 20]]


def test_the_classes_are_those_of_coco_and_genevals_names_for_three_of_them():
    assert len(COCO) == len(set(COCO)) == 80
    assert [COCO[i] for i in (0, 9, 15, 41, 60, 79)] == [
        "person",
        "traffic light",
        "cat",
        "cup",
        "dining table",
        "toothbrush",
    ]
    assert CHANNEL["computer keyboard"] == CHANNEL["keyboard"] == 66
    assert CHANNEL["computer mouse"] == CHANNEL["mouse"] == 64
    assert CHANNEL["tv remote"] == CHANNEL["remote"] == 65


def red_cats(folder: Path) -> Path:
    """A CenterNet of 64 pixels to which what is red is a cat, 8 pixels to each side."""
    heat = np.zeros((4, 4, 3, 80), np.float16)
    heat[:, :, 0, CHANNEL["cat"]], heat[:, :, 1, CHANNEL["cat"]] = 20 / 16 / 255, -20 / 16 / 255
    constants = {"heat": heat, "level": np.full(80, -10, np.float16)}
    constants |= {"sides": np.zeros((4, 4, 3, 4), np.float16), "far": np.full(4, 8, np.float16)}
    shape = {"shape": {"shape": {"dim": [{"size": str(size)} for size in (1, 64, 64, 3)]}}}
    nodes = [
        ("images", "Placeholder", [], shape),
        ("logits", "_FusedConv2D", ["images", "heat", "level"], moves(4, "SAME", "BiasAdd")),
        ("tower_0/keypoints", "Sigmoid", ["logits"], {}),
        ("tower_0/wh", "_FusedConv2D", ["images", "sides", "far"], moves(4, "SAME", "BiasAdd")),
    ]
    write(folder, "centernet", constants, nodes)
    return folder


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (128, 96), (64, 40)])
def test_boxes_lie_where_things_do_on_pictures_of_any_shape(tmp_path, size):
    height, width = size
    scale = max(size) / 64  # pixels of the picture that one of the network's is
    image = torch.ones(3, *size)
    top, left = 24, 16  # a block that one place of the heat map sees
    image[1:, top : top + int(4 * scale), left : left + int(4 * scale)] = 0
    detector = load_detector(str(red_cats(tmp_path)), "fp32", 0.3, None)
    found = detector(image, ["cat", "dog"])
    assert isinstance(detector, CenterNet)
    (box,) = found["cat"].boxes
    expected = torch.tensor([left - 8 * scale, top - 8 * scale, left + 8 * scale, top + 8 * scale])
    expected = expected.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    assert_close(box, expected, atol=2 * scale, rtol=0)
    assert len(found["dog"].scores) == 0


def test_a_class_that_is_none_of_coco_has_no_verdict(tmp_path):
    made = load("geneval", model=str(red_cats(tmp_path)), clip=None)
    asked = [
        {"include": [{"class": "cats"}]},
        {"include": [{"class": "cat"}], "exclude": [{"class": "dragon"}]},
        {"include": [{"class": "cat", "color": "red"}]},
        {"include": [{"class": "cat"}]},
    ]
    outcome = Outcome(prompts_of(["a", "b", "c", "d"], 1, asked), torch.zeros(4, 3, 64, 64))
    check_reward(made, outcome)
    signal = made(outcome)
    assert signal.valid[:, 0].tolist() == [False, False, False, True]
    cats, dragons, colors = (detail["missing"] for detail in signal.details[:3])
    assert cats == "the detector knows the 80 classes of COCO alone, and not 'cats' (did you mean 'cat'?)"
    assert dragons.endswith("and not 'dragon'")
    assert colors == "the prompt asks for a color, and no CLIP is there to name one: set clip"


def test_a_detector_says_from_which_score_it_counts_and_a_setting_says_otherwise(tmp_path):
    folder = str(red_cats(tmp_path))
    assert load("geneval", model=folder, clip=None)._counting == CenterNet.sure == 0.3
    assert load("geneval", model=folder, clip=None, threshold=0.5)._counting == 0.5
    assert load("geneval", model=folder, clip=None, counting=0.4)._counting == 0.4
    assert ZeroShot.sure == 0.9


# The weights, and photographs of scikit-image


# The best of `tower_0/detections`, by @tensorflow/tfjs 4.22 (backend wasm) on the same 512 x 512 pixels.
TFJS = {
    "astronaut": [
        ("person", 0.60964, [8.346, 8.819, 368.901, 519.552]),
        ("person", 0.26222, [25.551, 17.618, 376.706, 516.552]),
    ],
    "chelsea": [
        ("cat", 0.51775, [-0.510, 88.792, 468.250, 421.446]),
        ("cat", 0.46594, [-0.671, 89.349, 462.599, 421.290]),
        ("cat", 0.42907, [2.214, 90.645, 467.054, 421.422]),
        ("dog", 0.27023, [-0.671, 89.349, 462.599, 421.290]),
    ],
    "coffee": [
        ("cup", 0.60929, [144.688, 98.115, 354.624, 314.594]),
        ("dining table", 0.34220, [137.771, 103.407, 358.414, 353.217]),
    ],
}


def photograph(name: str) -> torch.Tensor:
    data = getattr(pytest.importorskip("skimage.data"), name)()
    left = data[0] if isinstance(data, tuple) else data  # of two eyes
    return torch.from_numpy(np.asarray(left)).permute(2, 0, 1) / 255


@needs_weights
@pytest.mark.parametrize("name", TFJS)
def test_it_finds_what_tensorflow_js_finds(name):
    image = photograph(name)
    height, width = image.shape[1:]
    found = CenterNet(WEIGHTS, "fp32", 0.25, overlap=1.0)(image, COCO)
    told = [
        (one, score, box)
        for one in COCO
        for score, box in zip(found[one].scores, found[one].boxes, strict=True)
    ]
    told.sort(key=lambda row: -row[1])
    assert [row[0] for row in told] == [row[0] for row in TFJS[name]]
    assert_close(
        torch.stack([row[1] for row in told]), torch.tensor([row[1] for row in TFJS[name]]), atol=1e-4, rtol=0
    )
    scale = max(height, width) / 512
    aside = torch.tensor([(max(height, width) - width) // 2, (max(height, width) - height) // 2] * 2)
    known = scale * torch.tensor([row[2] for row in TFJS[name]]) - aside
    known = known.clamp(min=0).minimum(torch.tensor([width, height] * 2))
    assert_close(torch.stack([row[2] for row in told]), known, atol=0.05, rtol=0)


@needs_weights
@pytest.mark.slow
def test_photographs_hold_what_they_hold():
    detector = load_detector(str(WEIGHTS), "fp32", 0.3, None)
    things = {"astronaut": "person", "chelsea": "cat", "coffee": "cup", "stereo_motorcycle": "motorcycle"}
    for name, thing in things.items():
        found = detector(photograph(name), list(things.values()))
        assert [one for one in found if len(found[one].scores)] == [thing], name


def beside(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Two photographs side by side on gray, [3, 512, 512]."""
    canvas = torch.full((3, 512, 512), 0.55)
    for start, image in ((8, left), (264, right)):
        middle = (image.shape[2] - min(image.shape[1:])) // 2
        square = image[:, : min(image.shape[1:]), middle : middle + min(image.shape[1:])]
        small = torch.nn.functional.interpolate(square[None], (240, 240), mode="bilinear", antialias=True)
        canvas[:, 136:376, start : start + 240] = small[0]
    return canvas


@needs_weights
@pytest.mark.slow
def test_it_counts_and_places_what_photographs_show_side_by_side():
    cat, cup = photograph("chelsea"), photograph("coffee")
    made = load("geneval", model=str(WEIGHTS), clip=None)
    two = {
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
        "tag": "counting",
    }
    three = {"include": [{"class": "cat", "count": 3}], "tag": "counting"}
    place = [{"class": "cup", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    pictures = [beside(cat, cat), beside(cat, cat), beside(cat, cup), beside(cup, cat)]
    asked = [two, three, {"include": place, "tag": "position"}, {"include": place, "tag": "position"}]
    outcome = Outcome(prompts_of(["w", "x", "y", "z"], 1, asked), torch.stack(pictures))
    signal = made(outcome)
    assert signal.values[:, 0].tolist() == [1, 0, 1, 0]
    assert signal.details[1]["wrong"] == ["cat: 2 of 3"]
    assert signal.details[3]["wrong"] == ["cat: not left of cup"]
