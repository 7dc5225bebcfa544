"""A network sharded over two processes by FSDP2 or ZeRO learns what a whole one does, and goes on exactly."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from launched import together
from runs import ROOT, small
from safetensors.torch import load_file

from mmalign.cli import main

pytestmark = pytest.mark.slow
ZERO = [f"assets/accelerate/deepspeed_zero{stage}.yaml" for stage in (2, 3)]
NEEDED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs mmalign[deepspeed]")
RECIPE = "assets/recipes/lab_flow_grpo.yaml"  # with a KL, so that there are frozen copies as well


def settings(folder: Path, *more: str) -> list[str]:
    wide = ["algorithm.clip=0.01", "algorithm.kl=0.1", "training.noise_floor=warn", "training.save_every=1"]
    return ["train", "--config", RECIPE, *small(folder, *wide, *more)]


def measured(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


FSDP2 = ("tests/sharded.py", "JointTransformerBlock")
ZERO2, ZERO3 = (("tests/zero.py", configuration) for configuration in ZERO)
ADAPTER = "pytorch_lora_weights.safetensors"
NETWORK = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("by", "rank", "precision", "stops", "file"),
    [
        pytest.param(FSDP2, 4, "fp16", (1, 2), ADAPTER, id="fsdp2-lora in fp16"),
        pytest.param(FSDP2, 0, "fp32", (2,), NETWORK, id="fsdp2-all_weights"),
        pytest.param(ZERO2, 4, "fp32", (2,), ADAPTER, id="zero2-lora", marks=NEEDED),
        pytest.param(ZERO3, 4, "fp32", (1, 2), ADAPTER, id="zero3-lora", marks=NEEDED),
        pytest.param(ZERO3, 0, "fp32", (2,), NETWORK, id="zero3-all_weights", marks=NEEDED),
    ],
)
def test_a_sharded_network_learns_what_a_whole_one_does_and_goes_on_where_it_stopped(
    by, rank, precision, stops, file, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    own = [f"policy.lora.rank={rank}", f"policy.precision={precision}", "rewards={contrast: 1.0}"]
    own += ["training.batch=4"]
    assert main(settings(tmp_path / "whole", *own)) == 0
    for stop in stops:
        together(*by, *settings(tmp_path / "parts", *own, f"training.iterations={stop}"))
    parts = {path.name for path in (tmp_path / "parts/checkpoints/step_000002/sharded").iterdir()}
    weights = {"pytorch_model_fsdp_0", "optimizer_0"} if by is FSDP2 else {"pytorch_model"}
    assert weights | {"copies_0.pt", "copies_1.pt"} <= parts
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


@pytest.mark.parametrize(
    "by",
    [
        pytest.param(("tests/sharded.py", "LlamaDecoderLayer"), id="fsdp2"),
        pytest.param(ZERO3, id="zero3", marks=NEEDED),
    ],
)
def test_a_sharded_captioner_waits_for_texts_of_other_processes(by, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = ["train", "--config", "assets/recipes/lab_claimdiff.yaml", "prompts.per_iteration=2"]
    given += ["prompts.group=2", "training.iterations=1", "evaluation.prompts=2", "evaluation.seeds=1"]
    given += ["policy.text.max_tokens=64", "run.tensorboard=false"]
    assert main([*given, f"run.dir={tmp_path / 'whole'}"]) == 0
    together(*by, *given, f"run.dir={tmp_path / 'parts'}")
    (one,), (two,) = (measured(tmp_path / run) for run in ("whole", "parts"))
    for name in ("reward/claimdiff", "reward/caption_facts/words", "grad_norm", "loss"):
        assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-7), name
    assert two["forwards/sample"] > one["forwards/sample"]  # one process made some for the other


@NEEDED
@pytest.mark.parametrize("configuration", ZERO, ids=["zero2", "zero3"])
def test_what_deepspeed_does_to_weights(configuration, tmp_path):
    """It clips, leaves out steps that are not finite, uses and moves copies, goes on from a checkpoint."""
    said = json.loads(together("tests/zero.py", configuration, str(tmp_path)).splitlines()[-1])
    first, bad, _ = said["norms"]
    assert first == pytest.approx(said["norm"])
    assert first > 0.5
    assert bad == float("inf")
    begun, once, skipped, saved, later, used, moved, loaded, again = map(torch.tensor, said["states"])
    assert (once - begun).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-5)
    assert torch.equal(skipped, once)
    assert (later - saved).norm() > 1e-3
    assert torch.equal(used, saved)
    torch.testing.assert_close(moved, saved + 0.75 * (later - saved))
    assert torch.equal(loaded, saved)
    torch.testing.assert_close(again, later)  # with the momentum of then
