import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from runs import ROOT, small, tiny

from mmalign.cli import main, parse
from mmalign.tracking import read
from mmalign.trainer import Trainer

RECIPE = str(ROOT / "assets/recipes/lab_flow_grpo_fast.yaml")

BAD_REWARD = """
import torch
from mmalign.records import RewardSignal

class Flat:
    name = "flat"
    def __call__(self, outcome):
        return RewardSignal("flat", torch.zeros(len(outcome.prompts)))

class Short:
    name = "short"
    def __call__(self, outcome):
        return RewardSignal("short", torch.zeros(1, 1))

class Bare:
    name = "bare"
    def __call__(self, outcome):
        return torch.zeros(len(outcome.prompts), 1)
"""


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two iterations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = tmp_path_factory.mktemp("runs") / "done"
        assert main(["train", "--config", RECIPE, *small(folder, "evaluation.every=1")]) == 0
    return folder


def refused(capsys, *arguments):
    """What the command said; it must have refused in few words, before it did anything."""
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy.model=nowhere"], "there is no folder nowhere"),
        (["policy.model=tests"], "tests is no pipeline"),
        (["prompts.file={tmp}/empty.txt"], "empty.txt: the file holds no prompts"),
        (["prompts.file={tmp}/none.txt"], "there is no such prompt file"),
        (["rewards.labb=1"], "there is no reward 'labb'; did you mean 'lab'?"),
        (["training.iteratons=3"], "has no setting 'iteratons'; did you mean 'iterations'?"),
        (["prompts.group=1"], "prompts.group must be at least 2"),
        (["prompts.per_iteration=3"], "training.updates=2 must divide the 3 groups"),
        (["algorithm.noise.level=0"], "noise.level must be above 0"),
        (["policy.height=32"], "square with a side that is a multiple of 64"),
        (["policy.height=63"], "63"),
        (["rewards.lab=0"], "no reward has a weight other than 0"),
        (["run.dir={tmp}/empty.txt"], "cannot write into"),
        (["rewards.bad_reward:Flat=1"], "values must be [samples, units], got (2,)"),
        (["rewards.bad_reward:Short=1"], "must give values of shape [2, units]"),
        (["rewards.bad_reward:Bare=1"], "must return a RewardSignal, got Tensor"),
        (["rewards.bad_reward:Flatt=1"], "did you mean 'Flat'?"),
        (["rewards.bad_rewards:Flat=1"], "there is no module 'bad_rewards'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_any_training(overrides, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad_reward.py").write_text(BAD_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    given = [override.format(tmp=tmp_path) for override in overrides]
    said = refused(capsys, "train", "--config", RECIPE, *small(tmp_path / "run"), *given)
    assert message in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_debug_shows_where_an_error_came_from(capsys):
    assert main(["train", "--debug", "--config", RECIPE, "policy.model=nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_settings_may_stand_anywhere_on_the_line():
    given = [
        "run.dir=x",
        "out",
        "--rewards",
        "lab={measure: mix}",
        "policy.guidance=2",
        "--seeds",
        "2",
        "run.wandb=",
    ]
    options = parse(["sample", *given])
    assert options.overrides == ["run.dir=x", "policy.guidance=2", "run.wandb="]
    assert (options.subject, options.rewards, options.seeds) == ("out", ["lab={measure: mix}"], 2)


@pytest.mark.parametrize(
    "wrong", [["report", "x", "run.dir=y"], ["train", "--config", "x", "--iterations", "3"]]
)
def test_what_no_command_knows_is_refused(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(wrong)
    assert "error: " in capsys.readouterr().err


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert "training.learning_rate  (float, default 0.0003)" in said
    assert "rewards.lab" in said
    assert "algorithm: flow_grpo_fast" in said


def test_a_run_leaves_what_it_promises(run):
    for name in (
        "config.yaml", "metrics.jsonl", "report.json", "report.html", "rollouts/step_000001.jsonl",
        "samples/step_000000.png", "samples/step_000001.png", "samples/step_000002.png",
        "samples/before_after.png", "checkpoints/step_000002/pytorch_lora_weights.safetensors",
    ):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    result = json.loads((run / "report.json").read_text())
    for score in ("strict", "soft"):
        assert {"base", "trained", "gain"} <= set(result["heldout"][score])
    assert result["diversity"]["base"] > 0
    assert {"total", "sample", "reward", "update"} <= set(result["seconds"])
    assert result["peak_memory_bytes"] > 10**6
    row = json.loads((run / "rollouts/step_000001.jsonl").read_text().splitlines()[0])
    assert {"prompt", "key", "group", "member", "rewards", "advantage"} <= set(row)


def test_the_forwards_of_a_run_are_those_of_its_plan(run):
    """2 groups of 2 share their noise: 4 samples of 4 steps with a window of 2 at step 0."""
    result = json.loads((run / "report.json").read_text())
    samples, groups, steps, width, start = 4, 2, 4, 2, 0
    assert result["forwards"]["sample"] == 2 * (samples * steps - (samples - groups) * (start + 1))
    assert result["forwards"]["train"] == 2 * (samples * width - (samples - groups))
    assert result["forwards"]["evaluation"] == 2 * 3 * 2 * 2


def test_the_resolved_settings_of_a_run_can_be_run_again(run, capsys):
    text = (run / "config.yaml").read_text()
    assert "#   forwards an iteration: 14 to sample, 6 to train" in text
    assert main(["train", "--plan", "--config", str(run / "config.yaml")]) == 0
    assert f"goes on from {run}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_longer_run_goes_on_where_the_shorter_one_stopped(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", "--config", RECIPE, *small(folder, "training.iterations=1")]) == 0
    first = (folder / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert main(["train", "--config", RECIPE, *small(folder)]) == 0
    assert "changed since: training.iterations: 1 -> 2" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text().startswith(first)
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [0, 1]


def test_fresh_starts_over_and_touches_nothing_else(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for _ in range(2):
        arguments = ["train", "--fresh", "--config", RECIPE, *small(folder, "training.iterations=1")]
        assert main(arguments) == 0
    assert len(read(folder / "metrics.jsonl")) == 1
    assert (folder / "notes.txt").read_text() == "mine"


def timeless(folder):
    """Metrics without what depends on the clock or the machine's memory."""
    clocks = ("seconds/", "share/", "memory/")
    return [
        {name: value for name, value in row.items() if not name.startswith(clocks)}
        for row in read(folder / "metrics.jsonl")
    ]


def test_a_run_that_is_told_to_stop_can_go_on(tmp_path, capsys):
    folder = tmp_path / "run"

    def stop():
        while not read(folder / "metrics.jsonl"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    arguments = [
        "train",
        "--config",
        RECIPE,
        *small(folder, "training.iterations=200", "evaluation.grid_every=0"),
    ]
    assert main(arguments) == 143
    thread.join()
    done = len(read(folder / "metrics.jsonl"))
    assert 0 < done < 200
    assert f"stopped after {done} iterations; the same command goes on" in capsys.readouterr().err
    assert (folder / f"checkpoints/step_{done:06d}/manifest.json").is_file()
    assert not (folder / "report.json").exists()
    assert main([*arguments, f"training.iterations={done + 1}"]) == 0
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == list(range(done + 1))


def started(folder, *more, launcher=()):
    command = [sys.executable, *launcher, "scripts/train.py", "--config", RECIPE, *small(folder, *more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_ran_through(tmp_path):
    settings = ("training.iterations=5", "training.save_every=2", "evaluation.every=2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["train", "--config", RECIPE, *small(whole, *settings)]) == 0
    process = started(killed, *settings)
    deadline = time.monotonic() + 240
    while len(read(killed / "metrics.jsonl")) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "report.json").exists()
    assert main(["train", "--config", RECIPE, *small(killed, *settings)]) == 0
    assert timeless(killed) == timeless(whole)
    one, other = (
        torch.load(folder / "checkpoints/step_000005/resume.pt", weights_only=True)["weights"]
        for folder in (whole, killed)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, killed)]
    for name in ("heldout", "heldout_by_category", "diversity", "forwards"):
        assert reports[0][name] == reports[1][name]


@pytest.mark.slow
def test_two_processes_write_one_run(tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--config_file", "assets/accelerate/cpu_2.yaml")
    process = started(tmp_path / "two", launcher=launcher)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()
    assert main(["train", "--config", RECIPE, *small(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    assert two["forwards"]["sample"] == one["forwards"]["sample"]
    assert two["heldout"]["lab"]["base"] == pytest.approx(one["heldout"]["lab"]["base"], abs=1e-6)
    for a, b in zip(timeless(tmp_path / "one"), timeless(tmp_path / "two"), strict=True):
        assert a["reward/lab"] == pytest.approx(b["reward/lab"], abs=1e-6)


def test_sampling_shows_before_and_after(run, tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert main(["sample", str(run), "--count", "2", "--seeds", "2", "--steps", "2", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out), str(out.with_suffix(".html"))]
    page = out.with_suffix(".html").read_text()
    assert page.count("<figure>") == 2 * 2 * 2
    assert "<b>before</b>" in page
    assert "<b>after</b>" in page
    assert page.count("<figcaption>lab ") == 8
    with Image.open(out) as sheet:
        assert sheet.width > 4 * 192


def test_a_plain_model_is_sampled_on_one_prompt(tmp_path):
    out = tmp_path / "one.png"
    more = ["--steps", "2", "--seeds", "1", "--out", str(out)]
    assert main(["sample", str(tiny()), "--prompts", "a red circle", *more]) == 0
    assert out.with_suffix(".html").read_text().count("<figure>") == 1


def test_a_plain_model_takes_trained_weights(run, tmp_path):
    out, weights = tmp_path / "two.png", run / "checkpoints" / "step_000002"
    more = ["--lora", str(weights), "--steps", "2", "--seeds", "1", "--out", str(out)]
    assert main(["sample", str(tiny()), "--prompts", "a red circle", *more]) == 0
    assert out.with_suffix(".html").read_text().count("<figure>") == 2


def test_a_checkpoint_is_scored_against_its_base(run, tmp_path, capsys):
    out = tmp_path / "scores.json"
    checkpoint = run / "checkpoints" / "step_000002"
    more = ["--count", "3", "--seeds", "2", "--steps", "2", "--compare", "--json", str(out)]
    assert main(["evaluate", str(checkpoint), "--rewards", "lab", "jpeg_compressibility", *more]) == 0
    found = json.loads(out.read_text())
    assert {"strict", "soft", "jpeg_compressibility"} <= set(found["trained"]["scores"])
    score = found["base"]["scores"]["jpeg_compressibility"]
    assert score["low"] <= score["mean"] <= score["high"]
    assert "jpeg_compressibility" in capsys.readouterr().out
    reported = json.loads((run / "report.json").read_text())["heldout"]["lab"]
    assert found["trained"]["scores"]["lab"]["mean"] == pytest.approx(reported["trained"], abs=1e-6)
    assert found["gain"]["lab"]["mean"] == pytest.approx(reported["gain"], abs=1e-6)


def folder_of_images(folder, names):
    folder.mkdir()
    for i, name in enumerate(names):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(folder / name)
    return folder


def test_images_are_scored_by_their_names(tmp_path):
    folder = folder_of_images(
        tmp_path / "images", ["a_red_circle_0.png", "a_red_circle_1.png", "two_dogs.png"]
    )
    out = tmp_path / "scores.json"
    assert main(["evaluate", str(folder), "--rewards", "jpeg_compressibility", "--json", str(out)]) == 0
    score = json.loads(out.read_text())["images"]["scores"]["jpeg_compressibility"]
    assert (score["prompts"], score["images"]) == (2, 3)


def test_images_are_scored_by_their_metadata(tmp_path):
    folder = folder_of_images(tmp_path / "images", ["0.png", "1.png"])
    rows = [{"file_name": "0.png", "prompt": "a red circle"}, {"file_name": "1.png", "text": "a star"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores.json"
    assert main(["evaluate", str(folder), "--rewards", "lab={measure: strict}", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["images"]["scores"]["lab"]["prompts"] == 2


@pytest.mark.parametrize(
    ("subject", "more", "message"),
    [
        ("nowhere", [], "there is no folder nowhere"),
        ("{tmp}", ["--rewards", "lab"], "is no run (it has no config.yaml)"),
        ("{tiny}", ["--prompts", "a star"], "a plain model brings no rewards"),
        ("{tiny}", ["--rewards", "lab"], "a plain model brings no prompts"),
        ("{tiny}", ["--rewards", "labb"], "did you mean 'lab'?"),
        ("{tmp}/images", [], "needs --rewards"),
        (
            "{tiny}",
            ["--rewards", "lab", "--prompts", "a star", "--lora", "{tmp}"],
            "there are no weights of this policy",
        ),
        ("{tmp}/images", ["--rewards", "lab", "--prompts", "x"], "takes no --prompts"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(subject, more, message, tmp_path, capsys):
    folder_of_images(tmp_path / "images", ["a.png"])
    given = [text.format(tmp=tmp_path, tiny=tiny()) for text in (subject, *more)]
    said = refused(capsys, "evaluate", *given)
    assert message in said


@pytest.mark.slow
def test_the_baseline_of_a_run_is_told_and_drawn(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "best.json"
    # The lab tells random pictures from each other in nothing, so that its reward alone would move no weight.
    assert main(["train", "--config", RECIPE, *small(run, "rewards.jpeg_compressibility=1.0")]) == 0
    more = ["--rewards", "jpeg_compressibility", "lab", "--n", "4", "1", "--betas", "1", "--out", str(out)]
    assert main(["best-of-n", str(run), "--count", "2", "--steps", "2", *more]) == 0
    found = json.loads(out.read_text())
    assert (found["reward"], found["prompts"], found["draws"]) == ("jpeg_compressibility", 2, 4)
    one, four = found["frontier"]["best_of_n"]
    assert (one["name"], one["kl"], four["name"]) == ("n=1", 0, "n=4")
    assert four["reward"] > one["reward"]
    assert four["kl"] == pytest.approx(four["kl_bound"], rel=0.5)
    assert list(four["watched"]) == ["lab"]
    assert found["frontier"]["tilted"][0]["reward"] > one["reward"]
    assert found["trained"]["kl"] > 0
    ElementTree.parse(out.with_suffix(".svg"))
    assert "KL at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--n", "1"], "--n"),
        (["--betas", "0"], "--betas must be positive"),
        (["--rewards", "lab_pairwise"], "scores pictures one by one"),
        (["--rewards", "labb"], "did you mean 'lab'?"),
    ],
)
def test_a_baseline_that_cannot_be_drawn_is_refused(run, more, message, capsys):
    assert message in refused(capsys, "best-of-n", run, *more)


def test_the_benchmark_accounts_for_every_second(tmp_path, capsys):
    out = tmp_path / "bench.json"
    more = ["--iterations", "1", "--warmup", "1", "--json", str(out)]
    assert main(["benchmark", "--recipe", "lab_flow_grpo", *more, *small(tmp_path / "run")]) == 0
    found = json.loads(out.read_text())
    assert sum(found["seconds"].values()) == pytest.approx(found["seconds_per_iteration"], rel=1e-6)
    assert found["seconds"]["network forward"] > 0
    assert 0 < found["outside_share"] < 1
    assert found["forwards"] == {"sample": 4 * 4, "train": 4 * 3, "reference": 4 * 3}
    assert not (tmp_path / "run").exists()
    assert "outside model, VAE, reward" in capsys.readouterr().out


def test_both_ways_to_wait_for_a_reward_are_measured(tmp_path, capsys):
    out = tmp_path / "overlap.json"
    more = ["--overlap", "2", "--iterations", "2", "--warmup", "0", "--json", str(out)]
    assert main(["benchmark", "--recipe", "lab_flow_grpo", *more, *small(tmp_path / "run")]) == 0
    found = json.loads(out.read_text())
    blocking, overlapped = found["blocking"], found["overlapped"]
    assert blocking["iteration"] > 2 * blocking["sample"]  # judging takes as long, and comes after it
    assert overlapped["iteration"] > blocking["sample"]  # as it takes as long here, in all parts together
    assert found["share"] == pytest.approx(overlapped["iteration"] / blocking["iteration"])
    assert len(found["shares"]) == 2
    assert min(found["shares"]) <= found["share"] <= max(found["shares"])
    assert "of the blocking iteration" in capsys.readouterr().out


def test_two_recipes_take_turns_under_one_clock(tmp_path, capsys, monkeypatch):
    out, taken, step = tmp_path / "beside.json", [], Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda run, i: taken.append((len(run.scorer.rewards), i)) or step(run, i)
    )
    names = ["--recipe", "lab_gdpo", "--beside", "lab_diffusion_nft"]
    more = ["--iterations", "2", "--warmup", "1", "--json", str(out), "rewards.sharpness=0.5"]
    less = [f"rewards.{name}=null" for name in ("clip_score", "artifact", "lab_colors")]
    assert main(["benchmark", *names, *more, *less, *small(tmp_path / "run")]) == 0
    assert taken == [(rewards, i) for i in range(3) for rewards in (3, 2)]
    found = json.loads(out.read_text())
    first, second = found["phases"]
    for phases in (first, second):
        parts = sum(seconds for name, seconds in phases.items() if name != "iteration")
        assert parts == pytest.approx(phases["iteration"], rel=1e-3)
    assert found["ratio"] == first["iteration"] / second["iteration"]
    assert found["update_ratio"] == first["update"] / second["update"]
    assert "an iteration takes" in capsys.readouterr().out
    assert "did you mean 'lab_diffusion_nft'" in refused(
        capsys, "benchmark", "--recipe", "lab_gdpo", "--beside", "lab_difusion_nft"
    )


@pytest.mark.slow
def test_memory_is_measured_over_the_number_of_steps(tmp_path, capsys):
    out = tmp_path / "steps.json"
    more = ["--steps", "3,9", "--json", str(out)]
    less = ["prompts.per_iteration=2", "prompts.group=2", "training.batch=2", f"run.dir={tmp_path / 'run'}"]
    assert main(["benchmark", "--recipe", "lab_video_grpo", *more, *less]) == 0
    few, many = json.loads(out.read_text())["steps"]
    assert (few["steps"], many["steps"]) == (3, 9)
    assert many["stored"] == pytest.approx(4 * few["stored"], rel=1e-2)  # of every step but the last
    assert many["rest"] == pytest.approx(few["rest"], rel=1e-2)
    assert "stored states" in capsys.readouterr().out


def test_numbers_of_steps_that_are_none_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--recipe", "lab_video_grpo", "--steps", "5,none"])
    assert "takes whole numbers with commas between them, got '5,none'" in capsys.readouterr().err


def test_a_critic_is_served_only_as_a_run_has_left_it(tmp_path, capsys):
    for number in range(8):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    critic = f"adversarial={{references: {tmp_path}, features: pixels}}"
    assert "served as such a run has left it: --learned RUN" in refused(capsys, "serve-rewards", critic)
    nothing = ["--learned", str(tmp_path / "run")]
    assert "there is no folder" in refused(capsys, "serve-rewards", critic, *nothing)


def test_an_unknown_recipe_is_refused_with_the_nearest(capsys):
    assert "did you mean 'lab_flow_grpo'" in refused(capsys, "benchmark", "--recipe", "lab_flow_gpro")


def test_the_report_can_be_written_again(run, capsys):
    before = (run / "report.json").read_text()
    assert main(["report", str(run)]) == 0
    assert (run / "report.json").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "sample", "evaluate", "benchmark", "best_of_n", "reproduce"])
def test_scripts_run_from_anywhere_without_installation(name, tmp_path):
    script = Path(ROOT / "scripts" / f"{name}.py")
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"mmalign {name.replace('_', '-')}" in done.stdout
