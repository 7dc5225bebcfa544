"""Flow-GRPO on the noise of Flow-CPS (arXiv:2509.05952): the recipe, and that both log-probabilities replay.

The step itself is proven in tests/test_sde.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from methods import N, assert_counts, assert_learns, assert_resumes, run

from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.config import load_config
from mmalign.sde import Noise

ROOT = Path(__file__).resolve().parents[2]
UNSCALED = Noise("cps", 0.8, "unscaled")
CPS = FlowGRPO(steps=5, clip=1e-2, kl=0.0, noise=UNSCALED)


def test_the_recipe_is_flow_grpo_with_the_noise_and_the_log_probability_of_cps():
    method = load_config(ROOT / "assets/recipes/lab_cps.yaml").algorithm
    assert isinstance(method, FlowGRPO)
    assert method.noise == UNSCALED


@pytest.mark.parametrize("noise", [UNSCALED, Noise("cps", 0.8)], ids=["unscaled", "gaussian"])
def test_the_ratio_is_one_before_the_first_update(noise):
    assert run(replace(CPS, noise=noise), updates=1)[1].metrics[0]["ratio_max"] - 1 < 1e-6


def test_forwards():
    assert assert_counts(CPS) == (N * 5, N * 4)


@pytest.mark.parametrize("noise", [UNSCALED, Noise("cps", 0.8), Noise("precise", 1.0), Noise("sage", 0.7)])
def test_it_learns(noise):
    assert_learns(replace(CPS, noise=noise))


def test_it_resumes(tmp_path):
    assert_resumes(CPS, tmp_path)
