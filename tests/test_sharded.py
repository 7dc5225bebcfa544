"""A network sharded over two processes by FSDP2 learns what a whole one does, and goes on exactly."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, small
from safetensors.torch import load_file

from mmalign.cli import main

pytestmark = pytest.mark.slow
RECIPE = "assets/recipes/lab_flow_grpo.yaml"  # with a KL, so that there are frozen copies as well


def settings(folder: Path, *more: str) -> list[str]:
    wide = ["algorithm.clip=0.01", "algorithm.kl=0.1", "training.noise_floor=warn", "training.save_every=1"]
    return ["train", "--config", RECIPE, *small(folder, *wide, *more)]


def measured(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sharded(folder: Path, *more: str) -> None:
    """The same in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/sharded.py"), *settings(folder, *more)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [child.communicate(timeout=300)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)


@pytest.mark.parametrize(
    ("rank", "precision", "stops", "file"),
    [
        (4, "fp16", (1, 2), "pytorch_lora_weights.safetensors"),
        (0, "fp32", (2,), "transformer/diffusion_pytorch_model.safetensors"),
    ],
    ids=["lora in fp16", "all_weights"],
)
def test_a_sharded_network_learns_what_a_whole_one_does_and_goes_on_where_it_stopped(
    rank, precision, stops, file, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    own = [f"policy.lora.rank={rank}", f"policy.precision={precision}", "rewards={contrast: 1.0}"]
    assert main(settings(tmp_path / "whole", *own)) == 0
    for stop in stops:
        sharded(tmp_path / "parts", *own, f"training.iterations={stop}")
    parts = {path.name for path in (tmp_path / "parts/checkpoints/step_000002/sharded").iterdir()}
    assert {"pytorch_model_fsdp_0", "optimizer_0", "copies_0.pt", "copies_1.pt"} <= parts
    for place in ("", "average/"):
        whole, joined, before = (
            load_file(tmp_path / run / place / file)
            for run in (
                "whole/checkpoints/step_000002",
                "parts/checkpoints/step_000002",
                "whole/checkpoints/step_000001",
            )
        )
        assert whole.keys() == joined.keys()
        # A tiny gradient is a whole step to AdamW, whatever rounding made it: single weights may differ.
        apart = torch.cat([(joined[name] - whole[name]).float().flatten() for name in whole]).norm()
        moved = torch.cat([(whole[name] - before[name]).float().flatten() for name in whole]).norm()
        assert moved > 1e-3
        assert apart < 0.2 * moved
    if rank == 0:
        one, two = ((tmp_path / run / "checkpoints/step_000002" / file).parent for run in ("whole", "parts"))
        assert (one / "config.json").read_text() == (two / "config.json").read_text()
    one, two = (measured(tmp_path / run) for run in ("whole", "parts"))
    assert len(one) == len(two) == 2
    for first, second in zip(one, two, strict=True):
        for name in ("reward/contrast", "grad_norm", "loss", "kl", "ratio"):
            assert second[name] == pytest.approx(first[name], rel=2e-3, abs=1e-7), name
        assert second.get("loss_scale") == first.get("loss_scale")
    assert one[1].get("loss_scale") == (2.0**20 if precision == "fp16" else None)  # after four updates
