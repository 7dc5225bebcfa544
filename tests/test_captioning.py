"""A captioner trained from a configuration: its folder, its report, and what is wrong with its settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.assembly import assemble
from mmalign.benchmark import measure_writing
from mmalign.cli import main
from mmalign.config import ConfigError, load_config
from mmalign.data import PromptError, read_prompts
from mmalign.evaluation import is_right, listed
from mmalign.records import RewardSignal

sys.path.insert(0, str(Path(__file__).parent / "pipelines"))
from captioners import pictures, tiny_llava


class Dogs:
    """The share of words that are `dog`."""

    name = "dogs"

    def __call__(self, outcome):
        words = [text.split() for text in outcome.media]
        return RewardSignal(self.name, torch.tensor([[w.count("dog") / max(1, len(w))] for w in words]))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def recipe(model, tmp_path) -> Path:
    files = pictures(tmp_path / "pictures")
    lines = [
        {
            "prompt": "describe the picture",
            "image": str(Path(file).relative_to(tmp_path)),
            "reference": "a dog",
        }
        for file in files
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "recipe.yaml").write_text(f"""
policy: {{model: {model}, lora: {{rank: 8, alpha: 16}}, text: {{max_tokens: 8}}}}
prompts: {{file: {tmp_path}/prompts.jsonl, per_iteration: 4, group: 8}}
rewards: {{"test_captioning:Dogs": 1.0}}
algorithm: {{name: grpo}}
training: {{iterations: 12, learning_rate: 2e-2, batch: 16, save_every: 0}}
evaluation: {{seeds: 2, show: 2, show_seeds: 2, grid_every: 5}}
run: {{dir: {tmp_path}/run, tensorboard: false}}
""")
    return tmp_path / "recipe.yaml"


def run_of(recipe: Path, *overrides: str) -> dict[str, Any]:
    return assemble(load_config(recipe, overrides)).train()


def test_a_captioner_learns_and_leaves_a_folder_to_look_at(recipe, tmp_path):
    found, folder = run_of(recipe), tmp_path / "run"
    assert found["heldout"]["dogs"]["trained"] > found["heldout"]["dogs"]["base"] + 0.2
    rows = [json.loads(line) for file in sorted((folder / "rollouts").iterdir()) for line in file.open()]
    assert all(isinstance(row["text"], str) for row in rows)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert metrics[0]["noise_floor/max"] < 1e-5  # the log-ratio of the first update, over all tokens
    assert {path.name for path in (folder / "samples").iterdir()} >= {"before_after.png", "step_000005.png"}
    assert "dogs" in (folder / "report.html").read_text()
    assert found["diversity"]["base"] > 0


def test_in_fp16_its_losses_are_scaled(recipe, tmp_path):
    given = ["policy.precision=fp16", "training.iterations=1", "training.noise_floor=warn"]
    run_of(recipe, *given, "evaluation.prompts=1", "evaluation.seeds=1", f"run.dir={tmp_path}/half")
    metrics = json.loads((tmp_path / "half/metrics.jsonl").read_text())
    assert (metrics["updates"], metrics["updates/overflowed"]) == (2, 0)
    assert metrics["loss_scale"] == 2.0**18
    assert metrics["noise_floor/max"] < 1e-2


def test_questions_tell_whether_it_still_can_what_it_could(recipe, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    question = {"question": "What is there?", "choices": ["dog", "cat"], "answer": "dog"}
    file.write_text("\n".join(json.dumps(row | {"questions": [question] * 2}) for row in rows))
    found = run_of(
        recipe, "evaluation.questions=2", "training.learning_rate=5e-2", f"run.dir={tmp_path}/asked"
    )
    told = found["heldout"]["answered"]
    assert 0 <= told["base"] < told["trained"] <= 1  # it is rewarded for writing "dog", whatever it is asked
    silent = run_of(
        recipe,
        "evaluation.questions=0",
        "training.iterations=1",
        f"run.dir={tmp_path}/silent",
        "evaluation.seeds=1",
    )
    assert "answered" not in silent["heldout"]


def test_an_answer_is_right_if_it_names_the_answer_alone():
    choices = ["at the top", "at the top left", "in the center"]
    assert is_right("It is at the top left.", choices, "at the top left")
    assert not is_right("It is at the top left.", choices, "at the top")
    assert is_right("At the top!", choices, "at the top")
    assert not is_right("at the top or in the center", choices, "at the top")
    assert not is_right("a doghouse", ["dog", "cat"], "dog")
    assert not is_right("", ["dog"], "dog")
    assert listed(["a", "b", "c"]) == "a, b or c"


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(recipe, tmp_path):
    run_of(recipe, "training.iterations=4", "training.save_every=2", f"run.dir={tmp_path}/whole")
    config = load_config(
        recipe, ["training.iterations=4", "training.save_every=2", f"run.dir={tmp_path}/parts"]
    )
    run = assemble(config)
    run.trainer.evaluate = lambda iteration: setattr(run.trainer, "_stop", iteration == 2) or {}
    run.trainer.run()
    assemble(config).train()
    parts, whole = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("parts", "whole")
    )
    assert [row["reward/dogs"] for row in parts] == [row["reward/dogs"] for row in whole]
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]


def test_a_method_for_pictures_is_refused(recipe):
    with pytest.raises(
        ConfigError, match=r"flow_grpo is a method for flow models, and policy\.model .* captioners"
    ):
        assemble(load_config(recipe, ["algorithm.name=flow_grpo"]), write=False)


def test_a_picture_that_is_not_there_is_named_with_its_line(recipe, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a", "image": "pictures/0.png"}\n{"prompt": "a", "image": "x.png"}'
    )
    with pytest.raises(PromptError, match=r"prompts\.jsonl, line 2: there is no picture .*x\.png"):
        read_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "image": "pictures/images.zip/none.png"}')
    with pytest.raises(PromptError, match=r"line 1: .*images\.zip holds no none\.png"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_a_picture_that_cannot_be_read_is_named(recipe, tmp_path):
    (tmp_path / "pictures" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0\.png cannot be read as a picture"):
        assemble(load_config(recipe, []), write=False)


def test_a_folder_of_pictures_is_captioned_and_gone_on_with(model, tmp_path, capsys):
    pictures(tmp_path / "pictures", 3)  # two files, and one inside a zip that is none of the folder's
    out = tmp_path / "out" / "captions.jsonl"
    command = [
        "caption",
        str(model),
        "--images",
        str(tmp_path / "pictures"),
        "--out",
        str(out),
        "--seeds",
        "2",
    ]
    command += ["policy.text.max_tokens=6"]
    assert main(command) == 0
    rows = [json.loads(line) for line in out.open()]
    assert [(Path(row["image"]).name, row["seed"]) for row in rows] == [
        ("0.png", 0),
        ("0.png", 1),
        ("1.png", 0),
        ("1.png", 1),
    ]
    assert all(row["prompt"] == "Describe the picture." and isinstance(row["caption"], str) for row in rows)

    whole = out.read_text()
    out.write_text(
        "".join(whole.splitlines(keepends=True)[:2]) + whole.splitlines()[2][:20]
    )  # killed in the third line
    assert main(command) == 0
    assert out.read_text() == whole
    assert main(command) == 0
    assert "0 captions written" in capsys.readouterr().out

    assert main(["caption", str(model), "--images", str(tmp_path / "none"), "--out", str(out)]) != 0
    out.write_text("no json\n{}\n")
    assert main(command) != 0
    assert "line 1 is no caption" in capsys.readouterr().err


def test_the_benchmark_of_writing_measures_all_four_ways(recipe):
    found = measure_writing(load_config(recipe, []), iterations=1, warmup=0)
    assert set(found["seconds"]) == {"sample", "generate", "update", "update apart"}
    assert found["texts"] == 32
    assert found["tokens"] == 8
    assert min(found["seconds"].values()) > 0
