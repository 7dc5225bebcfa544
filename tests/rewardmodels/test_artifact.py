"""The artifact detector: figures by closed forms, its files, that it learns what damage is and where."""

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from mmalign.lab import compose, render, sample_task
from mmalign.lab.corruptions import SEEN, corrupt
from mmalign.lab.vit import ViT, ViTSize
from mmalign.records import Unit
from mmalign.rewardmodels import load
from mmalign.rewardmodels.artifact import Detector
from mmalign.rewardmodels.artifact_training import (
    auc,
    calibration_error,
    disturbed,
    enlarged,
    evaluate_detector,
    fit_temperature,
    fresh_tower,
    places_of,
    read_labeled,
    train_detector,
)
from mmalign.testing import check_reward

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "assets/lab/artifact"


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = ViT(ViTSize(img_size=64, patch_size=16, embed_dim=16, depth=1, num_heads=2))
    folder = tmp_path_factory.mktemp("tower")
    vit.save(folder)
    return str(folder)


def labeled(
    folder: Path,
    count: int,
    kinds: Sequence[str] = ("checkerboard",),
    strength: float | None = 1.0,
    split: str = "train",
) -> Path:
    """A set of scenes of the lab, each beside itself with damage of one kind after the other."""
    rng, draws = random.Random(0), np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        picture, kind = render(compose(sample_task(rng, split=split), rng)) / 255, kinds[i % len(kinds)]
        found = corrupt(picture, kind, draws, strength)
        for name, pixels in ((f"{i}a.png", picture), (f"{i}b.png", found.picture)):
            Image.fromarray((255 * pixels).round().astype(np.uint8)).save(folder / name)
        Image.fromarray(found.mask).save(folder / f"{i}m.png")
        rows.append({"file": f"{i}a.png", "artifact": False})
        rows.append({"file": f"{i}b.png", "artifact": True, "kind": kind, "mask": f"{i}m.png"})
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_area_under_the_curve_counts_pairs_and_halves_ties():
    assert auc(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])) == pytest.approx(3.5 / 4)


def test_calibration_error_is_the_gap_of_confidence_and_truth():
    sure = torch.tensor([0.95, 0.95, 0.95, 0.95])
    assert calibration_error(sure, torch.tensor([1, 1, 1, 0])) == pytest.approx(0.2, abs=1e-6)
    mixed, truth = torch.tensor([0.05, 0.05, 0.75, 0.75]), torch.tensor([0, 0, 1, 0])
    assert calibration_error(mixed, truth) == pytest.approx(0.5 * 0.05 + 0.5 * 0.25, abs=1e-6)


def test_the_temperature_is_the_one_that_labels_were_drawn_at():
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(20_000, generator=generator)
    labels = torch.rand(20_000, generator=generator) < (logits / 4).sigmoid()
    assert fit_temperature(logits, labels) == pytest.approx(4, rel=0.1)


def test_a_place_is_damaged_from_a_tenth_of_it_on():
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, :6, :6] = True  # 36 of 256 pixels of the first place
    masks[0, 0:2, 16:26] = True  # 20 of 256 of the second
    assert places_of(masks, 4).nonzero().tolist() == [[0, 0]]


def test_pictures_and_masks_are_mirrored_together():
    masks = torch.zeros(64, 8, 8, dtype=torch.bool)
    masks[:, :, :3] = True
    images = masks[:, None].float().expand(-1, 3, -1, -1) * 0.8
    seen, told = disturbed(images, masks, torch.ones(64).bool(), torch.Generator().manual_seed(0))
    assert 10 < told[:, 0, 7].sum() < 54
    middle = [0, 1, 6, 7]  # blur reaches over the edge of the mask
    assert ((seen.mean(1)[..., middle] > 0.4) == told[..., middle]).all()


def test_parts_of_pictures_keep_their_damage_and_its_place():
    random = torch.Generator().manual_seed(0)
    masks = torch.zeros(200, 32, 32, dtype=torch.bool)
    corners = torch.randint(0, 24, (200, 2), generator=random).tolist()
    for mask, (row, column) in zip(masks, corners, strict=True):
        mask[row : row + 8, column : column + 8] = True
    images = masks[:, None].float().expand(-1, 3, -1, -1)
    parts, found = enlarged(images, masks, torch.ones(200).bool(), random)
    assert found.flatten(1).sum(1).min() >= 32
    larger = found.flatten(1).sum(1)
    assert larger.max() > 1.8 * 64
    assert 0.1 < (larger == 64).float().mean() < 0.6  # those that would have lost it, and stay whole
    assert ((parts[:, 0] > 0.5) == found).float().mean() > 0.98
    nowhere = torch.zeros_like(masks)
    same, _ = enlarged(images, nowhere, torch.ones(200).bool(), random)
    assert torch.equal(same, images)
    free, _ = enlarged(images, nowhere, torch.zeros(200).bool(), random)
    assert (free != images).flatten(1).any(1).float().mean() > 0.9


def test_the_logit_is_the_pooled_places_and_the_whole(tower):
    detector = Detector(tower).eval()
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        detector.mix.copy_(torch.tensor([2.0, 0.5]))
        whole, places = detector(images)
        tokens = detector._tower.tokens(images)
        expected = detector.whole(tokens[:, 0])[:, 0] + 2 * places.exp().mean(1).log() + 0.5
    assert_close(whole, expected)
    assert places.shape == (3, 16)


def test_a_folder_gives_the_detector_back_twice(tower, tmp_path):
    detector = Detector(tower).eval()
    detector.temperature = 1.7
    detector.save(tmp_path / "one")
    again = Detector.load(str(tmp_path / "one"))
    again.save(tmp_path / "two")
    images = torch.rand(2, 3, 64, 64)
    for one, other in zip(again(images), Detector.load(str(tmp_path / "two"))(images), strict=True):
        assert_close(one, other, rtol=0, atol=0)
    with torch.no_grad():
        assert_close(again(images)[0], detector(images)[0], atol=5e-3, rtol=5e-3)  # stored in fp16
    assert again.temperature == 1.7


@pytest.mark.slow
def test_a_detector_learns_a_kind_and_its_place(tmp_path):
    fresh_tower(tmp_path / "resnet", side=64, widths=(8, 12, 16))
    tower = str(tmp_path / "resnet")
    data = read_labeled(labeled(tmp_path / "set", 32, ["grain"]))
    detector = train_detector(Detector(tower), data, steps=90, batch=24, lr=3e-3)
    found = evaluate_detector(detector, data)
    assert found["seen"]["auc"] > 0.9
    assert found["seen"]["pointing"] > 0.8
    fresh = evaluate_detector(Detector(tower).eval(), data)
    assert fresh["seen"]["auc"] < 0.8


def test_a_killed_training_goes_on_exactly(tmp_path):
    fresh_tower(tmp_path / "resnet", side=64, widths=(8, 12, 16))
    data = read_labeled(labeled(tmp_path / "set", 8, ["grain"]))
    known = {"steps": 5, "batch": 8, "every": 2}

    def run(log=lambda row: None, **settings):
        return train_detector(Detector(str(tmp_path / "resnet")), data, **known | settings, log=log)

    def killed(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    rows, place = [], tmp_path / "run"
    whole = run(rows.append)
    with pytest.raises(KeyboardInterrupt):
        run(killed, folder=place)
    for _ in range(2):  # the second time there is nothing left to do
        told = []
        again = run(told.append, folder=place)
        assert told == rows
        assert again.temperature == whole.temperature
        for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(one, other), name
    with pytest.raises(ValueError, match=r"training.pt: was begun with other lr: use another --out"):
        run(folder=place, lr=1e-4)


def test_frozen_towers_stay_as_they_are(tower, tmp_path):
    data = read_labeled(labeled(tmp_path / "set", 6))
    detector = Detector(tower)
    before = [p.clone() for p in detector.network.parameters()]
    head = detector.place[1].weight.clone()
    train_detector(detector, data, steps=2, batch=4, frozen=True)
    for one, other in zip(before, detector.network.parameters(), strict=True):
        assert_close(one, other, rtol=0, atol=0)
    assert (detector.place[1].weight != head).any()


def test_the_reward_is_the_calibrated_probability_of_artifact_free(tower, tmp_path, outcome_of):
    detector = Detector(tower).eval()
    detector.temperature = 2.0
    detector.save(tmp_path)
    images = torch.rand(3, 3, 64, 64)
    whole, places = Detector.load(str(tmp_path))(images)
    outcome = outcome_of(images, ["a", "b", "c"])
    reward = load("artifact", detector=str(tmp_path))
    check_reward(reward, outcome)
    assert_close(reward(outcome).values[:, 0], 1 / (1 + (whole / 2).exp()))
    regions = load("artifact", detector=str(tmp_path), grain="region")
    check_reward(regions, outcome)
    signal = regions(outcome)
    assert signal.unit is Unit.REGION
    assert_close(signal.values, 1 / (1 + (places / 2).exp()))
    assert signal.where.mask[0].sum(0).eq(1).all()  # every place is spoken of once
    leaf = images.clone().requires_grad_()
    reward.differentiate(outcome_of(leaf, ["a", "b", "c"])).sum().backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"file": "0a.png"}], "labels.jsonl:1: needs a file, and artifact true or false"),
        ([{"file": "0a.png", "artifact": True}], "needs pictures with artifacts and without"),
    ],
)
def test_labels_that_teach_nothing_are_refused(tmp_path, rows, said):
    folder = labeled(tmp_path / "set", 1)
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=said):
        read_labeled(folder)


def test_a_folder_without_a_detector_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no detector"):
        load("artifact", detector=str(tmp_path))
    with pytest.raises(ValueError, match="grain must be one of sample, region"):
        load("artifact", grain="token")


def test_the_shipped_detector_is_small_and_knows_kinds_it_was_taught(tmp_path):
    """On held-out scenes, with damage of all strengths: no scene and no draw that it was trained on."""
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 1_500_000
    data = read_labeled(labeled(tmp_path / "set", 12 * len(SEEN), SEEN, strength=None, split="heldout"))
    found = evaluate_detector(Detector.load(str(SHIPPED)), data)
    assert found["seen"]["auc"] >= 0.95
    assert found["seen"]["pointing"] > 0.9
    assert found["kinds"].keys() == set(SEEN)
    assert min(kind["auc"] for kind in found["kinds"].values()) > 0.85


@pytest.mark.parametrize("kind", ["blobs", "checkerboard", "oversharpening"])
def test_the_more_damage_the_lower_the_reward(kind, outcome_of):
    rng, draws = random.Random(0), np.random.default_rng(0)
    pictures = [render(compose(sample_task(rng), rng)) / 255 for _ in range(24)]
    reward, means = load("artifact", detector=str(SHIPPED)), []
    for strength in (0.0, 0.2, 0.5, 1.0):
        found = [corrupt(p, kind, draws, strength).picture if strength else p for p in pictures]
        media = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float()
        values = reward(outcome_of(media, [str(i) for i in range(24)])).values
        means.append(float(values.mean()))
    assert all(more < less + 1e-4 for less, more in pairwise(means))  # a sure detector says 0 early
    assert means[0] > means[-1] + 0.3
