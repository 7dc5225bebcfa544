"""Processes that exchange gradients do not wait for those of weights that a forward leaves unread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import qwen, wan
from in_part import POLICIES, learn
from launched import together
from torch.testing import assert_close

from mmalign.distributed import Distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models with random weights, each in the folder of its name."""
    home = tmp_path_factory.mktemp("models")
    for name, build in {"experts": lambda: wan(experts=True), "qwen": qwen}.items():
        torch.manual_seed(0)
        build().save_pretrained(home / name)
    return home


@pytest.fixture(scope="module")
def ranks(models: Path) -> list[dict[str, Any]]:
    """What each of two processes found."""
    together("tests/in_part.py", str(models))
    return [torch.load(models / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_two_processes_train_what_a_forward_reads_in_part_as_one_does(models, ranks, name):
    """Experts of two times, and all weights of a network whose last block makes what nothing reads."""
    one, (first, second) = learn(models, name, Distributed("cpu")), [found[name] for found in ranks]
    assert one["weights"].keys() == first["weights"].keys()
    for key, weight in one["weights"].items():
        assert torch.equal(first["weights"][key], second["weights"][key]), key
        assert_close(first["weights"][key], weight, atol=2e-4, rtol=0)  # six steps of 1e-3
