"""Rewards by what can be read from a caption: CapRL, likelihoods of answers, and choices that are named."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mmalign.lab.captions import describe, draw_scene, write
from mmalign.lab.questions import single_choice
from mmalign.records import Outcome, Prompts, Spans, Unit
from mmalign.rewardmodels.caprl import CapRL
from mmalign.rewardmodels.choices import Choices, chosen, soft_share
from mmalign.rewardmodels.lab_reader import DOUBT, LabReader
from mmalign.rewardmodels.likelihood import MEASURES, Likelihood, sentences
from mmalign.rewardmodels.questions import Question, ask, inverted, negated
from mmalign.rewardmodels.readers import UNKNOWN, Asked, LanguageReader, Told

ROOT = Path(__file__).resolve().parents[2]
CAPTION = (
    "There are two things: a small red circle at the top left and a large blue star. "
    'The red circle is left of the blue star. The word "cat" is written in green at the top.'
)
QUESTIONS = [
    {"question": "What color is the star?", "choices": ["red", "blue", "green"], "answer": "blue"},
    {"question": "How large is the red circle?", "choices": ["small", "large", "medium"], "answer": "small"},
]


def outcome(captions: list[str], extra: dict[str, object], group: int = 0) -> Outcome:
    count = len(captions)
    prompts = Prompts(
        ["Describe the picture."] * count, torch.full((count,), group), torch.arange(count), [extra] * count
    )
    return Outcome(prompts, captions)


def caprl(answer=None, **settings) -> CapRL:
    """CapRL with a reader that answers by a function of what it is asked."""
    found = CapRL(**settings)
    if answer is not None:
        found._reader.choose = lambda asked: [answer(one) for one in asked]
    return found


# The lab's reader


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How many things are there?", "two"),
        ("Which word is written?", "cat"),
        ("What color is the star?", "blue"),
        ("What shape is the red thing?", "circle"),
        ("How large is the red circle?", "small"),
        ("Where is the red circle?", "at the top left"),
        ("Where is the red circle seen from the blue star?", "left of"),
        ("Where is the blue star seen from the red circle?", "right of"),
        ("Where is the blue star?", UNKNOWN),
        ("What color is the ring?", UNKNOWN),
        ("What is the meaning of it?", UNKNOWN),
    ],
)
def test_the_labs_reader_answers_what_the_caption_says(question, answer):
    choices = ("nowhere", answer, "else", *([] if answer == UNKNOWN else [UNKNOWN]))
    assert LabReader().choose([Asked(CAPTION, question, choices)]) == [1]


def test_from_complete_captions_of_any_scene_every_question_is_answered_rightly():
    rng = random.Random(0)
    asked, right = [], []
    for _ in range(150):
        scene = draw_scene(rng)
        for question in single_choice(scene, rng):
            asked.append(Asked(write(describe(scene)), question.question, (*question.choices, UNKNOWN)))
            right.append(question.choices.index(question.answers[0]))
    assert LabReader().choose(asked) == right
    silent = [Asked("", one.question, one.choices) for one in asked]
    assert LabReader().choose(silent) == [len(one.choices) - 1 for one in asked]


# CapRL


def test_a_caption_that_tells_all_scores_one_and_an_empty_one_nothing():
    found = CapRL()(outcome([CAPTION, "", "There is a red star."], {"questions": QUESTIONS}))
    assert found.values[:, 0].tolist() == [1.0, 0.0, 0.0]
    assert [detail["untold"] for detail in found.details] == [0.0, 1.0, 0.5]


def test_who_reads_the_content_does_not_mind_the_order_of_choices():
    scores = {
        CapRL(seed=seed)(outcome([CAPTION], {"questions": QUESTIONS})).values.item() for seed in range(10)
    }
    assert scores == {1.0}


def test_who_always_picks_the_first_choice_scores_by_chance():
    always = caprl(lambda one: 0, draws=1)
    values = [always(outcome([CAPTION] * 50, {"questions": QUESTIONS}, group)).values for group in range(40)]
    assert torch.cat(values).mean().item() == pytest.approx(1 / 4, abs=0.03)


def test_the_variance_over_draws_falls_as_one_over_their_number():
    half = {"questions": [QUESTIONS[0], {**QUESTIONS[1], "answer": "large"}]}
    spread = []
    for draws in (1, 4, 16):
        judge = CapRL(draws=draws)
        values = torch.cat([judge(outcome([CAPTION] * 50, half, g)).values for g in range(10)])
        spread.append(values.var().item())
    for draws, variance in zip((1, 4, 16), spread, strict=True):
        assert variance * draws == pytest.approx(0.25, rel=0.25)


def test_a_sample_is_asked_the_same_in_any_batch():
    seen = []
    judge = caprl(lambda one: seen.append(one) or 0, draws=3)
    whole = outcome([CAPTION] * 4, {"questions": QUESTIONS})
    judge(whole)
    together, seen[:] = list(seen), []
    for row in (2, 0, 1, 3):
        judge(Outcome(whole.prompts.take(torch.tensor([row])), [CAPTION]))
    assert {str(one) for one in seen} == {str(one) for one in together}
    assert seen[:3] == together[6:9]


def test_a_question_that_fails_is_left_out_and_not_the_caption():
    judge = caprl(lambda one: None if "star" in one.question else one.choices.index("small"))
    found = judge(outcome([CAPTION], {"questions": QUESTIONS}))
    assert found.values.item() == 1.0
    assert found.details[0]["unread"] == 0.5
    assert not caprl(lambda one: None)(outcome([CAPTION], {"questions": QUESTIONS})).valid.any()


def test_by_criterion_every_question_is_a_unit():
    found = CapRL(grain="criterion")(outcome([CAPTION, "There is a blue star."], {"questions": QUESTIONS}))
    assert found.unit is Unit.CRITERION
    assert found.values.tolist() == [[1.0, 1.0], [1.0, 0.0]]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match='brings no "questions"'):
        CapRL()(outcome([CAPTION], {}))
    with pytest.raises(ValueError, match="draws must be 0"):
        CapRL(draws=2, grain="criterion")
    with pytest.raises(ValueError, match=r"\['pink'\] are not among"):
        CapRL()(outcome([CAPTION], {"questions": [{**QUESTIONS[0], "answer": "pink"}]}))


# Likelihood


@pytest.mark.parametrize("length", [1, 5])
def test_the_measures_are_those_of_their_formulas(length):
    p = torch.rand(length, generator=torch.Generator().manual_seed(length)).double()
    wanted = {
        "log_prob": math.log(math.prod(p.tolist())),
        "mean_log_prob": math.log(math.prod(p.tolist())) / length,
        "prob": math.prod(p.tolist()),
        "geometric": math.prod(p.tolist()) ** (1 / length),
        "mean_prob": sum(p.tolist()) / length,
    }
    found = {name: measure(p.log()).item() for name, measure in MEASURES.items()}
    assert found == pytest.approx(wanted)
    assert found["prob"] <= found["geometric"] + 1e-12 <= found["mean_prob"] + 2e-12
    doubled = {name: measure(p.log().repeat(2)).item() for name, measure in MEASURES.items()}
    for name in ("mean_log_prob", "geometric", "mean_prob"):
        assert doubled[name] == pytest.approx(found[name])
    assert doubled["log_prob"] == pytest.approx(2 * found["log_prob"])


def test_captions_that_say_the_answer_make_it_likely():
    judge = Likelihood(measure="prob")
    extra = {"questions": QUESTIONS[:1]}
    found = judge(outcome([CAPTION, "", "There is a red star."], extra)).values[:, 0]
    assert_close(found, torch.tensor([1 - DOUBT, 1 / 3, DOUBT / 2]))
    relative = Likelihood(measure="prob", relative=True)(outcome([CAPTION, "There is a red star."], extra))
    assert_close(relative.values[:, 0], torch.tensor([1 - DOUBT - 1 / 3, 0.0]))


def test_sentences_are_paid_for_what_they_add():
    extra = {"questions": QUESTIONS}
    texts = [CAPTION, "There is a ring. It is nice. There is a blue star."]
    found = Likelihood(grain="sentence", measure="geometric")(outcome(texts, extra))
    whole = Likelihood(measure="geometric")(outcome([*texts, ""], extra)).values[:, 0]
    assert found.unit is Unit.CLAIM
    assert found.valid.sum(1).tolist() == [3, 3]
    assert_close(found.values.sum(1), whole[:2] - whole[2])
    assert found.values[1, :2].tolist() == [0.0, 0.0], "a sentence that tells nothing earns nothing"
    assert found.values[1, 2] > 0.1
    assert isinstance(found.where, Spans)
    start, end = found.where.start[0].tolist(), found.where.end[0].tolist()
    cut = [CAPTION[a:b] for a, b in zip(start, end, strict=True)]
    assert cut[1] == "The red circle is left of the blue star."
    assert " ".join(cut) == CAPTION


def test_what_sentences_are():
    text = "One. Two has 3.5 parts!\nThree"
    assert [text[a:b].strip() for a, b in sentences(text)] == ["One.", "Two has 3.5 parts!", "Three"]
    assert sentences("  ") == []


def test_a_reference_needs_a_language_model():
    with pytest.raises(ValueError, match="for a reference name a language model"):
        Likelihood(target="reference")(outcome([CAPTION], {"reference": "A star."}))
    with pytest.raises(ValueError, match="measure must be one of"):
        Likelihood(measure="p")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> str:
    """A tiny Llama with random weights and the letters of the lab's questions, on disk."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("reader")
    signs = [chr(i) for i in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(["?", *signs])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(signs) + 1,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_a_language_model_is_asked_as_by_one_plain_forward(language_model):
    reader = LanguageReader(language_model, batch=3, precision="fp32")
    asked = [Asked("A dog." * i, f"Number {i}?", ("one", "two", "three")) for i in range(5)]
    told = [Told(one.caption, one.question, "two" + "!" * i) for i, one in enumerate(asked)]
    model, tokenizer = reader._model, reader._tokenizer
    for i, one in enumerate(asked):
        ids = tokenizer(
            reader.prompt(one.caption, ask(one.question, one.choices) + "\nAnswer by one letter."),
            return_tensors="pt",
        )["input_ids"]
        letters = [tokenizer(letter)["input_ids"][0] for letter in "ABC"]
        assert reader.choose(asked)[i] == int(model(ids).logits[0, -1, letters].argmax())
        prompt = tokenizer(reader.prompt(one.caption, one.question))["input_ids"]
        answer = tokenizer(told[i].answer)["input_ids"]
        whole = tokenizer(reader.prompt(one.caption, one.question) + told[i].answer)["input_ids"]
        assert whole == prompt + answer
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        wanted = torch.stack([log_p[len(prompt) - 1 + k, token] for k, token in enumerate(answer)])
        assert_close(reader.likelihood(told)[i], wanted.detach(), rtol=1e-4, atol=1e-5)


def test_a_language_model_stays_as_it_is_and_judges_references(language_model):
    judge = Likelihood(reader=language_model, target="reference", precision="fp32")
    found = judge(outcome(["A red star.", "A dog."], {"reference": "A red star."}))
    assert found.valid.all()
    assert not found.values.requires_grad
    assert not any(p.requires_grad for p in judge._reader._model.parameters())
    assert not judge._reader._model.training
    assert CapRL(reader=language_model, precision="fp32")(
        outcome([CAPTION], {"questions": QUESTIONS})
    ).valid.all()


# Choices


def test_the_soft_share():
    assert soft_share({"A"}, {"A", "B"}) == 0.5
    assert soft_share({"A", "C"}, {"A", "B"}) == 0.0
    assert soft_share(set(), {"A", "B"}) == 0.0
    assert soft_share({"A", "B"}, {"A", "B"}) == 1.0


def test_the_soft_share_lies_in_0_1_and_rises_with_every_right_choice():
    right = set("ABCD")
    for seed in range(50):
        rng = random.Random(seed)
        named: set[str] = set()
        last = 0.0
        for choice in rng.sample(sorted(right), 4):
            named.add(choice)
            assert last < soft_share(named, right) <= 1
            last = soft_share(named, right)
        assert soft_share(named | {"X"}, right) == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("square, circle.", {"square", "circle"}),
        ("square and at the top left", {"square", "at the top left"}),
        ("<think>a star?</think> <answer>A, B</answer>", {"square", "circle"}),
        ("<answer>A. square; C</answer>", {"square", "at the top"}),
        ("square, star", {"square", "star"}),
        ("", set()),
    ],
)
def test_what_a_text_chooses(text, found):
    assert chosen(text, ("square", "circle", "at the top", "at the top left")) == found


def test_the_reward_of_choices():
    extra = {"choices": ["red", "blue", "green"], "answers": ["red", "blue"]}
    texts = ["red.", "red, blue.", "red, green.", "<think>x</think><answer>A</answer>"]
    found = Choices(format=1.0)(outcome(texts, extra))
    assert found.values[:, 0].tolist() == [0.5, 1.0, 0.0, 1.5]
    assert [detail["exact"] for detail in found.details] == [0.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="a question is"):
        Choices()(outcome(["red"], {}))


# Questions turned around


def test_questions_are_negated_and_back():
    assert negated("Which ball did the cube hit?") == "Which ball didn't the cube hit?"
    assert negated("Will it rain?") == "Won't it rain?"
    assert negated("What can be seen?") == "What can't be seen?"
    assert negated(negated("What can be seen?")) == "What can be seen?"
    assert negated("Name the color") is None


def test_inverted_the_wrong_choices_are_right():
    question = Question("Which ball is red?", ("one", "two", "three", "four"), ("two",))
    sizes = set()
    for seed in range(40):
        found = inverted(question, random.Random(seed))
        assert found.question == "Which ball isn't red?"
        assert set(found.answers) == set(found.choices) - {"two"}
        assert "two" in found.choices
        sizes.add(len(found.answers))
    assert sizes == {1, 2, 3}
    assert inverted(Question("Name it", ("a", "b"), ("a",)), random.Random(0)) is None
    assert inverted(Question("Which is it?", ("a", "b"), ("a", "b")), random.Random(0)) is None


@pytest.mark.slow
def test_a_file_of_questions_is_turned_around(tmp_path):
    source, out = tmp_path / "questions.jsonl", tmp_path / "inverted.jsonl"
    rows = [
        {"prompt": "Which ball is red?", "image": "1.png", "choices": ["one", "two"], "answer": "two"},
        {"prompt": "Name it", "image": "2.png", "choices": ["a", "b"], "answer": "a"},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = subprocess.run(
        [sys.executable, "scripts/invert_questions.py", source, out],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said.endswith("1 questions, 1 left out\n")
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row == {
        "prompt": "Which ball isn't red?\nA. one\nB. two",
        "image": "1.png",
        "choices": ["one", "two"],
        "question": "Which ball isn't red?",
        "answers": ["one"],
    }
    Question.read(row)


def test_questions_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="needs 2 to 26 distinct choices"):
        Question("Which?", ("a", "a"), ("a",))
    with pytest.raises(ValueError, match="must not be empty"):
        Question(" ", ("a", "b"), ("a",))
