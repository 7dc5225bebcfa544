"""Methods that learn from noise refuse to go without, also those of a user's own."""

from dataclasses import fields, replace
from importlib import import_module

import pytest

from mmalign.algorithms import ALGORITHMS
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.assembly import check_noise
from mmalign.config import ConfigError
from mmalign.sde import Noise


def made(place: str) -> type:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


METHODS = {name: made(place) for name, place in ALGORITHMS.items()}
NOISY = {name: method for name, method in METHODS.items() if "noise" in [f.name for f in fields(method)]}


def test_those_that_learn_from_noise_are_found():
    assert {"flow_grpo", "flow_grpo_fast", "dance_grpo", "mix_grpo", "ddpo"} <= set(NOISY)


@pytest.mark.parametrize("name", NOISY)
def test_a_method_says_that_it_needs_noise(name):
    with pytest.raises(ValueError, match=r"needs noise.*: noise\.level must be above 0"):
        NOISY[name](noise=Noise("flow", 0.0))


def test_a_run_of_a_method_that_does_not_say_so_is_refused():
    algorithm = FlowGRPO().build({"lab": 1.0})
    check_noise(algorithm, 0)
    with pytest.raises(ConfigError, match=r"algorithm\.noise\.level is 0, but the algorithm learns"):
        check_noise(replace(algorithm, noise=Noise("flow", 0.0)), 0)
