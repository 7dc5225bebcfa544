"""`mmalign evaluate` against a baseline, against reference pictures, and as a maker of references."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from runs import ROOT, tiny
from test_evaluation import PROMPTS, SMALL, Brightness, Painter

from mmalign.cli import main
from mmalign.compositions import LogSigmoid
from mmalign.data import Prompt
from mmalign.distances import extracted, kid, pixels
from mmalign.evaluation import (
    Alone,
    EvaluationSettings,
    Evaluator,
    Verdict,
    draw,
    gain,
    repeat,
    summarize,
    wins,
)
from mmalign.subjects import picture_of


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def folder_of(place, shades):
    """Two pictures of each of some prompts, gray with a little noise."""
    place.mkdir()
    draws = torch.Generator().manual_seed(0)
    for i, shade in enumerate(shades):
        for seed in range(2):
            noise = torch.rand(24, 24, 3, generator=draws)
            pixels_ = ((shade + 0.1 * noise) * 255).clamp(0, 255).byte().numpy()
            Image.fromarray(pixels_).save(place / f"prompt_number_{'abcdefgh'[i]}_{seed}.png")
    return place


def evaluated(values):
    found = [Verdict({"r": v}) for v in values]
    result = summarize(found, torch.zeros(len(found), 3, 8, 8), torch.arange(len(found)))
    return replace(result, prompts=[str(i) for i in range(len(values))])


def test_wins_are_counted_by_prompt_and_ties_by_half():
    base, other = evaluated([1.0, 2.0, 3.0, 4.0]), evaluated([2.0, 2.0, 2.0, 9.0])
    won = wins(base, other, "r")
    assert won.mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert 0 <= won.low <= won.mean <= won.high <= 1
    assert wins(other, base, "r").mean == pytest.approx(1 - won.mean)
    assert gain(base, other, "r").mean == pytest.approx(1.25)


def test_other_prompts_are_not_compared():
    base = evaluated([1.0, 2.0])
    with pytest.raises(ValueError, match="or they differ"):
        wins(base, replace(base, prompts=["x", "y"]), "r")


def test_a_folder_is_compared_with_what_was_written_before(tmp_path, capsys):
    dark, light = folder_of(tmp_path / "dark", [0.2] * 5), folder_of(tmp_path / "light", [0.5] * 5)
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    rewards = ["--rewards", "contrast", "colorfulness"]
    assert main(["evaluate", str(dark), *rewards, "--json", str(before)]) == 0
    assert main(["evaluate", str(light), *rewards, "--json", str(after), "--baseline", str(before)]) == 0
    assert "gain over" in capsys.readouterr().out
    result = json.loads(after.read_text())
    found = result["against_baseline"]["contrast"]
    scores = [
        json.loads(path.read_text())["images"]["scores"]["contrast"]["mean"] for path in (before, after)
    ]
    assert found["gain"]["mean"] == pytest.approx(scores[1] - scores[0])
    assert 0 <= found["win rate"]["mean"] <= 1
    assert result["images"]["prompts"][0] == "prompt number a"


def test_a_baseline_that_is_none_is_refused(tmp_path, capsys):
    dark = folder_of(tmp_path / "dark", [0.2] * 2)
    (tmp_path / "x.json").write_text("{}")
    assert main(["evaluate", str(dark), "--rewards", "contrast", "--baseline", str(tmp_path / "x.json")]) == 2
    assert "not written by mmalign evaluate" in capsys.readouterr().err


def test_distances_to_a_folder_of_references(tmp_path):
    drawn = folder_of(tmp_path / "drawn", [0.2, 0.4, 0.6])
    references = folder_of(tmp_path / "references", [0.3, 0.5, 0.7, 0.8])
    out = tmp_path / "out.json"
    command = ["evaluate", str(drawn), "--rewards", "contrast", "--reference", str(references)]
    assert main([*command, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["images"]["distances"]
    sides = [
        torch.cat([extracted(pixels, picture_of(path)[None]) for path in sorted(place.iterdir())])
        for place in (drawn, references)
    ]
    assert found["kid"] == pytest.approx(kid(*sides), rel=1e-4)
    assert (found["pictures"], found["references"]) == (6, 8)
    assert 0 <= found["precision"] <= 1
    assert found["variety"] > 0


def test_an_evaluator_measures_distances_of_what_it_drew():
    references = extracted(pixels, torch.rand(9, 3, 16, 16))
    evaluator = Evaluator(PROMPTS, [Brightness()], SMALL, Alone(), pixels, references)
    found, _ = evaluator.scores(Painter())
    assert found.distances.pictures == len(PROMPTS) * SMALL.seeds
    assert found.prompts == [prompt.text for prompt in PROMPTS]
    plain, _ = Evaluator(PROMPTS, [Brightness()], SMALL, Alone()).scores(Painter())
    assert plain.distances is None
    assert {**plain.scores, "kid": found.scores["kid"]} == found.scores
    assert found.scores["kid"].mean == pytest.approx(found.distances.kid, rel=1e-6)
    assert len(found.by_prompt["kid"]) == len(PROMPTS)


def test_scores_with_distances_are_kept(tmp_path):
    references = extracted(pixels, torch.rand(9, 3, 16, 16))
    found, _ = Evaluator(PROMPTS, [Brightness()], SMALL, Alone(), pixels, references).scores(Painter())
    found.save(tmp_path / "scores.json")
    assert type(found).load(tmp_path / "scores.json") == found


def test_quantiles_are_over_the_seeds_of_a_prompt():
    settings = EvaluationSettings(prompts=0, seeds=5, steps=1, show=1)
    found = Evaluator(PROMPTS, [Brightness()], settings, Alone()).quantiles(Painter(), 0.5)
    painter = Painter()
    images = draw(painter, repeat(PROMPTS, list(range(len(PROMPTS))), 5), settings)
    middle = images.mean((1, 2, 3)).reshape(len(PROMPTS), 5).median(1).values
    for prompt, value in zip(PROMPTS, middle.tolist(), strict=True):
        assert found[prompt.text]["bright"] == pytest.approx(value, abs=1e-6)


def test_references_are_written_for_the_composition(tmp_path):
    out, prompts = tmp_path / "references.json", tmp_path / "prompts.txt"
    prompts.write_text("a red cat\ntwo dogs\n")
    command = ["evaluate", str(tiny()), "policy.height=32", "policy.width=32", "--prompts", str(prompts)]
    made = ["--rewards", "contrast", "--seeds", "3", "--steps", "1", "--references", str(out)]
    assert main([*command, *made, "--quantile", "1.0"]) == 0
    composer = LogSigmoid(str(out)).build({"contrast": {0: 1.0}})
    assert set(composer.rule.references) == {"a red cat", "two dogs"}
    assert composer.rule.references["two dogs"]["contrast"] > 0


def test_categories_of_the_prompt_file_are_told():
    class Plain(Brightness):
        def __call__(self, outcome):
            return replace(super().__call__(outcome), details=None)

    prompts = [Prompt(text, {"category": kind}) for text, kind in (("a", "one"), ("b", "two"), ("c", "one"))]
    found, _ = Evaluator(prompts, [Plain()], SMALL, Alone()).scores(Painter())
    kinds = found.categories["bright"]
    assert {name: of.prompts for name, of in kinds.items()} == {"one": 2, "two": 1}
