"""Rewards are found by name, made with checked settings, and may be a user's own file."""

import itertools
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from mmalign.records import Unit
from mmalign.rewardmodels import REWARDS, load
from mmalign.testing import check_reward

ROOT = Path(__file__).resolve().parents[2]
OWN = """
from mmalign.records import RewardSignal

class Constant:
    name = "constant"
    def __init__(self, value, scale=1.0):
        self.value = value * scale
    def __call__(self, outcome):
        return RewardSignal(self.name, outcome.media.new_full((len(outcome.media), 1), self.value))

class Nameless:
    def __call__(self, outcome): ...

NUMBER = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with the package of a user, as the working directory."""
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "my_reward.py").write_text(OWN)
    (tmp_path / "my_pkg" / "hungry.py").write_text("import a_package_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield tmp_path
    for module in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[module]


@pytest.mark.parametrize("name", [name for name in REWARDS if name not in ("framewise", "remote")])
def test_every_reward_carries_the_name_of_its_entry(name):
    module, _, kind = REWARDS[name].partition(":")
    assert getattr(import_module(module), kind).name == name


def test_every_reward_has_a_row_with_its_range_and_unit_in_the_docs():
    lines = (ROOT / "docs/rewards.md").read_text().splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| name | judges | range | unit |")))
    columns = [cell.strip() for cell in lines[start].strip("|").split("|")]
    rows = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == len(columns), line
        rows |= {name: dict(zip(columns, cells, strict=True)) for name in re.findall(r"`(\w+)`", cells[0])}
    assert rows.keys() == REWARDS.keys()
    for name, row in rows.items():
        assert row["range"].strip("–"), name
        units = {unit.value[0] for unit in Unit} | {"own"}  # that of another reward
        assert units & set(re.findall(r"\w+", row["unit"])), name


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="'jpeg_compresibility'; did you mean 'jpeg_compressibility'"):
        load("jpeg_compresibility")


def test_an_unknown_setting_is_answered_with_the_nearest_and_all_valid_ones():
    with pytest.raises(ValueError, match=r"lab has no setting 'mesure'; .* 'measure'\? .*grain, measure"):
        load("lab", mesure="soft")


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("lab", {"measure": "hard"}, "measure must be one of soft, strict, mix, got 'hard'"),
        ("lab", {"grain": "token"}, "grain must be one of sample, criterion"),
        ("jpeg_compressibility", {"quality": 0}, "jpeg_compressibility: quality must lie in 1..95, got 0"),
        ("conse", {"top": 0}, "top must lie in 1..1000"),
        ("conse", {"template": "a photo"}, "template must hold {}"),
        ("conse", {"precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
        ("conse", {"batch": 0}, "batch must be at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_weights_load(name, settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load(name, **settings)


def test_a_reward_of_ones_own_is_found_in_the_working_directory(own, outcome_of):
    reward = load("my_pkg.my_reward:Constant", value=2.0, scale=1.5)
    assert reward(outcome_of(torch.zeros(2, 3, 4, 4), ["a", "b"])).values.tolist() == [[3.0], [3.0]]


@pytest.mark.parametrize(
    ("path", "settings", "error", "said"),
    [
        ("my_pkg.my_reward:Constant", {}, ValueError, "needs the setting 'value'"),
        (
            "my_pkg.my_reward:Constant",
            {"value": 1, "scal": 2},
            ValueError,
            "no setting 'scal'; did you",
        ),
        ("my_pkg.my_reward:Konstant", {}, ValueError, "has no 'Konstant'; did you mean 'Constant'"),
        ("my_pkg.my_reward:Nameless", {}, TypeError, "a reward has a name"),
        ("my_pkg.my_reward:NUMBER", {}, TypeError, "expected the class of a reward, got a int"),
        ("my_pkg.another:Constant", {}, ValueError, "there is no module 'my_pkg.another'"),
        ("nowhere.at_all:Constant", {}, ValueError, "there is no module 'nowhere'"),
        ("my_pkg/my_reward.py:Constant", {}, ValueError, "write my_pkg.my_reward:MyReward"),
        ("my_pkg.hungry:Constant", {}, ModuleNotFoundError, "a_package_that_is_not_there"),
    ],
)
def test_what_is_wrong_with_ones_own_reward_is_said(own, path, settings, error, said):
    with pytest.raises(error, match=re.escape(said)):
        load(path, **settings)


def test_the_example_of_the_docs_is_a_reward(monkeypatch, outcome_of):
    monkeypatch.chdir(ROOT)
    reward = load("docs.examples.my_reward:Brightness", wanted=0.75)
    media = torch.tensor([0.0, 0.5, 0.75]).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)
    assert reward(outcome_of(media, ["a", "b", "c"])).values[:, 0].tolist() == [-0.75, -0.25, 0.0]
    check_reward(reward, outcome_of(media, ["a", "b", "c"]))
