"""The search for a question, with a scripted model and a scripted writer; the probabilities it goes by."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.rewardmodels.question_search import Search, accuracy, search
from mmalign.rewardmodels.vlm_score import variants, yes_of

# Pictures are one number; there is damage of three kinds, and a question finds those that it names.
KINDS = ("seams", "blobs", "halos")
COUNT = 90
TRUTH = torch.arange(COUNT) % 2 == 1
KIND = torch.where(TRUTH, torch.arange(COUNT) // 2 % 3 + 1, 0)
IMAGES = (KIND / 4).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2).float()


class ScriptedModel:
    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def yes(self, question: str, images: Tensor) -> Tensor:
        self.asked.append((question, len(images)))
        kind = (images[:, 0, 0, 0] * 4).round().long()
        known = torch.tensor([False, *(name in question for name in KINDS)])
        return torch.where(known[kind], 0.9, 0.1)


class ScriptedWriter:
    """Names, in a critique, the damage of the first picture it is shown; mends by what a critique names."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent
        self.requests: list[tuple[str, int]] = []

    def write(self, request: str, images: list[Tensor]) -> str:
        self.requests.append((request, len(images)))
        if self.silent:
            return ""
        question = request.split('"')[1]
        if images:
            return f"look for {KINDS[int(images[0][0, 0, 0] * 4) - 1]}"
        if "criticized" in request:
            return f"{question} {request.split('look for ')[1].split()[0]}"
        return question + "!"


def test_each_round_adds_a_kind_until_none_is_missed():
    best: list[float] = []
    found = search(
        ScriptedModel(),
        ScriptedWriter(),
        IMAGES,
        TRUTH,
        ["damage?"],
        Search(rounds=3),
        lambda number, beam: best.append(beam[0][0]),
    )
    assert all(kind in found.question for kind in KINDS)
    assert found.searched == found.held_out == 1
    assert found.first_held_out == pytest.approx(0.5, abs=0.15)
    assert best == sorted(best)
    assert best[0] < best[2]


def test_held_out_pictures_are_seen_at_the_end_alone():
    model = ScriptedModel()
    search(model, ScriptedWriter(), IMAGES, TRUTH, ["damage?"], Search(rounds=2, minibatch=20))
    sizes = [size for _, size in model.asked]
    assert sizes[-2:] == [30, 30]
    assert 30 not in sizes[:-2]
    assert set(sizes[:-2]) == {20, 60}


def test_a_critique_is_about_so_many_errors_and_says_which_answers_were_right():
    writer = ScriptedWriter()
    search(ScriptedModel(), writer, IMAGES, TRUTH, ["damage?"], Search(rounds=1, gradients=2, errors=3))
    critiques = [request for request, count in writer.requests if count]
    assert len(critiques) == 2
    assert all(request.count("said no, right is yes") == 3 for request in critiques)


def test_a_beam_is_no_wider_than_asked_for():
    widths: list[int] = []
    search(
        ScriptedModel(),
        ScriptedWriter(),
        IMAGES,
        TRUTH,
        ["damage?"],
        Search(rounds=2, beam=2),
        lambda number, beam: widths.append(len(beam)),
    )
    assert widths == [2, 2]


def test_a_writer_without_an_answer_leaves_the_first_question():
    found = search(ScriptedModel(), ScriptedWriter(silent=True), IMAGES, TRUTH, ["damage?"], Search(rounds=1))
    assert found.question == "damage?"
    assert found.held_out == found.first_held_out


def test_no_answer_is_a_wrong_one():
    probability = torch.tensor([0.9, math.nan, math.nan, 0.2])
    assert accuracy(probability, torch.tensor([True, True, False, False])) == 0.5


def test_yes_is_summed_over_its_spellings_and_held_against_no():
    logits = torch.tensor([[0.4, 0.2, 0.1, 0.1, 0.2]]).log()
    assert_close(yes_of(logits, [0, 1], [2, 3]), torch.tensor([0.75]))
    assert_close(yes_of(logits + 3, [0], [4]), torch.tensor([0.4 / 0.6]))


def test_spellings_are_those_with_and_without_a_capital_and_a_space():
    class Tokenizer:
        unk_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            known = {"yes": 1, "Yes": 2, " yes": 3, " Yes": 4, "YES": 5, "no": 6}
            return {"input_ids": [known.get(text, 0)]}

    assert variants(Tokenizer(), ["yes"]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("setting", ["rounds", "beam", "minibatch", "gradients", "errors", "expansion"])
def test_a_search_of_nothing_is_refused(setting):
    with pytest.raises(ValueError, match=f"{setting} must be at least 1"):
        Search(**{setting: 0})
