"""Experiments from their files to the page of results, with runs of a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from runs import ROOT, small

from mmalign import results
from mmalign.checkpoints import latest
from mmalign.cli import main
from mmalign.config import ConfigError
from mmalign.evaluation import Evaluated
from mmalign.experiments import Comparison, affordable, configure, read_experiment, spent
from mmalign.report import RunFiles

SCORE = "jpeg_compressibility"
TINY = {
    "title": "Tiny",
    "question": "Does it run?",
    "budget": {"forwards": 150},
    "seeds": [0, 1],
    "points": 1,
    "scores": [SCORE],
    "arms": {
        "fast": {"recipe": "lab_flow_grpo_fast"},
        "nft": {"recipe": "lab_diffusion_nft", "set": ["training.learning_rate=1e-2"]},
    },
    "evaluations": {"more": {"steps": 3}},
    "claims": [
        {
            "text": "The first is better",
            "source": "nobody",
            "holds": [
                {"metric": f"heldout/{SCORE}", "arm": "nft", "than": "fast", "by": -1e9},
                {"metric": f"heldout@more/{SCORE}", "arm": "nft", "by": -1e9},
                {"metric": "report/iterations", "arm": "nft", "than": "fast", "by": -1e9},
            ],
        },
        {"text": "It moves less", "holds": [{"metric": "kl", "arm": "nft", "than": "fast", "lower": True}]},
    ],
}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def written(folder: Path, **changes: object) -> Path:
    """The tiny experiment as a file."""
    ours = ("run.dir", "training.iterations", "rewards")
    common = [text for text in small(folder) if not text.startswith(ours)]
    common += [f"rewards.{SCORE}=1.0", "rewards.lab=null"]
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "common": common, **changes}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The file of a finished experiment, its runs, and its page."""
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        path = written(folder)
        assert main(reproduce(folder)) == 0
    return path, folder / "runs", folder / "page" / "results.md"


def reproduce(folder: Path, *more: str) -> list[str]:
    page = folder / "page" / "results.md"
    return ["reproduce", str(folder / "tiny.yaml"), "--runs", str(folder / "runs"), "--out", str(page), *more]


# Files


@pytest.mark.parametrize("path", sorted((ROOT / "assets/experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_an_experiment_of_the_project_can_be_run(path):
    experiment = read_experiment(path)
    for name in experiment.arms:
        config = configure(experiment, name, 1)
        assert config.training.seed == 1
        assert config.evaluation.seeds >= 2, "diversity needs two pictures of a prompt"


def test_the_page_is_what_the_data_beside_it_say():
    known = [json.loads(path.read_text()) for path in sorted((ROOT / "docs/results").glob("*.json"))]
    assert (ROOT / "docs/results.md").read_text() == results.markdown(known)
    for result in known:
        for name, svg in results.plots(result).items():
            assert (ROOT / "docs/images" / name).read_text() == svg


CLAIM = {"text": "x", "holds": [{"metric": "heldout/soft", "arm": "nft", "than": "fast"}]}


def claim(**changes: object) -> list[object]:
    return [{**CLAIM, "holds": [{**CLAIM["holds"][0], **changes}]}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"forwards": -3}}, "positive number of forwards or of iterations"),
        ({"budget": {"forwards": 3, "iterations": 3}}, "not both"),
        ({"bugdet": {"forwards": 3}}, "has no setting 'bugdet'"),
        ({"claims": claim(arm="nfd")}, "there is no arm 'nfd'; did you mean 'nft'?"),
        ({"claims": claim(metric="held/soft")}, "metric must be heldout/SCORE or"),
        ({"claims": claim(metric="heldout@mroe/soft")}, "no evaluation 'mroe'; did you mean 'more'?"),
        ({"claims": claim(metric="report/iterations", than="base")}, "set than"),
        ({"claims": claim(metric="forwards_to/soft", than="nothing")}, "needs another arm"),
        ({"claims": claim(at="seconds", than="nothing")}, "needs another arm"),
        ({"claims": claim(arm="base")}, "there is no arm 'base'"),
        ({"arms": {"nothing": {"recipe": "lab_awm"}}, "claims": []}, "called base or nothing"),
        ({"arms": {"base": {"recipe": "lab_awm"}}, "claims": []}, "no arm may be called base or nothing"),
        (
            {"arms": {"a": {"recipe": "lab_amw"}}, "claims": []},
            "no recipe 'lab_amw'; did you mean 'lab_awm'?",
        ),
        ({"arms": {"a": {"recipe": "lab_awm", "set": ["training.sed=1"]}}, "claims": []}, "'sed'"),
        ({"evaluations": {"more": {"stpes": 3}}}, "has no setting 'stpes'"),
        ({"seeds": [0, 0]}, "seeds must differ"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_anything_runs(tmp_path, capsys, changes, message):
    written(tmp_path, **changes)
    assert main(reproduce(tmp_path)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_missing_file_is_an_error():
    with pytest.raises(ConfigError, match="there is no experiment"):
        read_experiment(Path("assets/experiments/nothing.yaml"))


def test_a_backward_counts_two_forwards():
    assert spent({"sample": 10, "train": 4, "reference": 2}) == 10 + 3 * 4 + 2


@pytest.mark.slow
def test_a_budget_below_one_iteration_is_refused(tmp_path, capsys):
    written(tmp_path, budget={"forwards": 5})
    assert main(reproduce(tmp_path, "--only", "nft")) == 1
    said = capsys.readouterr().out
    assert "an iteration of nft takes" in said
    assert "tiny: nft, seed 0: failed" in said


def test_without_a_budget_an_arm_has_the_iterations_of_its_recipe():
    experiment = read_experiment(Path("assets/experiments/long.yaml"))
    for name, arm in experiment.arms.items():
        recipe = yaml.safe_load(Path(f"assets/recipes/{arm.recipe}.yaml").read_text())
        assert affordable(experiment, name) == recipe["training"]["iterations"]


def finished(seed: int, cosines: list[float | None]) -> results.Finished:
    """A run with a metric that not every iteration has."""
    fixed = {"seconds/iteration": 1.0, "forwards/sample": 1, "forwards/train": 1, "forwards/reference": 0}
    looks = [{} if c is None else {"balance/cosine_worst": c} for c in cosines]
    rows = [{"step": i, **fixed, **look} for i, look in enumerate(looks)]
    return results.Finished(RunFiles(Path(f"seed_{seed}"), {}, {}, rows, {}), {})


def test_the_least_that_a_metric_was_is_claimed_by_itself():
    """By hand: the least of each run, their mean, and an interval that ends where both draws are one run."""
    runs = {
        "marble": [finished(0, [0.3, None, 0.1, 0.2]), finished(1, [0.5, None, 0.4, None])],
        "equal": [finished(0, [0.2, None, -0.3, 0.4]), finished(1, [-0.1, None, 0.9, None])],
    }
    told = {}
    for arm, lower in (("marble", False), ("equal", True)):
        one = Comparison("least/balance/cosine_worst", arm, "nothing", lower=lower)
        told[results.said(one)] = results.compare(one, runs)
    above, below = told.values()
    assert (above.value, above.low, above.high) == pytest.approx((0.25, 0.1, 0.4))
    assert (below.value, below.low, below.high) == pytest.approx((0.2, 0.1, 0.3))
    words = ["least/balance/cosine_worst of marble", "minus least/balance/cosine_worst of equal"]
    assert list(told) == words
    beside = results.compare(Comparison("least/balance/cosine_worst", "marble", "equal"), runs)
    assert beside.value == pytest.approx(0.45)
    with pytest.raises(ValueError, match="no metric 'balance/cosine'"):
        results.measured(runs["marble"], "least/balance/cosine")


@pytest.mark.slow
def test_the_cosine_of_marble_is_read_from_its_run(tmp_path):
    """The claims of the project's own file about cosines, on a tiny model with a look at every update."""
    ours = yaml.safe_load(Path("assets/experiments/marble.yaml").read_text())
    claims = [c for c in ours["claims"] if c["holds"][0]["metric"].startswith("least/")]
    rewards = ["lab", "clip_score", "artifact", "lab_colors"]
    common = [text for text in small(tmp_path) if not text.startswith(("run.dir", "training.iterations"))]
    common += [
        *(f"rewards.{name}=null" for name in rewards),
        "rewards.colorfulness=1.0",
        "composition.every=1",
    ]
    arms = {name: ours["arms"][name] for name in ("marble", "equal")}
    path = tmp_path / "tiny.yaml"
    tiny = {
        "title": "x",
        "question": "x",
        "budget": {"iterations": 2},
        "seeds": [0],
        "points": 0,
        "kl": False,
    }
    tiny |= {"scores": ["contrast"], "common": common, "arms": arms, "claims": claims}
    path.write_text(yaml.safe_dump(tiny))
    assert main(reproduce(tmp_path)) == 0
    found = json.loads((tmp_path / "page/results/tiny.json").read_text())["claims"]
    for claim, arm, sign in zip(found, ("marble", "equal"), (1, -1), strict=True):
        rows = (tmp_path / f"runs/tiny/{arm}/seed_0/metrics.jsonl").read_text().splitlines()
        least = min(json.loads(row)["balance/cosine_worst"] for row in rows)
        part = claim["parts"][0]
        assert part["value"] == part["low"] == pytest.approx(sign * least)
        assert claim["shown"] is (sign * least > 0)
    assert found[0]["shown"] is True  # by what the least vector between unit gradients is


# Runs


@pytest.mark.slow
def test_every_arm_spends_the_budget_as_far_as_whole_iterations_go(done):
    path, runs, _ = done
    experiment = read_experiment(path)
    for name in experiment.arms:
        for seed in experiment.seeds:
            told = json.loads((runs / "tiny" / name / f"seed_{seed}" / "report.json").read_text())
            cost = spent(told["forwards"]) / told["iterations"]
            assert told["iterations"] == affordable(experiment, name)
            assert told["seeds"]["training"] == seed
            assert 150 - cost < spent(told["forwards"]) <= 150 + 0.2 * cost  # windows move


@pytest.mark.slow
def test_arms_that_begin_alike_see_their_base_evaluated_once(done):
    _, runs, _ = done
    bases = list(runs.glob("tiny/*/seed_*/evaluation/base.json"))
    assert len(bases) == 4
    assert len({path.read_text() for path in bases}) == 1  # with the seconds that it took


@pytest.mark.slow
def test_a_finished_run_is_not_run_again_and_a_broken_one_goes_on(done, tmp_path, capsys):
    _, runs, _ = done
    shutil.copytree(runs, tmp_path / "runs")
    written(tmp_path)
    ours = tmp_path / "runs/tiny/nft/seed_1"
    for name in ("report.json", "evaluation/trained.json"):
        (ours / name).unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("report.json")}
    assert main(reproduce(tmp_path)) == 0
    said = capsys.readouterr().out
    assert said.count("goes on") == 1
    assert f"tiny: nft, seed 1: goes on, {ours}" in said
    assert said.count(": finished\n") == 4
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    evaluated = [Evaluated.load(place / "nft/seed_1/evaluation/trained.json") for place in
                 (runs / "tiny", tmp_path / "runs/tiny")]  # fmt: skip
    assert evaluated[0].by_prompt == evaluated[1].by_prompt


@pytest.mark.slow
def test_a_run_that_was_begun_with_other_settings_is_refused(done, tmp_path, capsys):
    _, runs, _ = done
    shutil.copytree(runs / "tiny/nft/seed_0", tmp_path / "runs/tiny/nft/seed_0")
    (tmp_path / "runs/tiny/nft/seed_0/report.json").unlink()
    arms = {**TINY["arms"], "nft": {"recipe": "lab_diffusion_nft", "set": ["training.learning_rate=1e-3"]}}
    written(tmp_path, arms=arms, seeds=[0])
    assert main(reproduce(tmp_path, "--only", "nft")) == 1
    assert "training.learning_rate: 0.01 -> 0.001" in capsys.readouterr().out


@pytest.mark.slow
def test_the_table_holds_the_numbers_of_the_runs(done):
    _, runs, page = done
    result = json.loads((page.parent / "results/tiny.json").read_text())
    for name in ("fast", "nft"):
        arm = result["arms"][name]
        folders = [runs / "tiny" / name / f"seed_{seed}" for seed in (0, 1)]
        told = [json.loads((folder / "report.json").read_text()) for folder in folders]

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        assert arm["runs"] == 2
        assert arm["scores"][SCORE]["trained"]["value"] == pytest.approx(
            mean([one["heldout"][SCORE]["trained"] for one in told])
        )
        assert arm["scores"][SCORE]["gain"]["value"] == pytest.approx(
            mean([one["heldout"][SCORE]["gain"] for one in told])
        )
        assert arm["forwards"] == pytest.approx(mean([spent(one["forwards"]) for one in told]))
        kl = [json.loads((folder / "evaluation/kl.json").read_text())["kl"] for folder in folders]
        assert min(kl) > 0
        assert arm["kl"]["value"] == pytest.approx(mean(kl))
        along = arm["along"][SCORE]
        assert along["forwards"][0] == along["seconds"][0] == 0
        assert along["value"][0] == pytest.approx(told[0]["heldout"][SCORE]["base"])
        assert len(along["value"]) == 3, "before, once on the way, after"
        assert f"| {name} | 2 | {arm['iterations']} |" in page.read_text()


@pytest.mark.slow
def test_a_claim_is_judged_by_the_interval_of_every_comparison(done):
    _, runs, page = done
    result = json.loads((page.parent / "results/tiny.json").read_text())
    first, second = result["claims"]
    assert first["shown"] is True
    assert second["shown"] is (second["parts"][0]["low"] > 0)
    extra = [Evaluated.load(folder / "evaluation/trained@more.json") for folder in runs.glob("tiny/nft/*")]
    base = Evaluated.load(runs / "tiny/nft/seed_0/evaluation/base@more.json")
    gain = np.mean([e.by_prompt[SCORE] for e in extra]) - np.mean(base.by_prompt[SCORE])
    assert first["parts"][1]["value"] == pytest.approx(gain)
    assert "**Shown**: The first is better (nobody)" in page.read_text()


@pytest.mark.slow
def test_what_is_not_run_is_not_judged(done, tmp_path):
    _, runs, _ = done
    shutil.copytree(runs / "tiny/nft", tmp_path / "runs/tiny/nft")
    written(tmp_path)
    assert main(reproduce(tmp_path, "--write-only")) == 0
    text = (tmp_path / "page/results.md").read_text()
    assert "Not finished: fast, seed 0; fast, seed 1." in text
    assert text.count("**Not measured**") == 2


@pytest.mark.slow
def test_without_runs_the_page_keeps_what_is_known(done, tmp_path):
    _, _, page = done
    shutil.copytree(page.parent, tmp_path / "page")
    written(tmp_path)
    assert main(reproduce(tmp_path, "--write-only")) == 0
    assert (tmp_path / "page/results.md").read_text() == page.read_text()


@pytest.mark.slow
def test_a_score_that_nobody_measured_is_named(done):
    path, runs, _ = done
    experiment = read_experiment(path)
    found = {"nft": [results.Finished.read(runs / "tiny/nft/seed_0")]}
    for metric, message in (
        ("heldout/sotf", f"no held-out score 'sotf'; there are {SCORE}"),
        ("report/heldout.x", "no number 'heldout.x'"),
        ("metrics/klx", "no metric 'klx'"),
    ):
        with pytest.raises(ValueError, match=message):
            results.measured(found["nft"], metric)
    same = Comparison("metrics/grad_norm", "nft", "nft")
    assert results.compare(same, found).value == 0
    assert latest(runs / "tiny/nft/seed_0") is not None
    assert experiment.name == "tiny"
