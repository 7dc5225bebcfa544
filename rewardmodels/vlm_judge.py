"""A vision-language model as the judge of captions, on this machine or behind an OpenAI-compatible endpoint.

It is told the rules of ClaimDiff-RL (arXiv:2605.20278) in words of our own, sees the picture and the
reference first and the caption last (what a group shares is then one prefix for the server), and answers by a
JSON schema. What cannot be read is asked again, with a temperature. Of a video it sees frames, evenly over
its length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmalign.claims import SCHEMA, ClaimError, Comparison, parse
from mmalign.pictures import frames_of, open_picture
from mmalign.rewardmodels.asking import Client, answers
from mmalign.rewardmodels.caption_judges import Case, Judged
from mmalign.rewardmodels.endpoint import Endpoint, Question, said, shown
from mmalign.rewardmodels.local_chat import LocalChat

RULES = """You compare two descriptions of the picture, A and B. List every concrete visual difference between
them, one difference an entry, and hold each side against the picture alone. B may be incomplete or wrong as
well. A true detail that only one side has is no error of that side; that the other side leaves it out is an
error of the other side, of a type that ends in _omission. A vague or either-or statement is an error where
the picture settles the matter. Saying the same again is a repetition_error. Judgment is the side that is
right, or both_wrong, or both_supported. An error has a type made of what it is about and what is wrong with
it, such as color_hallucination, count_mismatch, object_omission, spatial_relation_error, or NONE; a few words
of detail; and a severity: 3 for the main subject, an action or an identity, 2 for what is important, 1 for
what is peripheral or a matter of style, null with NONE. At the end name the better description, A, B or Tie.
Answer with JSON of the form {"differences": [{"aspect", "claim_a", "claim_b", "judgment", "error_a": {"type",
"detail", "severity"}, "error_b": {"type", "detail", "severity"}}], "overall_winner"}. Quote claims word for
word; leave a claim empty where a side says nothing."""
RATING = """Rate the description of the picture from 0 to 10 for being right, covering what is there, and
naming attributes, counts, relations and text rightly. What is invented weighs more than what is left out;
length earns nothing. Answer with the number alone."""
_NUMBER = re.compile(r"(?<![\d.])(10(?:\.0+)?|\d(?:\.\d+)?)(?![\d.]*\d)")


@dataclass
class ModelJudge:
    """Asks a model to compare captions, or to rate them.

    swap: ask a second time with the captions exchanged; a preference for a place then cancels out. looks: how
    often each is asked with a temperature of 0.7, 1 is once at 0 (self-consistency). attempts: further tries
    where an answer cannot be read. frames: of a video that are shown, at most.
    """

    model: str
    swap: bool = False
    looks: int = 1
    attempts: int = 3
    side: int = 1024  # pixels of a picture, at most
    frames: int = 8
    seed: int = 0  # of the temperatures of further tries
    needs = ("reference", "image")

    def __post_init__(self) -> None:
        if self.looks < 1 or self.attempts < 0:
            raise ValueError(
                f"looks must be at least 1 and attempts not negative, got {self.looks}, {self.attempts}"
            )
        if self.side < 1 or self.frames < 1:
            raise ValueError(f"side and frames must be at least 1, got {self.side}, {self.frames}")
        self.client = self.open()

    def open(self) -> Client:
        """Whom it asks."""
        raise NotImplementedError

    def held_to(self) -> Mapping[str, Any] | None:
        """The JSON schema that answers must follow, where the client can be held to one."""
        return None

    def compare(self, cases: Sequence[Case]) -> list[Judged]:
        asked: list[tuple[int, bool, Question]] = []
        problems: dict[int, str] = {}
        for number, case in enumerate(cases):
            try:
                pictures = self._pictures(case)
            except ValueError as error:
                problems[number] = str(error)
                continue
            for look in range(self.looks):
                for swapped in (False, True)[: 1 + self.swap]:
                    a, b = (case.reference, case.caption) if swapped else (case.caption, case.reference)
                    parts = [said(RULES), *pictures]
                    parts += (
                        [said(f"A: {a}"), said(f"B: {b}")] if swapped else [said(f"B: {b}"), said(f"A: {a}")]
                    )
                    heat = 0.7 if self.looks > 1 else 0.0
                    question = Question(
                        [{"role": "user", "content": parts}], heat, look * 1000, self.held_to()
                    )
                    asked.append((number, swapped, question))
        found = answers(self.client, [question for *_, question in asked], parse, self.attempts, self.seed)
        judged = []
        for number in range(len(cases)):
            rows = [(flip, *found[i]) for i, (n, flip, _) in enumerate(asked) if n == number]
            read = [(flip, look) for flip, look, *_ in rows if isinstance(look, Comparison)]
            looks = tuple(look.swapped if flip else look for flip, look in read)
            problem = problems.get(number) or next((why for _, why, *_ in rows if isinstance(why, str)), "")
            calls, tokens = sum(row[2] for row in rows), sum(row[3] for row in rows)
            judged.append(Judged(looks, "" if looks else problem, calls, tokens))
        return judged

    def rate(self, cases: Sequence[Case]) -> list[float | str]:
        questions: list[Question] = []
        places: list[int] = []
        rated: dict[int, float | str] = {}
        for number, case in enumerate(cases):
            try:
                pictures = self._pictures(case)
            except ValueError as error:
                rated[number] = str(error)
                continue
            parts = [said(RATING), *pictures, said(f"Description: {case.caption}")]
            questions.append(Question([{"role": "user", "content": parts}]))
            places.append(number)
        replies = answers(self.client, questions, rating, self.attempts, self.seed)
        for number, (found, *_) in zip(places, replies, strict=True):
            rated[number] = found
        return [rated[number] for number in range(len(cases))]

    def _pictures(self, case: Case) -> list[dict[str, Any]]:
        """What a case shows, as parts of a message; ValueError where it cannot be read."""
        if case.video is None:
            return [shown(open_picture(str(case.image)), self.side)]
        files = frames_of(case.video)
        if not files:
            raise ValueError(
                f"the video {case.video} is no folder of frames; judges see frames, so write it as pictures"
            )
        count = min(self.frames, len(files))
        places = [round(i * (len(files) - 1) / max(1, count - 1)) for i in range(count)]
        return [shown(open_picture(files[place]), self.side) for place in places]


@dataclass
class EndpointJudge(ModelJudge):
    """Of a model behind an address.

    structured: hold the server to the schema. endpoint: further settings of `Endpoint`.
    """

    url: str = ""  # up to and with the version, http://localhost:8000/v1
    structured: bool = False
    endpoint: dict[str, object] = field(default_factory=dict)
    name = "endpoint"

    def open(self) -> Client:
        client: Client = Endpoint(self.url, self.model, **self.endpoint)  # type: ignore[arg-type]
        return client

    def held_to(self) -> Mapping[str, Any] | None:
        return SCHEMA if self.structured else None


@dataclass
class LocalJudge(ModelJudge):
    """Of a model of transformers on this machine, local folder or hub id.

    chat: further settings of `LocalChat`: precision, longest, batch, device.
    """

    chat: dict[str, object] = field(default_factory=dict)
    name = "local"

    def open(self) -> Client:
        client: Client = LocalChat(self.model, **self.chat)  # type: ignore[arg-type]
        return client


def rating(answer: str) -> float:
    """The number from 0 to 10 in an answer, the last if it thinks aloud; ClaimError where there is none."""
    found = _NUMBER.findall(answer)
    if not found:
        raise ClaimError(f"the answer holds no number from 0 to 10: {answer[:80]!r}")
    return float(found[-1])
