"""Faces by networks made by hand, to which blocks of color are some, and by the weights on photographs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import moves, write
from PIL import Image, ImageFilter
from torch.nn import functional as F
from torch.testing import assert_close

from mmalign import assembly
from mmalign.config import ConfigError, load_config
from mmalign.records import Outcome, Unit
from mmalign.rewardmodels import load
from mmalign.rewardmodels.face_identity import references
from mmalign.rewardmodels.faces import DESCRIPTOR, FLAG, HEADS, MEANS, Faces, anchors, cut, decoded
from mmalign.testing import check_reward, prompts_of

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "data" / "faces"
needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "faceres.json").is_file(),
    reason="no weights in data/faces: python scripts/fetch_assets.py faces",
)
RED, YELLOW, PURPLE = (1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0)


# Arithmetic


def test_anchors_are_the_middles_of_two_grids():
    found = anchors(256)
    assert found.shape == (2 * 16 * 16 + 6 * 8 * 8, 2)
    assert found[:5].tolist() == [[8, 8], [8, 8], [24, 8], [24, 8], [40, 8]]
    assert found[32].tolist() == [8, 24]  # x comes first, and rows go down
    assert found[510:514].tolist() == [[248, 248], [248, 248], [16, 16], [16, 16]]
    assert found[-1].tolist() == [240, 240]


def test_a_box_lies_around_its_anchor():
    told = [
        torch.zeros(1, 16, 16, 2),
        torch.zeros(1, 8, 8, 6),
        torch.zeros(1, 16, 16, 32),
        torch.zeros(1, 8, 8, 96),
    ]
    told[0][0, 2, 5, 1] = 3.0
    told[2][0, 2, 5, 16:20] = torch.tensor([4.0, -2.0, 10.0, 20.0])
    told[1][0, 7, 1, 5] = -1.0
    told[3][0, 7, 1, 80:84] = torch.tensor([1.0, 1.0, 64.0, 64.0])
    scores, boxes = decoded(told, 256)
    fine, coarse = (2 * 16 + 5) * 2 + 1, 512 + (7 * 8 + 1) * 6 + 5
    assert scores[0, [fine, coarse, 0]].tolist() == pytest.approx([0.95257, 0.26894, 0.5], abs=1e-5)
    # The middles of both cells are (88, 40) and (48, 240).
    assert boxes[0, fine].tolist() == [92 - 5, 38 - 10, 92 + 5, 38 + 10]
    assert boxes[0, coarse].tolist() == [49 - 32, 241 - 32, 49 + 32, 241 + 32]


def test_a_cut_of_whole_pixels_is_those_pixels():
    image = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    found = cut(
        image, torch.tensor([[8.0, 5.0, 14.0, 13.0]]), margin=1.0, side=8
    )  # as long as its longer side
    assert_close(found, image[:, :, 5:13, 7:15])


@pytest.mark.parametrize("side", [7, 10, 33])
def test_a_cut_is_drawn_as_torch_resizes_with_antialiasing(side):
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = cut(image, torch.tensor([[4.0, 4.0, 12.0, 12.0]]), margin=1.25, side=side)
    wanted = F.interpolate(image[..., 3:13, 3:13], (side, side), mode="bilinear", antialias=True)
    rim = -(-side // 10)  # what is drawn there also sees pixels that torch is not shown
    assert_close(found[..., rim:-rim, rim:-rim], wanted[..., rim:-rim, rim:-rim])


def test_a_cut_may_begin_inside_of_a_pixel_and_is_black_beside_the_picture():
    ramp = (torch.arange(12) + 0.5).expand(1, 3, 12, 12)  # a pixel is as bright as its middle lies right
    inner = cut(ramp, torch.tensor([[2.3, 4.0, 8.3, 10.0]]), margin=1.0, side=12)
    assert_close(inner[0, 0, 5], 2.3 + 0.5 * (torch.arange(12) + 0.5))
    outer = cut(torch.ones(1, 3, 12, 12), torch.tensor([[-6.0, 3.0, 6.0, 9.0]]), margin=1.0, side=12)
    assert_close(outer[0, 0, 5], torch.tensor([0.0] * 6 + [1.0] * 6))
    assert not cut(ramp, torch.tensor([[90.0, 90.0, 99.0, 99.0]]), margin=1.0, side=4).any()


def test_gradients_of_a_cut_reach_pixels():
    image = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    boxes = torch.tensor([[0.5, 1.0, 4.0, 3.0], [-1.0, 2.0, 3.0, 5.5]]).double()
    assert torch.autograd.gradcheck(lambda x: cut(x, boxes, 1.4, 4), image)


# Networks made by hand


def networks(folder: Path) -> Path:
    """Three networks to which blocks of 16 pixels in cells of 16 are faces, on pictures of 256 pixels.

    Boxes of red blocks are 16 pixels wide, of yellow ones 32; what is purple is refused at the second look.
    A descriptor is what green and red exceed their means by.
    """
    red, green = np.zeros((16, 16, 3, 2)), np.zeros((16, 16, 3, 2))
    red[:, :, 0] = 1 / 256
    green[:, :, 1] = 1 / 256
    boxes = np.zeros(32)
    boxes[2:4], boxes[18:20] = 16, 32
    constants = {
        "kernel": 8 * (red + green * np.array([-1, 1])),  # of pixels from -1 to 1
        "level": np.full(2, -8.0),
        "none": np.zeros((32, 32, 3, 6)),
        "low": np.full(6, -20.0),
        "still": np.zeros((16, 16, 3, 32)),
        "sizes": boxes,
        "far": np.zeros((32, 32, 3, 96)),
        "nowhere": np.zeros(96),
    }
    shape = {"shape": {"shape": {"dim": [{"size": str(size)} for size in (1, 256, 256, 3)]}}}
    nodes = [
        ("input", "Placeholder", [], shape),
        (HEADS[0], "_FusedConv2D", ["input", "kernel", "level"], moves(16, "SAME", "BiasAdd")),
        (HEADS[1], "_FusedConv2D", ["input", "none", "low"], moves(32, "SAME", "BiasAdd")),
        (HEADS[2], "_FusedConv2D", ["input", "still", "sizes"], moves(16, "SAME", "BiasAdd")),
        (HEADS[3], "_FusedConv2D", ["input", "far", "nowhere"], moves(32, "SAME", "BiasAdd")),
    ]
    halves = {name: values.astype(np.float16) for name, values in constants.items()}
    write(folder, "blazeface", halves, nodes)
    blue = np.zeros((1, 1, 3, 1), np.float16)
    blue[0, 0, 2] = -40
    shape = {"shape": {"shape": {"dim": [{"size": str(size)} for size in (-1, 192, 192, 3)]}}}
    nodes = [
        ("input", "Placeholder", [], shape),
        ("mean", "Mean", ["input", "axes"], {"keep_dims": {"b": True}}),
        ("logit", "_FusedConv2D", ["mean", "blue", "level"], moves(1, "SAME", "BiasAdd")),
        (FLAG, "Sigmoid", ["logit"], {}),
    ]
    axes = np.array([1, 2], np.int32)
    write(folder, "facemesh", {"axes": axes, "blue": blue, "level": np.full(1, 4, np.float16)}, nodes)
    shape = {"shape": {"shape": {"dim": [{"size": str(size)} for size in (-1, 224, 224, 3)]}}}
    nodes = [
        ("input", "Placeholder", [], shape),
        ("above", "Relu", ["input"], {}),
        (DESCRIPTOR, "Mean", ["above", "axes"], {"keep_dims": {"b": False}}),
    ]
    write(folder, "faceres", {"axes": axes}, nodes)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The networks, and pictures of who is asked for."""
    place = networks(tmp_path_factory.mktemp("faces"))
    for name, color in (("red", RED), ("yellow", YELLOW), ("cat", PURPLE)):
        picture = shown({(3, 4): color}).permute(1, 2, 0).mul(255).round().byte().numpy()
        Image.fromarray(picture).save(place / f"{name}.png")
    return place


def shown(blocks: dict[tuple[int, int], tuple[float, float, float]]) -> torch.Tensor:
    """A black picture with blocks of color by the row and column of their cell, [3, 256, 256]."""
    image = torch.zeros(3, 256, 256)
    for (row, column), color in blocks.items():
        image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = torch.tensor(color)[
            :, None, None
        ]
    return image


def asked(folder: Path, *names: str) -> dict:
    files = [str(folder / f"{name}.png") for name in names]
    return {"reference_image": files[0] if len(files) == 1 else files}


# By hand: a descriptor holds what of 255 lies above the means of blue, green and red.
OVER = 255 - torch.tensor(MEANS)
SELF = {
    "red": F.normalize(OVER * torch.tensor([0, 0, 1]), dim=0),
    "yellow": F.normalize(OVER * torch.tensor([0, 1, 1]), dim=0),
}
APART = float(SELF["red"] @ SELF["yellow"])


def test_the_largest_face_is_compared_with_the_reference(folder):
    pictures = [
        shown({(2, 3): RED}),
        shown({(2, 3): YELLOW}),
        shown({(2, 3): RED, (9, 9): YELLOW}),  # the box of the second is larger
        shown({(2, 3): RED, (9, 9): PURPLE}),
    ]
    extra = [asked(folder, name) for name in ("red", "red", "yellow", "red")]
    outcome = Outcome(prompts_of(["a", "b", "c", "d"], 1, extra), torch.stack(pictures))
    reward = load("face_identity", model=str(folder))
    check_reward(reward, outcome)
    signal = reward(outcome)
    assert signal.unit is Unit.SAMPLE
    assert_close(signal.values[:, 0], torch.tensor([1.0, APART, 1.0, 1.0]), atol=2e-3, rtol=0)
    assert [detail["faces"] for detail in signal.details] == [1, 1, 2, 1]
    assert all(detail["found"] for detail in signal.details)
    assert signal.details[0]["box"] == [48, 32, 64, 48]
    assert signal.details[2]["box"] == [136, 136, 168, 168]
    assert signal.details[0]["score"] == pytest.approx(torch.tensor(4.0).sigmoid().item(), abs=1e-3)


def test_a_picture_without_a_face_has_the_lowest_value_and_a_verdict(folder):
    pictures = torch.stack([shown({}), shown({(2, 3): PURPLE}), torch.ones(3, 256, 256)])
    outcome = Outcome(prompts_of(["a", "b", "c"], 1, [asked(folder, "red")] * 3), pictures)
    signal = load("face_identity", model=str(folder))(outcome)
    assert signal.values[:, 0].tolist() == [0, 0, 0]
    assert signal.valid.all()
    assert signal.details == [{"found": False, "faces": 0}] * 3


@pytest.mark.parametrize("size", [(256, 256), (256, 384), (384, 256), (512, 512)])
def test_boxes_lie_where_faces_do_on_pictures_of_any_shape(folder, size):
    height, width = size
    scale = max(size) / 256  # pixels of the picture that one of the network's is
    cell = int(16 * scale)
    left, top = 5 * cell - (max(size) - width) // 2, 6 * cell - (max(size) - height) // 2
    image = torch.zeros(3, *size)
    image[0, top : top + cell, left : left + cell] = 1
    ((face,),) = Faces(folder, 0.3).find(image[None])
    assert_close(face.box, torch.tensor([left, top, left + cell, top + cell]).float(), atol=1e-3, rtol=0)


def test_several_references_are_one_person(folder):
    extra = [
        asked(folder, "red", "yellow"),
        {"source": [asked(folder, "yellow")["reference_image"], "other.png"]},
    ]
    pictures = torch.stack([shown({(2, 3): RED})] * 2)
    found = load("face_identity", model=str(folder))(Outcome(prompts_of(["a", "b"], 1, extra), pictures))
    middle = F.normalize(SELF["red"] + SELF["yellow"], dim=0)
    wanted = torch.stack([SELF["red"] @ middle, SELF["red"] @ SELF["yellow"]])
    assert_close(found.values[:, 0], wanted, atol=2e-3, rtol=0)


def test_which_pictures_a_prompt_is_compared_with():
    assert references({"reference_image": "a.png", "source": "b.png"}) == ["a.png"]
    assert references({"reference_image": ["a.png", "c.png"]}) == ["a.png", "c.png"]
    assert references({"source": ["b.png", "c.png"]}) == ["b.png"]
    assert references({"source": "b.png"}) == ["b.png"]
    assert not references({})
    assert not references({"reference_image": 3})
    assert not references({"source": []})


def test_what_references_lack_is_said_before_anything_is_drawn(folder, tmp_path, monkeypatch):
    reward = load("face_identity", model=str(folder))
    reward.read_ahead(prompts_of(["a"], 1, [asked(folder, "red")]))
    with pytest.raises(ValueError, match=r"no face is found on the reference .*cat\.png; take a picture"):
        reward.read_ahead(prompts_of(["a", "b"], 1, [asked(folder, "red"), asked(folder, "cat")]))
    with pytest.raises(ValueError, match="prompt 'b' names no \"reference_image\""):
        reward(Outcome(prompts_of(["b"], 1), torch.zeros(1, 3, 64, 64)))

    def refused(*_: object) -> None:
        raise AssertionError("the policy is loaded first")

    monkeypatch.setattr(assembly, "make_policy", refused)
    lines = {
        name: json.dumps({"prompt": "a portrait", "reference_image": str(folder / f"{name}.png")})
        for name in ("red", "cat")
    }
    (tmp_path / "train.jsonl").write_text(lines["red"])
    direct = {"face_identity": {"model": str(folder)}}
    by_frame = {"framewise": {"of": "face_identity", "settings": {"model": str(folder)}}}
    for rewards in (direct, by_frame):
        said = [f"rewards.{name}={json.dumps(value)}" for name, value in rewards.items()]
        said += [f"prompts.file={tmp_path}/train.jsonl", f"prompts.heldout_file={tmp_path}/heldout.jsonl"]
        config = load_config(ROOT / "assets/recipes/lab_draft.yaml", [*said, "prompts.per_iteration=1"])
        (tmp_path / "heldout.jsonl").write_text(lines["red"])
        with pytest.raises(AssertionError, match="the policy is loaded first"):
            assembly.assemble(config, write=False)
        (tmp_path / "heldout.jsonl").write_text(lines["cat"])
        with pytest.raises(ConfigError, match=r"prompts: face_identity: no face is found on .*cat\.png"):
            assembly.assemble(config, write=False)


def test_it_is_differentiated_around_the_face_and_nowhere_else(folder):
    reward = load("face_identity", model=str(folder))
    pictures = torch.stack([shown({(2, 3): YELLOW}), shown({}), shown({(9, 9): RED})])
    pictures = (0.01 + 0.98 * pictures).requires_grad_()  # pixels at the ends of their range have no slope
    outcome = Outcome(prompts_of(["a", "b", "c"], 1, [asked(folder, "red")] * 3), pictures)
    value = reward.differentiate(outcome)
    assert_close(value, reward(outcome).values[:, 0])
    value.sum().backward()
    slope = pictures.grad
    assert not slope[1].any()
    # Less green is more like the one who is red. The square around (56, 40) is 1.4 times 32 pixels long.
    assert slope[0, 1, 32:48, 48:64].max() < 0 < slope[0, 0, 32:48, 48:64].min()
    slope[0, :, 40 - 23 : 40 + 23, 56 - 23 : 56 + 23] = 0
    assert not slope[0].any()
    alone = torch.zeros(1, 3, 64, 64, requires_grad=True)
    reward.differentiate(Outcome(prompts_of(["a"], 1, [asked(folder, "red")]), alone)).sum().backward()
    assert not alone.grad.any()


def test_frames_of_a_video_are_judged_one_by_one(folder):
    video = torch.stack([shown({(2, 3): RED}), shown({(2, 3): YELLOW}), shown({})])[None]
    reward = load("framewise", of="face_identity", settings={"model": str(folder)})
    signal = reward(Outcome(prompts_of(["a"], 1, [asked(folder, "red")]), video))
    assert signal.unit is Unit.FRAME
    assert_close(signal.values, torch.tensor([[1.0, APART, 0.0]]), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"threshold": 0.0}, "threshold must lie between 0 and 1, got 0.0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        (
            {"model": "nowhere"},
            r"model: nowhere has no blazeface\.json, facemesh\.json, faceres\.json; python scripts/fetch",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(folder, settings, wrong):
    with pytest.raises(ValueError, match=f"face_identity: {wrong}"):
        load("face_identity", **{"model": str(folder), **settings})


# The weights, and photographs of scikit-image


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(pytest.importorskip("skimage.data"), name)()).convert("RGB")


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


# By @tensorflow/tfjs 4.22 (backend cpu) on the same pixels: the best score, its box, and six numbers of the
# descriptor, which is made of length 1.
PLACES = [18, 100, 180, 463, 534, 729]
TFJS = {
    "astronaut": (
        0.88509,
        [171.424, 73.396, 277.810, 179.783],
        [0.11679, 0.12058, 0.12751, 0.12181, 0.13083, 0.13426],
    ),
    "camera": (0.77498, [181.244, 126.437, 254.809, 200.003], [0.00317, 0.0, 0.12506, 0.05411, 0.0, 0.01824]),
}


@needs_weights
@pytest.mark.parametrize("name", TFJS)
def test_faces_are_those_of_tensorflow_js(name):
    score, box, known = TFJS[name]
    image, faces = pixels(photograph(name)), Faces(WEIGHTS, 0.5)
    ((face,),) = faces.find(image)
    assert face.score == pytest.approx(score, abs=1e-4)
    assert_close(face.box, torch.tensor(box), atol=0.01, rtol=0)
    with torch.no_grad():
        told = faces.describe(image, face.box[None])[0]
    assert_close(told[PLACES], torch.tensor(known), atol=1e-4, rtol=0)
    assert told.norm() == pytest.approx(1)
    assert told.min() >= 0


def changed(picture: Image.Image) -> dict[str, torch.Tensor]:
    """A portrait, of the same person still."""
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=20)
    return {
        "darker": pixels(picture) * 0.6,
        "brighter": (pixels(picture) * 1.3).clamp(0, 1),
        "mirrored": pixels(picture).flip(3),
        "blurred": pixels(picture.filter(ImageFilter.GaussianBlur(2))),
        "cut": pixels(picture.crop((110, 20, 390, 300))),
        "turned": pixels(picture.rotate(15)),
        "gray": pixels(picture.convert("L").convert("RGB")),
        "packed": pixels(Image.open(packed).convert("RGB")),
    }


def people(first: int, count: int) -> torch.Tensor:
    """Faces of LFW of 25 pixels a side, made larger, on gray; from 100 on no faces, [n, 3, 224, 224]."""
    given = pytest.importorskip("skimage.data").lfw_subset()[first : first + count]
    large = F.interpolate(torch.from_numpy(given)[:, None].float(), (144, 144), mode="bicubic").clamp(0, 1)
    return F.pad(large, [40] * 4, value=0.5).expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def likeness(tmp_path_factory):
    """What the reward says of pictures [n, 3, H, W], compared with the astronaut, [n]."""
    file = tmp_path_factory.mktemp("who") / "astronaut.png"
    photograph("astronaut").save(file)
    reward = load("face_identity", model=str(WEIGHTS))

    def of(pictures: torch.Tensor) -> torch.Tensor:
        extra = [{"reference_image": str(file)}] * len(pictures)
        outcome = Outcome(prompts_of(["a portrait"] * len(pictures), 1, extra), pictures)
        return reward.differentiate(outcome) if pictures.requires_grad else reward(outcome).values[:, 0]

    return of


@needs_weights
@pytest.mark.slow
def test_a_person_is_more_like_herself_than_like_others(likeness):
    same = {name: float(likeness(image)) for name, image in changed(photograph("astronaut")).items()}
    others = torch.cat([likeness(people(0, 9)), likeness(pixels(photograph("camera")))])
    assert min(same.values()) > 0.8, same
    assert 0.2 < others.min() <= others.max() < 0.5


@needs_weights
@pytest.mark.slow
def test_small_faces_are_told_apart_and_what_is_none_is_not_taken_for_one():
    faces = Faces(WEIGHTS, 0.5)
    told = []
    for images in (people(10, 8), people(10, 8).flip(3) * 0.7):
        found = faces.find(images)
        assert all(len(one) == 1 for one in found)
        with torch.no_grad():
            told.append(faces.describe(images, torch.stack([one[0].box for one in found])))
    alike = told[1] @ told[0].T
    assert alike.argmax(1).tolist() == list(range(8))
    assert alike.diagonal().min() > alike[~torch.eye(8, dtype=torch.bool)].max()
    assert not any(faces.find(people(100, 8)))


@needs_weights
@pytest.mark.slow
@pytest.mark.parametrize("name", ["chelsea", "coffee", "coins"])
def test_photographs_without_a_person_have_the_lowest_value(likeness, name):
    # BlazeFace alone is sure of a face on the first two: of a cat at 0.80, of a cup at 0.66.
    assert likeness(pixels(photograph(name))).tolist() == [0]


@needs_weights
@pytest.mark.slow
def test_the_gradient_leads_to_the_person(likeness):
    image = (0.01 + 0.98 * pixels(photograph("camera"))).requires_grad_()
    before = likeness(image)
    before.sum().backward()
    with torch.no_grad():
        moved = (image + 0.01 * image.grad.sign()).clamp(0, 1)
    assert float(likeness(moved)) > float(before.detach()) + 0.1
