"""A judge of captions that runs a model of transformers here: tiny LLaVA and Qwen3-VL with random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from PIL import Image

from mmalign.claims import Comparison, Difference, Fault, to_json
from mmalign.judging import evaluate
from mmalign.records import Outcome
from mmalign.rewardmodels.caption_judges import Case, Recorded, cases, make_judge
from mmalign.rewardmodels.endpoint import Answer, Question, said, shown
from mmalign.rewardmodels.local_chat import LocalChat
from mmalign.rewardmodels.vlm_judge import RATING, RULES, LocalJudge
from mmalign.testing import prompts_of

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from captioners import tiny_captioner, tiny_llava

FOUND = Comparison(
    (Difference("color", "a red dog", "a blue dog", "B", Fault("color_hallucination", "", 3)),), "B"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    return str(tiny_llava(tmp_path_factory.mktemp("llava")))


def picture(seed: int) -> Image.Image:
    random = torch.Generator().manual_seed(seed)
    pixels = (torch.rand(28, 28, 3, generator=random) * 255).byte()
    return Image.fromarray(pixels.numpy())


def question(seed: int, text: str, **more) -> Question:
    return Question([{"role": "user", "content": [said(text), shown(picture(seed))]}], **more)


def alone(folder: str, seed: int, text: str, longest: int) -> str:
    """What `generate` of the library writes when it is asked this alone."""
    processor = T.AutoProcessor.from_pretrained(folder)
    model = T.AutoModelForImageTextToText.from_pretrained(folder)
    content = [{"type": "text", "text": text}, {"type": "image", "image": picture(seed)}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_are_those_of_the_library_in_any_batch(llava):
    chat = LocalChat(llava, longest=6, batch=2)
    asked = ["a red dog", "describe the picture in a few words", "two cats"]
    found = chat.ask([question(i, text) for i, text in enumerate(asked)])
    assert [answer.text for answer in found] == [alone(llava, i, text, 6) for i, text in enumerate(asked)]
    assert all(answer.calls == 1 and answer.tokens > 17 for answer in found)


def test_answers_at_a_temperature_come_again_and_touch_no_other_stream(llava):
    chat = LocalChat(llava, longest=6)
    hot = [question(0, "a red dog", temperature=1.0, attempt=attempt) for attempt in range(4)]
    before = torch.get_rng_state()
    first = [answer.text for answer in chat.ask(hot)]
    assert torch.equal(before, torch.get_rng_state())
    assert [answer.text for answer in chat.ask(hot[::-1])] == first[::-1]
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("settings", "said_"),
    [
        ({"model": "no/such/folder"}, "judge: model no/such/folder does not load"),
        ({"precision": "fp8"}, "judge: precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"batch": 0}, "judge: batch must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(llava, settings, said_):
    with pytest.raises(ValueError, match=said_):
        LocalChat(**{"model": llava, **settings})


def test_a_model_that_was_not_made_to_be_asked_is_refused(tmp_path):
    tiny_captioner("PaliGemma", tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        LocalChat(str(tmp_path))


class Scripted:
    """Answers by a function of the texts and the number of pictures of a question."""

    def __init__(self, answer) -> None:
        self.answer, self.asked = answer, []

    def ask(self, questions):
        found = []
        for one in questions:
            parts = one.messages[0]["content"]
            texts = [part["text"] for part in parts if part["type"] == "text"]
            self.asked.append((texts, sum(part["type"] == "image_url" for part in parts), one.temperature))
            found.append(Answer(self.answer(len(self.asked), texts), "", 1, 10))
        return found


@pytest.fixture
def judge(llava):
    def make(answer, **settings) -> LocalJudge:
        made = make_judge("local", {"model": llava, "chat": {"longest": 4}, **settings})
        made.client = Scripted(answer)
        return made

    return make


@pytest.fixture
def file(tmp_path) -> str:
    picture(0).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_it_asks_what_the_endpoint_judge_asks(judge, file):
    local = judge(lambda number, texts: to_json(FOUND), swap=True)
    (judged,) = local.compare([Case("a red dog", "a blue dog", file)])
    assert [look.winner for look in judged.looks] == ["B", "A"]
    assert (judged.calls, judged.tokens) == (2, 20)
    (first, *_), (second, *_) = local.client.asked
    assert first == [RULES, "B: a blue dog", "A: a red dog"]
    assert second == [RULES, "A: a blue dog", "B: a red dog"]


def test_nonsense_is_asked_again_warmer_and_then_missing(judge, file):
    local = judge(lambda number, texts: "nonsense", attempts=2)
    (judged,) = local.compare([Case("a red dog", "a blue dog", file)])
    assert judged.looks == ()
    assert judged.problem
    assert [heat > 0 for *_, heat in local.client.asked] == [False, True, True]
    assert judge(lambda number, texts: "8").rate([Case("a red dog", "", file)]) == [8.0]


def test_real_weights_answer_and_what_they_say_is_no_verdict(llava, file):
    """A random model writes no JSON: counted as missing, never as a value."""
    local = make_judge("local", {"model": llava, "attempts": 0, "chat": {"longest": 4}})
    (judged,) = local.compare([Case("a red dog", "a blue dog", file)])
    assert judged.looks == ()
    assert judged.calls == 1


def test_frames_of_a_video_are_shown_evenly(judge, tmp_path):
    frames = tmp_path / "clip"
    frames.mkdir()
    for number in range(12):
        picture(number).save(frames / f"{number}.png")
    local = judge(lambda number, texts: to_json(FOUND), frames=4)
    told = {"reference": "a blue dog", "video": str(frames)}
    outcome = Outcome(prompts_of(["what happens"], 1, [told]), ["a red dog"])
    (case,) = cases("claimdiff", outcome, local.needs)
    assert case.video == str(frames)
    assert case.image is None
    assert case.key != Case("a red dog", "a blue dog").key
    (judged,) = local.compare([case])
    assert judged.looks
    ((texts, pictures, _),) = local.client.asked
    assert pictures == 4
    assert texts[0] == RULES
    assert local.rate([case]) != []
    assert local.client.asked[-1][0][0] == RATING
    one = Case("a", "b", video=str(tmp_path / "film.mp4"))
    assert "is no folder of frames" in local.compare([one])[0].problem


def test_its_answers_are_recorded_and_it_is_measured_like_any_judge(judge, file, tmp_path):
    local = judge(lambda number, texts: to_json(FOUND))
    record = Recorded(local, tmp_path / "said.jsonl")
    label = (Case("a red dog", "a blue dog", file), FOUND)
    found = evaluate(record, [label], swap=False)
    assert found.kinds["color/false"].recall == 1
    assert len(local.client.asked) == 1
    assert json.loads((tmp_path / "said.jsonl").read_text())["looks"]
    evaluate(Recorded(local, tmp_path / "said.jsonl", replay=True), [label], swap=False)
    assert len(local.client.asked) == 1


def test_a_model_with_flat_patches_judges_too(tmp_path):
    folder = str(tiny_captioner("Qwen3VL", tmp_path / "qwen"))
    chat = LocalChat(folder, longest=3)
    found = chat.ask([question(0, "a red dog"), question(1, "two cats are here")])
    assert [answer.text for answer in found] == [
        alone(folder, 0, "a red dog", 3),
        alone(folder, 1, "two cats are here", 3),
    ]
