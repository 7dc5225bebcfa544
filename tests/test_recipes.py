import json
import re
from pathlib import Path

import pytest
import yaml
from runs import ROOT, small

from mmalign.cli import main
from mmalign.config import load_config
from mmalign.evaluation import Shown

RECIPES = sorted((ROOT / "assets/recipes").glob("*.yaml"))
# What does not fit the group of two and the four steps of a small run.
FITTING = {
    "lab_branch_grpo": ["algorithm.splits=[1]"],
    # Random weights draw nothing that the verifier tells apart, which leaves no pair to learn from.
    "lab_dgpo": ["rewards.jpeg_compressibility=1.0"],
    "lab_diffusion_dpo": ["rewards.jpeg_compressibility=1.0"],
    # The teachers are adapters of the lab's model; guidance teaches without any.
    "lab_distill": ["algorithm.teachers={}", "algorithm.guidance=2.5"],
    "lab_flow_dppo": ["algorithm.actions=2"],
    "lab_mix_grpo": ["algorithm.width=2"],
    "lab_style": ["policy.vae=null"],  # of the lab's own latents
    "lab_tempflow_grpo": ["algorithm.starts=1"],
    "lab_g2rpo": ["algorithm.trained=[0, 2]"],
}
# On the lab's own model, which is small.
CAPTIONERS = {
    "lab_caprl",
    "lab_claimdiff",
    "lab_drpo",
    "lab_holistic",
    "lab_igpo",
    "lab_pow3r",
    "lab_sft",
    "lab_trust_grpo",
    "lab_tw_grpo",
}
# Their weights are not here; test_planning.py runs those of flow models without.
REAL = {
    "flux_mix_grpo",
    "hunyuan_dance_grpo",
    "kontext_flow_grpo",
    "qwen3vl_claimdiff",
    "qwen_image_fast",
    "sd35_diffusion_nft",
    "sd35_flow_grpo",
    "sdxl_ddpo",
    "smolvlm_claimdiff",
    "wan21_flow_grpo",
    "wan22_nft",
    "z_image_nft",
}
VIDEOS = {
    "lab_latent_identity",
    "lab_video_g2rpo",
    "lab_video_grpo",
    "lab_video_nft",
}  # on the lab's own video model
EDITORS = {"lab_edit_consistency", "lab_edit_grpo", "lab_edit_nft"}  # on the lab's own editor
LAUNCHERS = sorted((ROOT / "assets/accelerate").glob("*.yaml"))


def named(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_is_valid_and_named_after_its_run(path):
    config = load_config(path)
    assert config.run.dir == f"runs/{path.stem}"
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_the_numbers_of_a_recipe_fit_together(path):
    config = load_config(path)
    assert config.prompts.per_iteration % config.training.updates == 0
    assert config.prompts.heldout_file not in (None, config.prompts.file)
    assert config.evaluation.seeds >= 2, "diversity needs two pictures of a prompt"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CAPTIONERS))
def test_a_recipe_of_the_labs_captioner_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = [
        "prompts.per_iteration=2",
        "prompts.group=2",
        "training.iterations=2",
        "evaluation.prompts=2",
    ]
    overrides += ["policy.text.max_tokens=12", "run.tensorboard=false", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", "--config", f"assets/recipes/{name}.yaml", *overrides]) == 0
    result = json.loads((tmp_path / "run/report.json").read_text())
    assert result["iterations"] == 2
    assert 0 <= result["heldout"]["hallucination"]["trained"] <= 1
    assert result["forwards"]["train"] <= 2 * 4
    assert result["heldout"]["reference_log_prob"]["trained"] < 0
    assert result["forwards"]["sample"] <= 2 * 4 * 11


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("lab_video_g2rpo", ["algorithm.trained=[0, 2]"]),
        ("lab_video_grpo", ["rewards.lab_video.grain=frame", "algorithm.frames=true"]),
        ("lab_video_nft", []),
        ("lab_video_nft", ["rewards.lab_video.grain=frame", "algorithm.frames=true", "training.seed=1"]),
    ],
)
def test_a_recipe_of_the_labs_video_model_runs(name, more, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = ["prompts.per_iteration=2", "prompts.group=2", "training.iterations=2", "algorithm.steps=4"]
    overrides += ["evaluation.prompts=2", "evaluation.steps=3", "run.tensorboard=false"]
    given = [*overrides, *more, f"run.dir={tmp_path / 'run'}"]
    assert main(["train", "--config", f"assets/recipes/{name}.yaml", *given]) == 0
    result = json.loads((tmp_path / "run/report.json").read_text())
    assert result["iterations"] == 2
    assert {"direction", "static", "strict"} <= result["heldout"].keys()
    assert (tmp_path / "run/samples/before_after.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EDITORS))
def test_a_recipe_of_the_labs_editor_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = [
        "prompts.per_iteration=2",
        "prompts.group=2",
        "training.iterations=2",
        "evaluation.prompts=2",
    ]
    given = [*overrides, "evaluation.steps=3", "run.tensorboard=false", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", "--config", f"assets/recipes/{name}.yaml", *given]) == 0
    result = json.loads((tmp_path / "run/report.json").read_text())
    assert result["iterations"] == 2
    assert {"change", "stay", "strict"} <= result["heldout"].keys()
    drawn = Shown.load(tmp_path / "run/evaluation/trained.pt")
    assert drawn.sources is not None
    assert len(drawn.sources) == len(drawn.prompts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in RECIPES if p.stem not in CAPTIONERS | EDITORS | REAL | VIDEOS], ids=named
)
def test_a_recipe_runs(path, tmp_path, monkeypatch, capsys):
    if path.stem.startswith("emoji"):
        pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.chdir(ROOT)
    overrides = small(tmp_path / "run", *FITTING.get(path.stem, []))
    assert main(["train", "--config", str(path), *overrides]) == 0
    result = json.loads((tmp_path / "run/report.json").read_text())
    assert result["iterations"] == 2
    assert result["heldout"]
    assert result["forwards"]["train"] > 0
    # What was announced is what was spent, but for actions that turned out to say nothing.
    (plan,) = [
        line for line in (tmp_path / "run/config.yaml").read_text().splitlines() if "forwards an" in line
    ]
    sample, train = (int(number) for number in re.findall(r"(\d+) to", plan))
    assert abs(result["forwards"]["sample"] - 2 * sample) <= 1
    assert result["forwards"]["train"] <= 2 * train + 1


def test_there_is_a_launch_configuration_for_every_kind_of_machine():
    assert {path.stem for path in LAUNCHERS} >= {
        "cpu", "cpu_2", "one_gpu", "multi_gpu", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "multi_node"
    }  # fmt: skip


@pytest.mark.parametrize("path", LAUNCHERS, ids=named)
def test_accelerate_reads_the_launch_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text())
    assert read.num_processes == written["num_processes"]
    assert read.distributed_type.value == written["distributed_type"]
    assert read.mixed_precision == "no"
    for plugin, prefix in (("fsdp_config", "fsdp_"), ("deepspeed_config", "")):
        assert all(key.startswith(prefix) for key in getattr(read, plugin))
    if read.distributed_type.value == "DEEPSPEED":
        assert read.deepspeed_config["gradient_accumulation_steps"] == 1
        assert path.stem.endswith(str(read.deepspeed_config["zero_stage"]))


@pytest.mark.parametrize("path", LAUNCHERS, ids=named)
def test_the_launcher_takes_every_key(path):
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    written = yaml.safe_load(path.read_text())
    for plugin in ("fsdp_config", "deepspeed_config"):
        names = set(written.get(plugin, {}))
        assert names <= known, names - known
