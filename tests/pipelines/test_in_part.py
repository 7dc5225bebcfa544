"""Processes do not wait for each other's weights where a forward leaves some unread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import qwen, wan
from in_part import POLICIES, learn
from launched import together
from runs import ROOT, small
from torch.testing import assert_close

from mmalign.cli import main
from mmalign.distributed import Distributed

PROMPTS = {"file": "train", "heldout_file": "heldout"}


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


@pytest.mark.slow
def test_experts_that_are_sharded_learn_what_whole_ones_do(models, tmp_path, monkeypatch):
    """The two processes are at times of different experts, and a forward of one takes both processes."""
    monkeypatch.chdir(ROOT)
    given = [f"policy.model={models / 'experts'}", "policy.frames=5", "policy.height=32", "policy.width=48"]
    given += ["policy.max_sequence_length=16", "policy.lora.rank=4", "algorithm.steps=4", "algorithm.kl=0.1"]
    given += ["algorithm.clip=0.01", "training.noise_floor=warn", "training.batch=3"]
    given += ["rewards={framewise: {weight: 1.0, of: contrast, grain: sample}}"]
    given += [f"prompts.{key}=assets/lab/prompts/video_{part}.txt" for key, part in PROMPTS.items()]
    asked = ["train", "--config", "assets/recipes/lab_flow_grpo.yaml"]
    assert main([*asked, *small(tmp_path / "whole", *given)]) == 0
    together("tests/sharded.py", "WanTransformerBlock", *asked, *small(tmp_path / "parts", *given))
    one, two = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    )
    for mine, theirs in zip(one, two, strict=True):
        for name in ("reward/contrast", "grad_norm", "loss"):
            assert theirs[name] == pytest.approx(mine[name], rel=2e-3, abs=1e-6), name
