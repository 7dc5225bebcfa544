"""What a run will cost is known without its weights: bytes as they are kept, operations as counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, tiny
from torch import nn
from torch.nn import functional as F

from mmalign.cli import main
from mmalign.config import ConfigError, load_config
from mmalign.contracts import LoraSettings, PolicySettings
from mmalign.pipelines import catalog, load
from mmalign.pipelines.blueprint import blank_policy, blank_text, known_models, read_blueprint
from mmalign.planning import GIB, SHARDINGS, Live, _fused_attention, live_bytes, measure, rehearse
from mmalign.sde import Noise

# Parameters in thousand millions, as they are published of the denoisers and text encoders.
PUBLISHED = {
    "stabilityai/stable-diffusion-3.5-medium": {"transformer": 2.24, "text_encoder_3": 4.76},
    "black-forest-labs/FLUX.1-dev": {"transformer": 11.9, "text_encoder_2": 4.76},
    "black-forest-labs/FLUX.1-Kontext-dev": {"transformer": 11.9, "text_encoder": 0.123},
    "Qwen/Qwen-Image": {"transformer": 20.43, "text_encoder": 8.29},
    "Tongyi-MAI/Z-Image": {"transformer": 6.15, "text_encoder": 4.02},
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"transformer": 1.42, "text_encoder": 5.68},
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": {"transformer": 5.0, "vae": 0.705},
    "hunyuanvideo-community/HunyuanVideo": {"transformer": 12.82, "text_encoder": 7.5},
    "stabilityai/stable-diffusion-xl-base-1.0": {"unet": 2.567, "text_encoder_2": 0.695},
}
REAL = (
    "flux_mix_grpo",
    "hunyuan_dance_grpo",
    "kontext_flow_grpo",
    "qwen_image_fast",
    "sd35_diffusion_nft",
    "sd35_flow_grpo",
    "sdxl_ddpo",
    "wan21_flow_grpo",
    "wan22_nft",
    "z_image_nft",
)


QUICK = ("sd35_diffusion_nft",)  # the others take most of a minute each


def settings(**given) -> PolicySettings:
    return PolicySettings(str(tiny()), **{"max_sequence_length": 16, "lora": LoraSettings(4, 6)} | given)


@pytest.mark.nightly
@pytest.mark.parametrize("model", PUBLISHED)
def test_shipped_configurations_have_the_published_sizes(model):
    policy = blank_policy(
        PolicySettings(model, height=64, width=64, frames=None, lora=LoraSettings(0)), Noise()
    )
    for name, size in PUBLISHED[model].items():
        part = getattr(policy.adapter.pipeline, name)
        assert all(p.is_meta for p in part.parameters())
        assert sum(p.numel() for p in part.parameters()) / 1e9 == pytest.approx(size, rel=0.01), name
    assert model in known_models()


@pytest.mark.parametrize("rank", [0, 4])
def test_bytes_without_content_are_the_bytes_with_it(rank):
    """Forward and backward of one network, on the meta device and for real."""
    found = {}
    for device in ("meta", "cpu"):
        given = settings(lora=LoraSettings(rank, 6))
        policy = blank_policy(given, Noise()) if device == "meta" else load(given, Noise())
        text = blank_text(policy) if device == "meta" else policy.adapter.encode("a red circle")
        seen = {name: value.expand(6, *value.shape) for name, value in text.items()}
        x, sigma = torch.rand(6, *policy.shape, device=device), torch.rand(6, device=device)
        network = policy.module
        live = Live([*network.parameters(), *network.buffers()])
        with _fused_attention(), live:
            out = policy.adapter.velocity(network, x, sigma, seen, None, 1.0)
            kept = live.now
            out.square().mean().backward()
        found[device] = kept, live.peak
    assert found["meta"] == found["cpu"]


def test_operations_are_those_of_the_products():
    network = nn.Linear(8, 16, bias=False, device="meta")
    x = torch.empty(5, 8, device="meta")
    assert live_bytes(network, lambda: network(x), backward=False).flops == 2 * 5 * 8 * 16
    q = torch.empty(2, 3, 7, 4, device="meta", requires_grad=True)
    k = torch.empty(2, 3, 9, 4, device="meta")
    alive = live_bytes(network, lambda: F.scaled_dot_product_attention(q, k, k))
    assert alive.flops == 2 * 2 * 3 * 7 * 9 * (4 + 4)
    assert alive.kept == q.nbytes + 4 * 2 * 3 * 7  # the output and a number a query, no matrix of scores


def test_checkpointing_saves_and_a_larger_minibatch_costs_in_proportion():
    policy = blank_policy(settings(), Noise())
    one, two = measure(policy, 4, 96), measure(policy, 8, 96)
    assert one.checkpointed < one.plain
    assert two.plain == pytest.approx(2 * one.plain, rel=0.02)
    assert two.forward_flops == one.forward_flops
    guided = measure(blank_policy(settings(guidance=3.0), Noise()), 4, 96)
    assert guided.forward_flops == pytest.approx(one.forward_flops)  # of a row; guidance takes two rows
    assert one.plain < guided.plain < 1.25 * one.plain  # the same rows, and what joins them


def plan(*overrides, **devices):
    config = load_config(ROOT / "assets/recipes/lab_flow_grpo.yaml", [f"policy.model={tiny()}", *overrides])
    return rehearse(config, **devices)


def test_shards_share_what_they_share(monkeypatch):
    monkeypatch.chdir(ROOT)
    _, found = plan("policy.lora.rank=0", gpus=4)
    whole, second, third = (found.memory[name] for name in SHARDINGS)
    assert second.optimizer == whole.optimizer / 4
    assert second.gradients == whole.gradients / 4
    assert second.trained == whole.trained
    assert third.trained == whole.trained / 4
    assert third.weights == whole.weights / 4
    assert whole.activations == second.activations == third.activations
    assert whole.optimizer == 2 * whole.gradients == 8 * found.measured.trained
    # The parameters, the reference that its KL pulls to, and the moving average.
    assert whole.trained == 3 * whole.gradients


def test_work_is_the_forwards_of_the_plan(monkeypatch):
    monkeypatch.chdir(ROOT)
    told, found = plan("algorithm.kl=0", gpus=2, tflops=10.0, utilization=0.5)
    assert (
        f"{found.work.sample:.0f} to sample, {found.work.train:.0f} to train" in told["forwards an iteration"]
    )
    flops = (found.work.sample + 2 * found.work.train) * found.measured.forward_flops
    assert found.work.flops == pytest.approx(flops)
    assert found.work.seconds == pytest.approx(flops / (10e12 * 0.5 * 2))
    _, whole = plan("algorithm.kl=0", "policy.lora.rank=0")
    each = found.work.sample + 3 * found.work.train
    assert whole.work.flops == pytest.approx(each * whole.measured.forward_flops)
    _, again = plan("algorithm.kl=0", "policy.gradient_checkpointing=true")
    assert again.work.flops == pytest.approx(flops + again.work.train * found.measured.forward_flops)


def test_what_does_not_fit_is_told_what_to_change(monkeypatch):
    monkeypatch.chdir(ROOT)
    _, found = plan("policy.lora.rank=0", gpus=4, gpu_memory=1e-3)
    said = "\n".join(found.advice)
    assert f"it needs {found.memory['ddp'].peak / GIB:.1f} GiB" in said
    for word in ("training.batch=48", "policy.precision=bf16", "policy.lora.rank=32"):
        assert word in said
    assert plan(gpu_memory=80)[1].advice == []


def test_models_that_nothing_is_known_of_are_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="nothing is known of some/model without its weights"):
        read_blueprint("some/model")
    with pytest.raises(ConfigError, match="nothing is known of"):
        plan("policy.model=some/model")
    with pytest.raises(ConfigError, match="--utilization in"):
        plan(utilization=0.0)


def test_the_command_prints_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    given = ["--config", "assets/recipes/lab_flow_grpo.yaml", "--gpus", "4"]
    assert main(["plan", *given, "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    for word in ("forwards an iteration", "one forward", "ddp", "zero3", "fits"):
        assert word in said
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["peak"]["ddp"] > written["peak"]["zero3"] > 0
    assert main(["train", "--dry-run", *given, f"run.dir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out.split("\n\n")[0].replace(" ", "") in said.replace(" ", "")
    assert not (tmp_path / "run").exists()


def test_every_recipe_of_a_real_model_stands_in_the_table_of_models():
    listed = {recipe: pipeline for pipeline, recipes in catalog.RECIPES.items() for recipe in recipes}
    assert set(listed) == set(REAL)
    for recipe, pipeline in listed.items():
        model = load_config(ROOT / f"assets/recipes/{recipe}.yaml").policy.model
        assert read_blueprint(model).pipeline == pipeline


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in QUICK else pytest.mark.nightly) for name in REAL],
)
def test_a_recipe_of_a_real_model_is_right_as_far_as_can_be_known(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / f"assets/recipes/{name}.yaml")
    told, found = rehearse(config, gpus=8)
    assert found.advice == [], "eight devices of 80 GiB are enough"
    assert found.work.seconds > 1
    assert "to sample" in told["forwards an iteration"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "within"),
    [
        (["training.batch=96"], 0.15),
        (["training.batch=96", "policy.lora.rank=0"], 0.15),
        # Here decoding is the peak, and convolutions on a CPU take room that is not counted.
        (["training.batch=48", "prompts.group=24"], 0.25),
    ],
    ids=["adapter", "all weights", "decoding"],
)
def test_a_run_needs_the_memory_that_was_predicted(given, within, monkeypatch):
    """The most that is resident in one iteration of a lab run, beside what a tiny one left."""
    monkeypatch.chdir(ROOT)
    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from /proc")
    recipe = "assets/recipes/lab_diffusion_nft.yaml"
    given = [*given, "algorithm.steps=2"]
    usual = ["training.iterations=1", "run.tensorboard=false", "evaluation.prompts=2"]
    # Freed memory goes back to the system at once, so that what is resident is what is in use.
    small = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    ran = subprocess.run(
        [sys.executable, "tests/peak.py", recipe, *usual, *given],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **small},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(ran.stdout.splitlines()[-1])["peak"]
    _, found = rehearse(load_config(recipe, given))
    assert found.memory["ddp"].peak == pytest.approx(measured, rel=within)
