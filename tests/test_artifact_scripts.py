"""scripts/artifacts.py and scripts/search_question.py, each from nothing to its figures."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from mmalign.contracts import PolicySettings
from mmalign.lab.corruptions import SEEN, UNSEEN
from mmalign.pipelines import load
from mmalign.rewardmodels.artifact import Detector
from mmalign.rewardmodels.artifact_training import read_labeled
from mmalign.sde import Noise
from mmalign.testing import prompts_of, tiny_sd3

sys.path.insert(0, str(Path(__file__).parent / "pipelines"))
sys.path.insert(0, str(Path(__file__).parent / "rewardmodels"))
import captioners
from test_endpoint import serve, spoke  # noqa: F401  # a fixture

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch, tmp_path):
    """`script(name, words...)`: runs a script in an empty folder, as the command line does."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")

    return run


def test_from_scenes_to_a_detector_that_is_measured(script, capsys):
    script("artifacts.py", "make", "--out", "set", "--count", 12, "--split", "heldout", "--unseen")
    data = read_labeled(Path("set"))
    assert len(data.images) == 24
    assert {*data.kinds} == {"", *SEEN, *UNSEEN}
    assert data.artifact.sum() == 12
    assert data.seen[data.artifact].sum() == 6
    assert data.masks[data.artifact].flatten(1).any(1).all()
    script("artifacts.py", "train", "--data", "set", "--tower", ROOT / "assets/lab/dino", "--out", "made",
           "--steps", 2, "--batch", 4, "--frozen")  # fmt: skip
    assert Detector.load("made").temperature > 0
    script("artifacts.py", "evaluate", "--detector", "made", "--data", "set", "--json", "found.json")
    found = json.loads(Path("found.json").read_text())
    assert found["pictures"] == 24
    assert found["kinds"].keys() == {*SEEN, *UNSEEN}
    assert f"{found['seen']['auc']:.3f}" in capsys.readouterr().out


def test_own_pictures_are_labeled_by_their_folder(script):
    for folder, count in (("clean", 3), ("damaged", 2)):
        Path(folder).mkdir()
        for i in range(count):
            Image.new("RGB", (20, 16), (50 * i, 90, 200)).save(Path(folder) / f"{i}.png")
    script("artifacts.py", "make", "--out", "set", "--clean", "clean", "--damaged", "damaged", "--size", 16)
    rows = [json.loads(line) for line in Path("set/labels.jsonl").read_text().splitlines()]
    assert [row["artifact"] for row in rows] == [False, True] * 3 + [True] * 2
    assert [("mask" in row, "kind" in row) for row in rows[-2:]] == [(False, False)] * 2
    assert Image.open("set/000001.png").size == (16, 16)
    Path("empty").mkdir()
    with pytest.raises(SystemExit, match="error: empty holds no pictures"):
        script("artifacts.py", "make", "--out", "other", "--clean", "empty")


def test_a_model_draws_its_own_damage_in_few_steps_from_the_same_noise(script):
    folder = tiny_sd3(Path("sd3").absolute())
    Path("prompts.txt").write_text("a red cat\ntwo blue dogs\n")
    command = ("artifacts.py", "make", "--out", "set", "--model", folder, "--prompts", "prompts.txt")
    more = ("--size", 32, "--max-sequence-length", 12, "--damaged-steps", 1, "--batch", 3)
    script(*command, *more, "--count", 4, "--clean-steps", 5)
    rows = [json.loads(line) for line in Path("set/labels.jsonl").read_text().splitlines()]
    assert [row.get("kind") for row in rows[:6]] == [None, "few_steps", SEEN[0], None, "few_steps", SEEN[1]]
    assert len(rows) == 12
    data = read_labeled(Path("set"))
    policy = load(PolicySettings(str(folder), max_sequence_length=12), Noise())
    prompts = prompts_of(["a red cat", "two blue dogs"], 2).take(torch.arange(4))
    for first, steps in ((0, 5), (1, 1)):
        found = (policy.images(prompts, steps, (0, "artifacts")) * 255).round()
        assert_close(data.images[first::3].float(), found, atol=1.0, rtol=0)
    with pytest.raises(SystemExit, match="--damaged-steps must lie between 1 and --clean-steps, got 1 and 1"):
        script(*command, *more, "--clean-steps", 1)
    with pytest.raises(SystemExit, match="--model needs --prompts"):
        script(*command[:-2], *more)


def test_a_question_is_searched_with_a_model_and_a_writer(script, serve, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(captioners, "WORDS", [*captioners.WORDS, "yes", "no"])
    captioners.tiny_llava(Path("llava"))
    server = serve(lambda number, body: spoke(f"describe the picture {number}"))
    script("artifacts.py", "make", "--out", "set", "--count", 6)
    command = (
        "--data",
        "set",
        "--model",
        "llava",
        "--writer",
        server.url,
        "--writer-model",
        "w",
        "--rounds",
        1,
    )
    more = ("--beam", 2, "--pictures", 12, "--precision", "fp32", "--device", "cpu")
    script("search_question.py", *command, *more)
    said = capsys.readouterr().out
    assert "round 1: " in said
    assert "held out: " in said
    assert server.bodies[0]["model"] == "w"
    assert any("image_url" in json.dumps(body) for body in server.bodies)  # it sees what was answered wrongly
    with pytest.raises(SystemExit, match=r"error: .*labels\.jsonl"):
        script("search_question.py", "--data", "nowhere", *command[2:], *more)
