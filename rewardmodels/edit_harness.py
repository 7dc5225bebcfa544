"""A judge of edits that is a frozen model with a library: RewardHarness (arXiv:2605.08703).

The library holds skills, rubrics in words, and tools, questions that the judge may ask about the pictures
before it answers. It is what learns, from a few labelled comparisons (`harness_evolution`); the model stays
as it is. An entry of the library is put before the judge where the instruction holds one of its words (the
paper lets a large model choose), so that a frozen library gives the same rewards everywhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.pictures import open_picture
from mmalign.records import Outcome, RewardSignal, Unit
from mmalign.rewardmodels.asking import Client, answers, open_client
from mmalign.rewardmodels.endpoint import Question, said, shown
from mmalign.rewardmodels.inputs import extras, pictures, texts
from mmalign.rewardmodels.vlm_score import picture_of

GRADES = (1, 4)  # the scale of both grades
RULES = """You grade the edit of a picture. The first picture is the source, the second is the edited one. The
instruction was: {instruction}
Grade from 1 (fails) to 4 (flawless) how well the edit follows the instruction, and from 1 to 4 its quality:
that it looks right, and that everything the instruction does not speak of was left as it was. Think first,
between <think> and </think>.{tools}{skills}
End with <answer>{{"instruction": N, "quality": N}}</answer>."""
TOOLS = """
Before you answer you may use these tools, one at a time, and are told what each finds:
{listed}
Use one by <tool>{{"name": NAME, "arguments": {{ARGUMENT: VALUE}}}}</tool>."""
SKILLS = "\nWhat to heed:\n{listed}"
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
CALL = re.compile(r"<tool>(.*?)</tool>", re.DOTALL)
NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Skill:
    """A rubric. words: of instructions that it is for; none: it is for all."""

    name: str
    text: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A question about both pictures, with {argument}s that the judge fills in."""

    name: str
    question: str
    words: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", self.question)))

    def filled(self, given: Mapping[str, object]) -> str:
        """The question; ValueError where the arguments are not those that it has."""
        if set(given) != set(self.arguments):
            takes = ", ".join(self.arguments) or "no arguments"
            raise ValueError(f"the tool {self.name} takes {takes}, got {sorted(given)}")
        return re.sub(r"\{(\w+)\}", lambda found: str(given[found[1]]), self.question)


@dataclass(frozen=True)
class Library:
    """What the judge knows."""

    skills: tuple[Skill, ...] = ()
    tools: tuple[Tool, ...] = ()

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if len(set(names)) < len(names) or not all(map(NAME.fullmatch, names)):
            raise ValueError(f"library: names are lower-case words, each once, got {names}")

    @property
    def entries(self) -> tuple[Skill | Tool, ...]:
        return (*self.skills, *self.tools)

    def routed(self, instruction: str) -> Library:
        """The entries that are for this instruction."""
        said_ = set(re.findall(r"\w+", instruction.lower()))

        def fits(entry: Skill | Tool) -> bool:
            return not entry.words or bool(said_ & set(entry.words))

        return Library(tuple(filter(fits, self.skills)), tuple(filter(fits, self.tools)))

    def write(self, file: Path | str) -> None:
        """As a whole or not at all."""
        partial = Path(f"{file}.partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(file)

    @classmethod
    def read(cls, file: Path | str) -> Library:
        """ValueError names what is wrong with the file."""
        try:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
            return cls(
                tuple(Skill(s["name"], s["text"], tuple(s.get("words", ()))) for s in found["skills"]),
                tuple(Tool(t["name"], t["question"], tuple(t.get("words", ()))) for t in found["tools"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"library {file}: expected a file of skills (name, text, words) and tools (name, question, "
                f"words): {error}"
            ) from error


@dataclass(frozen=True)
class EditCase:
    """One edit to be graded. before, after: pictures of pillow."""

    instruction: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Grade:
    """Both grades, 1 to 4, and all that was said on the way."""

    instruction: float
    quality: float
    trace: str

    @property
    def score(self) -> float:
        """Their sum on [0, 1]; the paper does not state its mapping."""
        low, high = GRADES
        return (self.instruction + self.quality - 2 * low) / (2 * (high - low))


@dataclass(frozen=True)
class Turn:
    """What the judge said: either a tool to use, with arguments, or its grades."""

    text: str
    tool: str | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)
    grades: tuple[float, float] | None = None


def read_turn(text: str, library: Library) -> Turn:
    """ValueError where neither a known tool nor grades can be read; a tool goes before an answer."""
    if found := CALL.search(text):
        call = _json(found[1], "tool")
        tool = next((tool for tool in library.tools if tool.name == call.get("name")), None)
        given = call.get("arguments", {})
        if tool is None or not isinstance(given, Mapping):
            raise ValueError(f"there is no such tool: {found[1][:80]!r}")
        tool.filled(given)
        return Turn(text[: found.end()], tool.name, given)
    found = ANSWER.search(text)
    if not found:
        raise ValueError(f"the answer holds no <answer>: {text[-80:]!r}")
    row = _json(found[1], "answer")
    grades = [row.get(key) for key in ("instruction", "quality")]
    for grade in grades:
        if isinstance(grade, bool) or not isinstance(grade, int | float):
            raise ValueError(f"the answer has no two grades: {found[1][:80]!r}")
        if not GRADES[0] <= grade <= GRADES[1]:
            raise ValueError(f"grades lie in {GRADES[0]}..{GRADES[1]}, got {grade}")
    return Turn(text, grades=(float(grades[0]), float(grades[1])))  # type: ignore[arg-type]


def _json(text: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"<{what}> holds no JSON: {text[:80]!r} ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"<{what}> holds no object: {text[:80]!r}")
    return found


def grade(
    client: Client,
    library: Library,
    cases: Sequence[EditCase],
    uses: int = 3,
    attempts: int = 2,
    side: int = 1024,
) -> list[Grade | str]:
    """A grade for each case, or why there is none; all conversations go on side by side.

    uses: of tools in one conversation, after which the judge has to answer. attempts: further tries where
    something cannot be read. side: pixels of a picture, at most.
    """
    talks = [_opening(case, library.routed(case.instruction), side) for case in cases]
    found: list[Grade | str] = ["the judge uses tools without an end"] * len(cases)
    open_ = list(range(len(cases)))
    for _ in range(uses + 1):
        asked = [Question([{"role": "user", "content": talks[i]}]) for i in open_]
        turns = _turns(client, asked, library, attempts)
        calls: list[tuple[int, Turn]] = []
        for i, turn in zip(open_, turns, strict=True):
            if isinstance(turn, str):
                found[i] = turn
            elif turn.grades is not None:
                found[i] = Grade(*turn.grades, _said(talks[i]) + turn.text)
            else:
                calls.append((i, turn))
        if not calls:
            break
        tools = {tool.name: tool for tool in library.tools}
        questions = [
            Question(
                [{"role": "user", "content": [*talks[i][:2], said(tools[str(t.tool)].filled(t.arguments))]}]
            )
            for i, t in calls
        ]
        observed = client.ask(questions)
        open_ = []
        for (i, turn), answer in zip(calls, observed, strict=True):
            if answer.text is None:
                found[i] = answer.problem
                continue
            talks[i] = [*talks[i], said(f"{turn.text}\n<obs>{answer.text.strip()}</obs>\nGo on.")]
            open_.append(i)
    return found


def _turns(client: Client, asked: Sequence[Question], library: Library, attempts: int) -> list[Turn | str]:
    replies = answers(client, asked, lambda text: read_turn(text, library), attempts)
    return [value for value, *_ in replies]


def _opening(case: EditCase, library: Library, side: int) -> list[dict[str, Any]]:
    """The first message: both pictures, the rules, and what the library has for the instruction."""
    tools = "\n".join(
        f"- {tool.name}({', '.join(tool.arguments)}): asks {tool.question!r}" for tool in library.tools
    )
    skills = "\n".join(f"- {skill.text}" for skill in library.skills)
    rules = RULES.format(
        instruction=case.instruction,
        tools=TOOLS.format(listed=tools) if tools else "",
        skills=SKILLS.format(listed=skills) if skills else "",
    )
    return [shown(case.before, side), shown(case.after, side), said(rules)]


def _said(talk: Sequence[Mapping[str, Any]]) -> str:
    """What was said after the opening."""
    return "".join(part["text"] + "\n" for part in talk[3:])


@dataclass(eq=False)
class EditHarness:
    """Grades edits by a frozen model with a library, from 0 to 1; two criteria, or their mean."""

    library: str  # file that scripts/evolve_judge.py wrote
    judge: Literal["endpoint", "local"] = "endpoint"  # a model behind an address, or of transformers here
    model: str = ""  # its name at the endpoint; local folder or hub id
    url: str = ""  # of the endpoint, up to and with the version
    grain: Literal["sample", "criterion"] = "sample"  # criterion: two units, instruction and quality
    uses: int = 3  # of tools for one edit, at most
    attempts: int = 2  # further tries where an answer cannot be read
    side: int = 1024  # pixels of a picture that the judge is shown, at most
    settings: dict[str, Any] = field(default_factory=dict)  # further ones of the endpoint or the local model
    name = "edit_harness"

    def __post_init__(self) -> None:
        if self.grain not in ("sample", "criterion"):
            raise ValueError(f"edit_harness: grain must be sample or criterion, got {self.grain!r}")
        for setting, least in (("uses", 0), ("attempts", 0), ("side", 1)):
            if getattr(self, setting) < least:
                raise ValueError(
                    f"edit_harness: {setting} must be at least {least}, got {getattr(self, setting)}"
                )
        self._library = Library.read(self.library)

    @cached_property
    def client(self) -> Client:
        return open_client(self.judge, self.model, self.url, self.settings)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        images = pictures(self.name, outcome, "cpu")
        cases = []
        for image, text, extra in zip(images, texts(outcome), extras(outcome), strict=True):
            source = extra.get("source")
            before = source[0] if isinstance(source, list) and source else source
            if not isinstance(before, str):
                raise ValueError(f"{self.name}: the prompt {text!r} names no source to compare with")
            cases.append(EditCase(text, open_picture(before), picture_of(image)))
        found = grade(self.client, self._library, cases, self.uses, self.attempts, self.side)
        rows = [self._units(one) for one in found]
        where = outcome.media.device if isinstance(outcome.media, Tensor) else "cpu"
        details: list[Mapping[str, object]] = [
            {"missing": one} if isinstance(one, str) else asdict(one) for one in found
        ]
        unit = Unit.SAMPLE if self.grain == "sample" else Unit.CRITERION
        return RewardSignal(self.name, torch.tensor(rows).to(where), unit, details=details)

    def _units(self, one: Grade | str) -> list[float]:
        if isinstance(one, str):
            return [math.nan] * (1 if self.grain == "sample" else 2)
        if self.grain == "sample":
            return [one.score]
        low, high = GRADES
        return [(value - low) / (high - low) for value in (one.instruction, one.quality)]
