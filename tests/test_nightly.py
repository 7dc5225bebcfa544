"""Every lab recipe at full size: twenty iterations within five minutes, and its held-out reward rises.

Hours on two cores: pytest -m nightly tests/test_nightly.py. The same runs make the table of docs/results.md
(assets/experiments/recipes.yaml). Where a rise is smaller than the noise of one seed, the page says so.
"""

import json

import pytest
import yaml
from runs import ROOT

from mmalign.experiments import read_experiment, run

EXPERIMENT = ROOT / "assets/experiments/recipes.yaml"
ARMS = sorted(yaml.safe_load(EXPERIMENT.read_text())["arms"])
PROXY = {"draft", "refl", "srpo"}  # learn from lab_colors
METHODS = """dance_grpo cps mix_grpo g2rpo tempflow_grpo branch_grpo dense_grpo grpo_guard flow_dppo gardo
    diffusion_nft awm dgpo crd diffusion_dpo refl draft srpo pref_grpo distill"""


def test_every_method_of_the_sampling_and_forward_process_is_watched():
    assert set(METHODS.split()) <= set(ARMS)


@pytest.mark.nightly
@pytest.mark.parametrize("arm", ARMS)
def test_the_reward_of_a_recipe_rises(arm, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment = read_experiment(EXPERIMENT)
    assert run(experiment, tmp_path, [arm]) == 0
    found = json.loads((tmp_path / "recipes" / arm / "seed_0" / "report.json").read_text())
    assert found["iterations"] == 20
    seconds = found["seconds"]
    assert seconds["total"] - seconds["setup"] - seconds["evaluation"] < 300
    score = "lab_colors" if arm in PROXY else "soft"
    assert found["heldout"][score]["gain"] > 0
