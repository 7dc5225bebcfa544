"""A composition and weights by iteration in a recipe: read, written again, refused where they are wrong."""

import json

import pytest
import yaml
from runs import ROOT, small

from mmalign.assembly import compose, make_rewards
from mmalign.cli import main
from mmalign.compositions import COMPOSITIONS
from mmalign.config import ConfigError, load_config

RECIPE = ROOT / "assets/recipes/lab_marble.yaml"
GIVEN = {
    "weighted_sum": {},
    "gdpo": {"standardize": False},
    "marble": {"every": 5, "shares": "equal"},
    "product": {"primary": "lab", "ranges": {"contrast": [0, 0.3]}, "least": {"lab": 0.1}},
    "gated": {
        "order": ["lab", "lab_colors", "contrast", "clip_score", "artifact"],
        "above": {"lab": 0.5, "lab_colors": 0.1, "contrast": 0.1, "clip_score": 1.0},
    },
    "log_sigmoid": {"references": "references.json", "temperature": {"lab": 0.5}},
    "ordered": {
        "order": ["lab", "lab_colors", "contrast", "clip_score", "artifact"],
        "margin": {"lab": 0.2},
    },
    "constrained": {"limits": {"artifact": {"below": 0.5, "rate": 0.05}}},
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_is_read_and_written_again(name, tmp_path):
    said = json.dumps({"name": name, **GIVEN[name]})
    config = load_config(RECIPE, [f"composition={said}"])
    assert config.composed == name
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again).composition == config.composition
    if name != "log_sigmoid":
        compose(config, make_rewards(config)[1], [])


def test_without_one_the_method_adds_up_as_it_does():
    config = load_config(RECIPE, ["composition=null"])
    assert config.composition is None
    assert config.to_dict()["composition"] is None


@pytest.mark.parametrize("said", ["{0: 0.5, 20: 1.0}", "{weight: {0: 0.5, 20: 1.0}}"])
def test_a_weight_may_change_over_the_iterations(said, tmp_path):
    config = load_config(RECIPE, [f"rewards.lab={said}"])
    assert config.rewards["lab"].schedule == {0: 0.5, 20: 1.0}
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(again).rewards == config.rewards


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("composition={name: marbel}", "no composition 'marbel'; did you mean 'marble'"),
        ("composition={every: 3}", "composition.name is missing"),
        ("composition={name: marble, evry: 3}", "has no setting 'evry'; did you mean 'every'"),
        ("composition={name: marble, keep: 1.0}", r"keep must lie in \[0, 1\)"),
        ("composition={name: product}", "composition.primary is missing"),
        ("composition={name: constrained, limits: {lab: {rate: 0.1}}}", "exactly one of below and above"),
        ("rewards.lab={weight: {0: much}}", "the weight must be a number"),
        ("rewards.lab={weight: {-1: 1.0}}", "the weight must be a number"),
    ],
)
def test_what_is_wrong_with_it_is_said(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPE, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("composition={name: product, primary: conse}", "composition.primary speaks of conse"),
        ("composition={name: ordered, order: [lab]}", "must name each reward with a weight once"),
        ("composition={name: log_sigmoid, references: none.json}", "there is no file none.json"),
    ],
)
def test_what_does_not_fit_the_rewards_is_said_before_a_model_is_loaded(override, message):
    config = load_config(RECIPE, [override])
    with pytest.raises(ConfigError, match=message):
        compose(config, make_rewards(config)[1], [])


@pytest.mark.slow
def test_a_run_with_gates_and_a_weight_that_rises(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    gated = json.dumps({"name": "gated", **GIVEN["gated"]})
    more = [f"composition={gated}", "rewards.contrast={0: 0.0, 1: 1.0}", "rewards.lab=1.0"]
    assert main(["train", "--config", str(RECIPE), *small(tmp_path / "run", *more)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["weight/contrast"] for row in rows] == [0.0, 1.0]
    assert all(0 <= row["composition/open/lab"] <= 1 for row in rows)
