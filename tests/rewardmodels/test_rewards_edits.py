"""Rewards of edits: the exact verifier, agreement with a plan, and a judge whose library evolves."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import runpy
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.lab.edit_data import line
from mmalign.lab.edit_verifier import judge_edit
from mmalign.lab.edits import KINDS, draw_edit, parse_edit, write_edit, write_plan
from mmalign.lab.reading import read_scene
from mmalign.lab.render import render
from mmalign.records import Outcome, Unit
from mmalign.rewardmodels import edit_consistency, load
from mmalign.rewardmodels.edit_consistency import (
    ChatJudge,
    EditConsistency,
    PlannedEdit,
    agreement,
    correlation,
    read_ratings,
)
from mmalign.rewardmodels.edit_harness import EditCase, EditHarness, Library, Skill, Tool, grade, read_turn
from mmalign.rewardmodels.endpoint import Answer
from mmalign.rewardmodels.harness_evolution import (
    Comparison,
    Evolution,
    Evolver,
    Graded,
    accuracy,
    changed,
    read_comparisons,
)
from mmalign.rewardmodels.lab_plan import ExactJudge
from mmalign.testing import check_reward, prompts_of

ROOT = Path(__file__).parents[2]


def picture(scene):
    return torch.from_numpy(render(scene)).permute(2, 0, 1) / 255


def drawn(count, seed=0):
    rng = random.Random(seed)
    return [draw_edit(rng, kind=KINDS[i % len(KINDS)]) for i in range(count)]


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    """Edits with the files of their sources: [(source, edit, target, extra)]."""
    folder = tmp_path_factory.mktemp("edits")
    found = []
    for number, (source, edit, target) in enumerate(drawn(12)):
        Image.fromarray(render(source)).save(folder / f"{number}.png")
        extra = line(source, edit, "") | {"source": str(folder / f"{number}.png")}
        found.append((source, edit, target, extra))
    return found


def outcome(edits, pictures):
    asked = prompts_of([write_edit(edit) for _, edit, _, _ in edits], 1, [extra for *_, extra in edits])
    return Outcome(asked, torch.stack(pictures))


# ---- the exact verifier


def test_a_target_gets_1_and_its_source_nothing(edits):
    for measure in ("soft", "strict", "change", "stay"):
        reward = load("lab_edit", measure=measure)
        after = reward(outcome(edits, [picture(target) for _, _, target, _ in edits]))
        before = reward(outcome(edits, [picture(source) for source, *_ in edits]))
        assert after.values.unique().tolist() == [1.0]
        if measure != "stay":
            assert before.values.unique().tolist() == [0.0]


def test_criteria_are_what_changed_and_what_stayed(edits):
    signal = load("lab_edit", grain="criterion")(outcome(edits, [picture(source) for source, *_ in edits]))
    assert signal.unit is Unit.CRITERION
    assert signal.values[:, 0].tolist() == [0.0] * len(edits)
    kept = [edit.kind != "swap" for _, edit, *_ in edits]
    assert signal.values[kept, 1].tolist() == [1.0] * sum(kept)


def test_the_verifier_of_edits_is_a_reward(edits):
    mixed = [picture(target if i % 2 else source) for i, (source, _, target, _) in enumerate(edits)]
    for reward in (load("lab_edit"), load("lab_edit", grain="criterion"), load("edit_consistency")):
        check_reward(reward, outcome(edits, mixed))


def test_what_cannot_be_verified_is_missing_with_a_reason(edits):
    pictures = [picture(edits[0][0])] * 3
    texts = ["make it nicer", write_edit(edits[0][1]), "remove the ring of gold"]
    asked = prompts_of(texts, 1, [edits[0][3], {}, {"scene": {"things": [{"shape": "star"}]}}])
    signal = load("lab_edit")(Outcome(asked, torch.stack(pictures)))
    assert not signal.valid.any()
    reasons = [detail["missing"] for detail in signal.details]
    assert "is not an instruction" in reasons[0]
    assert 'no "scene"' in reasons[1]
    assert "scene: expected things" in reasons[2]
    with pytest.raises(ValueError, match="measure must be one of soft, strict, change, stay"):
        load("lab_edit", measure="hard")
    with pytest.raises(ValueError, match="goes with measure 'soft'"):
        load("lab_edit", measure="strict", grain="criterion")


# ---- agreement with a plan


def test_exchanged_plans_score_lower(edits):
    pictures = [picture(target) for _, _, target, _ in edits]
    own = load("edit_consistency")(outcome(edits, pictures))
    turned = [
        (*row[:3], row[3] | {"plan": other[3]["plan"]})
        for row, other in zip(edits, edits[1:] + edits[:1], strict=True)
    ]
    other = load("edit_consistency")(outcome(turned, pictures))
    assert own.values.unique().tolist() == [1.0]
    assert other.valid.all()
    assert (other.values < own.values).all()
    assert other.values.mean() < 0.3


def test_a_wrong_plan_that_is_followed_is_rewarded(edits):
    """Why the recipe has a reward of the instruction beside it."""
    source, edit, _, extra = next(row for row in edits if row[1].kind == "recolor")
    color = next(c for c in ("red", "green", "blue") if c not in (edit.value, source.things[0].color))
    wrong = replace(edit, value=color)
    things = tuple(replace(t, color=color) if edit.subject.means(t) else t for t in source.things)
    shown = [picture(replace(source, things=things))]
    row = [(source, edit, None, extra | {"plan": write_plan(wrong)})]
    assert load("edit_consistency")(outcome(row, shown)).values.item() == 1
    assert load("lab_edit")(outcome(row, shown)).values.item() < 0.1


class Rater:
    """A client that answers with numbers, in turn; it keeps what it was asked."""

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def ask(self, questions):
        self.asked += questions
        texts = [self.texts[(len(self.asked) + i) % len(self.texts)] for i in range(len(questions))]
        return [Answer(None, "dead") if text is None else Answer(text) for text in texts]


@pytest.fixture
def chat(monkeypatch):
    def make(*texts, **more):
        client = Rater(*texts)
        monkeypatch.setattr(edit_consistency, "open_client", lambda *given: client)
        return ChatJudge("endpoint", "model", **more), client

    return make


def test_a_model_sees_both_pictures_and_the_plan_and_malformed_ratings_are_asked_again(chat, edits):
    judge, client = chat("no idea", "7", "score: 7")
    case = PlannedEdit(edits[0][3]["source"], picture(edits[0][2]), edits[0][3]["plan"])
    assert judge.rate([case]) == [7.0]
    content = client.asked[0].messages[0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert case.plan in content[-1]["text"]
    shown = Image.open(io.BytesIO(base64.b64decode(content[1]["image_url"]["url"].partition(",")[2])))
    assert np.array_equal(np.asarray(shown), render(edits[0][2]))
    judge, client = chat("I would not say")
    [problem] = judge.rate([case])
    assert "no number" in problem
    assert len(client.asked) == 4
    judge, _ = chat(None)
    assert judge.rate([case]) == ["dead"]


def test_several_looks_are_averaged_and_drawn(chat, edits):
    judge, client = chat("4", "6", "8", looks=3)
    case = PlannedEdit(edits[0][3]["source"], picture(edits[0][2]), edits[0][3]["plan"])
    assert judge.rate([case]) == [6.0]
    assert {question.temperature for question in client.asked} == {0.7}
    assert len({question.attempt for question in client.asked}) == 3


def test_a_dead_judge_leaves_missing_rewards(chat, edits):
    reward = EditConsistency(judge="endpoint", model="m", url="http://localhost:1/v1")
    judge, _ = chat(None)
    reward.__dict__["rater"] = judge
    signal = reward(outcome(edits[:2], [picture(edits[0][2])] * 2))
    assert not signal.valid.any()
    assert [detail["missing"] for detail in signal.details] == ["dead", "dead"]


def rated(folder, edits, ratings):
    rows = []
    for number, ((source, _, target, extra), rating) in enumerate(zip(edits, ratings, strict=True)):
        Image.fromarray(render(target if rating > 5 else source)).save(folder / f"edited{number}.png")
        Image.fromarray(render(source)).save(folder / f"source{number}.png")
        row = {"source": f"source{number}.png", "edited": f"edited{number}.png", "rating": rating}
        rows.append(json.dumps(extra | row))
    file = folder / "ratings.jsonl"
    file.write_text("\n".join(rows))
    return file


def test_a_judge_that_disagrees_with_people_is_refused_before_training(tmp_path, edits):
    ratings = [9.0 if i % 2 else 1.0 for i in range(len(edits))]
    file = str(rated(tmp_path, edits, ratings))
    load("edit_consistency", calibration=file)
    found = agreement(ExactJudge(), *read_ratings(file))
    assert found.pearson == pytest.approx(1)
    assert found.error == pytest.approx(1)
    assert found.exchanged > 3
    assert found.t > 1.5
    against = rated(tmp_path, edits, ratings)
    rows = [json.loads(text) for text in against.read_text().splitlines()]
    against.write_text("\n".join(json.dumps(row | {"rating": 10 - row["rating"]}) for row in rows))
    with pytest.raises(
        ValueError, match=r"correlation with them is -1\.00, less than 0\.8; it is off by 9\.00"
    ):
        load("edit_consistency", calibration=file)
    load("edit_consistency", calibration=file, pearson=-1.0, error=10.0)


def test_a_judge_that_nods_at_every_plan_is_refused(tmp_path, edits):
    """It agrees with people on these edits, but not because of their plans."""

    class Nods(ExactJudge):
        def rate(self, cases):
            return [
                9.0 if not np.allclose(c.after, picture(read_scene(open_(c.before))), atol=0.1) else 1.0
                for c in cases
            ]

    def open_(file):
        return np.asarray(Image.open(file).convert("RGB"))

    file = str(rated(tmp_path, edits, [9.0 if i % 2 else 1.0 for i in range(len(edits))]))
    reward = EditConsistency(calibration=None)
    reward.calibration = file
    found = agreement(Nods(), *read_ratings(file))
    assert found.pearson > 0.9
    with pytest.raises(ValueError, match="with plans of others no lower"):
        reward.check(found)


def test_correlation_is_pearsons():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(size=20)
    assert correlation(a.tolist(), b.tolist()) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert correlation([1.0, 1.0], [0.0, 1.0]) == 0


def test_plans_and_ratings_that_are_absent_are_named(tmp_path, edits):
    with pytest.raises(ValueError, match='each prompt needs a "source" and the "plan"'):
        load("edit_consistency")(outcome([(*edits[0][:3], {"source": "x.png"})], [picture(edits[0][0])]))
    with pytest.raises(ValueError, match=r"calibration .*absent\.jsonl is no file"):
        load("edit_consistency", calibration=str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match="judge must be lab, endpoint or local"):
        load("edit_consistency", judge="oracle")
    file = rated(tmp_path, edits[:1], [11.0])
    with pytest.raises(ValueError, match=r"line 1: a rating lies in 0\.\.10, got 11"):
        read_ratings(file)
    file.write_text('{"rating": 3}')
    with pytest.raises(ValueError, match='line 1: expected "source", "edited", "plan" and a "rating"'):
        read_ratings(file)


# ---- a judge with a library


def images(question):
    found = [part for part in question.messages[0]["content"] if part["type"] == "image_url"]
    data = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in found]
    return [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in data]


def words(question):
    return "\n".join(part["text"] for part in question.messages[0]["content"] if part["type"] == "text")


class Careless:
    """A scripted judge: it grades the change rightly, and heeds the rest only where a skill tells it to.

    With a tool `count` at hand it uses that first.
    """

    def __init__(self):
        self.asked = []

    def ask(self, questions):
        self.asked += questions
        return [Answer(self.one(question)) for question in questions]

    def one(self, question):
        text = words(question)
        if "How many" in text and "graded" not in text and "You grade" not in text:
            return str(len(read_scene(images(question)[1]).things))
        if "count(" in text and "<obs>" not in text:
            return (
                '<think>let me count</think><tool>{"name": "count", "arguments": {"what": "things"}}</tool>'
            )
        before, after = (read_scene(image) for image in images(question))
        edit = parse_edit(re.search("instruction was: (.*)", text)[1])
        verdict = judge_edit(after, before, edit)
        quality = verdict.stay if "everything else" in text else 1.0
        grades = {"instruction": 1 + round(3 * verdict.change), "quality": 1 + 3 * quality}
        return f"<think>I looked.</think><answer>{json.dumps(grades)}</answer>"


HEED = Skill("rest", "Compare everything else in the two pictures, thing by thing.")


class Proposer:
    """A scripted writer: useless proposals first, then the skill that helps."""

    def __init__(self, *proposals):
        self.proposals, self.asked = list(proposals), []

    def ask(self, questions):
        self.asked += questions
        return [Answer(self.one(words(question))) for question in questions]

    def one(self, text):
        if "Propose changes" not in text:
            return "The judge overlooks what else changed."
        return self.proposals.pop(0) if len(self.proposals) > 1 else self.proposals[0]


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    """Of each source: the target, the target with something else changed, and the source itself."""
    folder = tmp_path_factory.mktemp("comparisons")
    rng, rows = random.Random(5), []
    while len(rows) < 20:
        source, edit, target = draw_edit(rng, kind=rng.choice(("recolor", "reshape")))
        spare = [t for t in source.things if t in target.things]
        if not spare:
            continue
        side = replace(target, things=tuple(t for t in target.things if t != spare[0]))
        names = []
        for name, scene in zip(
            ("before", "right", "careless", "nothing"), (source, target, side, source), strict=True
        ):
            names.append(f"{len(rows)}_{name}.png")
            Image.fromarray(render(scene)).save(folder / names[-1])
        order = rng.sample(range(3), 3)
        rows.append(
            {
                "prompt": write_edit(edit),
                "source": names[0],
                "candidates": [names[1 + i] for i in order],
                "scores": [(3.0, 2.0, 1.0)[i] for i in order],
            }
        )
    file = folder / "comparisons.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return read_comparisons(file)


def case_of(comparison, place=0):
    before, after = (Image.open(name) for name in (comparison.source, comparison.candidates[place]))
    return EditCase(comparison.instruction, before, after)


def test_the_library_evolves_where_held_out_pairs_get_better(comparisons):
    useless = '[{"do": "write", "name": "nice", "text": "Say whether it is nice.", "words": []}]'
    broken = "I would add a rule about everything else."
    helpful = f'Here: [{{"do": "write", "name": "rest", "text": "{HEED.text}", "words": []}}]'
    judge, writer = Careless(), Proposer(useless, broken, broken, broken, broken, helpful)
    evolver = Evolver(judge, writer, comparisons, Evolution(rounds=3))
    found = evolver.run(Library())
    assert found.library == Library((HEED,))
    assert found.first.pairs == pytest.approx(2 / 3)
    assert found.first.groups == 0
    assert found.last.pairs == found.last.groups == 1
    assert [step.what for step in found.steps if step.accepted] == ["skills"]
    rejected = [step for step in found.steps if not step.accepted and step.what != "prune"]
    assert rejected
    assert all(step.after <= step.before for step in rejected)


def test_the_script_writes_the_library_and_its_steps(comparisons, tmp_path, monkeypatch, capsys):
    file, out = Path(comparisons[0].source).parent / "comparisons.jsonl", tmp_path / "library.json"
    helpful = f'[{{"do": "write", "name": "rest", "text": "{HEED.text}", "words": []}}]'
    asked = []

    def opened(kind, model, url, answers):
        asked.append((kind, model, url))
        return Careless() if model == "judge" else Proposer(helpful)

    script = runpy.run_path(str(ROOT / "scripts/evolve_judge.py"))["main"]
    monkeypatch.setitem(script.__globals__, "open_client", opened)
    words = ["--comparisons", file, "--out", out, "--model", "judge", "--url", "http://judge/v1", "--writer",
             "http://writer/v1", "--writer-model", "writer", "--rounds", 1]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evolve_judge.py", *map(str, words)])
    script()
    assert asked == [("endpoint", "judge", "http://judge/v1"), ("endpoint", "writer", "http://writer/v1")]
    assert Library.read(out) == Library((HEED,))
    steps = json.loads((tmp_path / "library.steps.json").read_text())
    assert [step["what"] for step in steps if step["accepted"]] == ["skills"]
    said = capsys.readouterr().out
    assert re.search(r"^round \d, skills: pairs 0\.667 -> 1\.000, kept$", said, re.MULTILINE)
    assert said.endswith("set aside: pairs 0.667 -> 1.000, whole comparisons 0.000 -> 1.000; 1 entries\n")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--start", str(tmp_path / "absent.json")])
    with pytest.raises(SystemExit, match=r"error: .*absent"):
        script()


def test_the_writer_never_sees_what_was_set_aside(comparisons):
    writer = Proposer("[]")
    evolver = Evolver(Careless(), writer, comparisons, Evolution(rounds=2))
    evolver.run(Library())
    assert len(evolver.learn) == 12
    assert len(evolver.aside) == 8
    shown = {image.tobytes() for question in writer.asked for image in images(question)}
    aside = {
        np.asarray(Image.open(name).convert("RGB")).tobytes()
        for one in evolver.aside
        for name in (one.source, *one.candidates)
    }
    learn = {
        np.asarray(Image.open(name).convert("RGB")).tobytes()
        for one in evolver.learn
        for name in (one.source, *one.candidates)
    }
    assert shown
    assert shown <= learn
    assert not shown & aside


def test_an_entry_without_which_nothing_is_worse_is_pruned(comparisons):
    idle = Skill("idle", "Think of the sea.")
    found = Evolver(Careless(), Proposer("[]"), comparisons, Evolution(rounds=1)).run(Library((idle, HEED)))
    assert found.library == Library((HEED,))
    assert found.first == found.last


def test_a_tolerance_keeps_what_is_little_worse(comparisons):
    strict = Evolver(Careless(), Proposer("[]"), comparisons, Evolution())
    loose = Evolver(Careless(), Proposer("[]"), comparisons, Evolution(tolerance=0.075))
    assert [strict.accepts(0.5, after) for after in (0.4, 0.45, 0.5, 0.51)] == [False, False, False, True]
    assert [loose.accepts(0.5, after) for after in (0.4, 0.45, 0.5, 0.51)] == [False, True, True, True]


@pytest.mark.parametrize(("count", "chance"), [(2, 1 / 2), (3, 1 / 6), (4, 1 / 24)])
def test_a_group_is_right_only_with_all_its_pairs(count, chance):
    comparison = Comparison("", "", tuple(map(str, range(count))), tuple(map(float, range(count))))
    whole = []
    for order in permutations(range(count)):
        grades = tuple(grade_of(1 + 3 * place / count) for place in order)
        whole.append(Graded(comparison, grades))
    found = accuracy(whole)
    assert found.groups == pytest.approx(chance)
    assert found.pairs == pytest.approx(1 / 2)
    ties = Graded(comparison, tuple(grade_of(2.0) for _ in range(count)))
    dead = Graded(comparison, ("dead", *(grade_of(2.0) for _ in range(count - 1))))
    assert accuracy([ties]).pairs == 0
    assert accuracy([dead]).groups == 0


def grade_of(value):
    from mmalign.rewardmodels.edit_harness import Grade

    return Grade(value, value, "")


def test_candidates_are_graded_alike_in_any_order(comparisons):
    judge, library = Careless(), Library((HEED,))
    cases = [case_of(one, place) for one in comparisons[:4] for place in range(3)]
    forth, back = grade(judge, library, cases), grade(judge, library, cases[::-1])
    assert forth == back[::-1]


def test_a_tool_is_asked_about_both_pictures_and_its_finding_is_told(comparisons):
    judge = Careless()
    library = Library((HEED,), (Tool("count", "How many {what} are there in the second picture?"),))
    case = case_of(comparisons[0])
    [found] = grade(judge, library, [case])
    asked = [words(question) for question in judge.asked]
    assert asked[1] == "How many things are there in the second picture?"
    assert len(images(judge.asked[1])) == 2
    seen = len(read_scene(np.asarray(case.after.convert("RGB"))).things)
    assert f"<obs>{seen}</obs>" in asked[2]
    assert f"<obs>{seen}</obs>" in found.trace
    assert grade(judge, library, [case], uses=0) == ["the judge uses tools without an end"]


def test_entries_are_for_the_instructions_that_hold_their_words():
    library = Library(
        (HEED, Skill("hues", "Name the hue.", ("red", "blue"))), (Tool("gone", "?", ("remove",)),)
    )
    assert library.routed("make the star Red") == Library(library.skills)
    assert library.routed("remove the ring") == Library((HEED,), library.tools)
    assert library.routed("turn the ring into a reddish star") == Library((HEED,))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fine", "no <answer>"),
        ("<answer>4</answer>", "no object"),
        ("<answer>{4, 4}</answer>", "no JSON"),
        ('<answer>{"instruction": 4}</answer>', "no two grades"),
        ('<answer>{"instruction": 4, "quality": true}</answer>', "no two grades"),
        ('<answer>{"instruction": 4, "quality": 5}</answer>', r"grades lie in 1\.\.4"),
        ('<tool>{"name": "weigh", "arguments": {}}</tool>', "no such tool"),
        ('<tool>{"name": "count", "arguments": {}}</tool>', "takes what, got"),
    ],
)
def test_malformed_answers_are_asked_again_and_then_missing(comparisons, text, problem):
    library = Library((), (Tool("count", "How many {what}?"),))
    with pytest.raises(ValueError, match=problem):
        read_turn(text, library)
    client = Rater(text)
    [found] = grade(client, library, [case_of(comparisons[0])], attempts=1)
    assert re.search(problem, found)
    assert len(client.asked) == 2


def test_a_frozen_library_rewards_alike_wherever_it_is_read(tmp_path, edits):
    Library((HEED,), (Tool("count", "How many {what}?", ("add",)),)).write(tmp_path / "library.json")
    values = []
    for _ in range(2):
        reward = EditHarness(str(tmp_path / "library.json"), model="m", url="http://localhost:1/v1")
        reward.__dict__["client"] = Careless()
        mixed = [picture(target if i % 3 else source) for i, (source, _, target, _) in enumerate(edits)]
        signal = reward(outcome(edits, mixed))
        assert signal.values.shape == (len(edits), 1)
        values.append(signal.values)
    assert torch.equal(*values)
    whole = [value for i, value in enumerate(values[0].flatten().tolist()) if i % 3]
    assert whole == [1.0] * len(whole)
    reward.grain = "criterion"
    criteria = reward(outcome(edits, mixed))
    assert criteria.unit is Unit.CRITERION
    assert torch.allclose(criteria.values.mean(1, keepdim=True), values[0])


def test_a_library_that_is_none_is_named(tmp_path):
    file = tmp_path / "library.json"
    file.write_text('{"skills": [{"name": "a"}], "tools": []}')
    for wrong in (file, tmp_path / "absent.json"):
        with pytest.raises(ValueError, match="expected a file of skills"):
            load("edit_harness", library=str(wrong))
    with pytest.raises(ValueError, match="names are lower-case words, each once"):
        Library((HEED, HEED))
    Library().write(file)
    with pytest.raises(ValueError, match="grain must be sample or criterion"):
        load("edit_harness", library=str(file), grain="token")
    with pytest.raises(ValueError, match="uses must be at least 0"):
        load("edit_harness", library=str(file), uses=-1)


def test_proposals_write_mend_and_delete():
    library = Library((HEED,))
    mended = changed(
        library, "skills", '[{"do": "write", "name": "rest", "text": "Look twice.", "words": ["Make"]}]', 3
    )
    assert mended == Library((Skill("rest", "Look twice.", ("make",)),))
    assert changed(library, "skills", '[{"do": "delete", "name": "rest"}]', 3) == Library()
    tool = changed(library, "tools", '[{"do": "write", "name": "see", "question": "Is {it} there?"}]', 3)
    assert tool.tools[0].arguments == ("it",)
    assert changed(library, "skills", '[{"do": "delete", "name": "rest"}]', 1) == Library()
    many = json.dumps([{"do": "write", "name": f"n{'abc'[i]}", "text": "x"} for i in range(3)])
    assert len(changed(library, "skills", many, 2).skills) == 3
    for wrong, problem in (
        ("none", "no list"),
        ("[{]", "no JSON"),
        ('[{"do": "ponder"}]', "neither writes nor deletes"),
        ('[{"do": "delete", "name": "A b"}]', "lower-case words"),
        ('[{"do": "write", "name": "a", "text": ""}]', "without text"),
    ):
        with pytest.raises(ValueError, match=problem):
            changed(library, "skills", wrong, 3)


def test_comparisons_that_are_none_are_named(tmp_path, comparisons):
    file = tmp_path / "c.jsonl"
    with pytest.raises(ValueError, match="no such file of comparisons"):
        read_comparisons(file)
    good = {"prompt": "remove it", "source": comparisons[0].source, "candidates": [comparisons[0].source] * 2}
    for row, problem in (
        (good, 'line 1: expected "prompt"'),
        (good | {"scores": [1, 1]}, "two of them must differ"),
        (good | {"scores": [1, 2, 3]}, "each candidate needs a score"),
        (good | {"scores": [1, 2], "source": "absent.png"}, "absent.png"),
    ):
        file.write_text(json.dumps(row))
        with pytest.raises(ValueError, match=problem):
            read_comparisons(file)
    with pytest.raises(ValueError, match="too few"):
        Evolver(Careless(), Proposer("[]"), comparisons[:1])
    with pytest.raises(ValueError, match="learned must lie between 0 and 1"):
        Evolution(learned=1.0)
