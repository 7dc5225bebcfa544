"""The library of a judge of edits evolves on a few labelled comparisons: RewardHarness (arXiv:2605.08703).

Comparisons are split once. A round, on those to learn from:

    failures   candidates that the judge puts in the wrong order
    analysis   what a writer finds in the traces of wrong and of right verdicts
    proposal   entries of the library to write anew, to mend or to delete

first for skills, then for tools. A proposal is kept where the accuracy on the pairs that were set aside
rises; these are never shown to the writer. Now and then every entry is left out once, and those without
which the accuracy is no lower are removed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from mmalign.pictures import missing, open_picture
from mmalign.rewardmodels.asking import Client, answers
from mmalign.rewardmodels.edit_harness import NAME, EditCase, Grade, Library, Skill, Tool, grade
from mmalign.rewardmodels.endpoint import Question, said, shown

ANALYZE = """A judge grades edits of pictures from 1 to 4 for following the instruction and from 1 to 4 for
quality. Below are edits that it put in the wrong order, and some that it put in the right one. For each,
the pictures are the source and then the candidates in their order. Say in a few sentences what the judge
overlooks or misjudges.
{traces}"""
PROPOSE = """A judge grades edits of pictures. It has a library of {kind}: {library}
Its verdicts were analyzed: {analysis}
Propose changes to the {kind} that would mend this, general enough to help with other pictures and
instructions. {shape} Answer with a JSON list alone, of at most {most} objects
{{"do": "write", {fields}}} or {{"do": "delete", "name": NAME}}; an entry that is written takes the place of
one of its name. "words" are words of the instructions that it is for, an empty list for all."""
SHAPES = {
    "skills": ("A skill is a rubric of one or two sentences.", '"name": NAME, "text": TEXT, "words": [WORD]'),
    "tools": (
        "A tool is a question about both pictures that is answered by looking, with {argument}s in braces.",
        '"name": NAME, "question": TEXT, "words": [WORD]',
    ),
}
LIST = re.compile(r"\[.*\]", re.DOTALL)


@dataclass(frozen=True)
class Comparison:
    """Edits of one picture by one instruction, with what people think of them.

    source, candidates: files. scores: higher is better; those of equal score are not compared.
    """

    instruction: str
    source: str
    candidates: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of candidates, the better first."""
        found = combinations(range(len(self.scores)), 2)
        ordered = [(i, j) if self.scores[i] > self.scores[j] else (j, i) for i, j in found]
        return [(i, j) for i, j in ordered if self.scores[i] != self.scores[j]]


def read_comparisons(file: Path | str) -> list[Comparison]:
    """One object a line: "prompt", "source", "candidates" (paths from the file) and "scores"."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of comparisons")
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(text)
            files = [str(path.parent / str(name)) for name in (row["source"], *row["candidates"])]
            scores = tuple(map(float, row["scores"]))
            one = Comparison(str(row["prompt"]), files[0], tuple(files[1:]), scores)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'{path}, line {number}: expected "prompt", "source", "candidates" and "scores" ({error})'
            ) from error
        if reasons := list(filter(None, map(missing, files))):
            raise ValueError(f"{path}, line {number}: {reasons[0]}")
        if len(one.scores) != len(one.candidates) or not one.pairs:
            raise ValueError(
                f"{path}, line {number}: each candidate needs a score, and two of them must differ"
            )
        found.append(one)
    return found


@dataclass(frozen=True)
class Accuracy:
    """pairs: share of pairs in the right order. groups: share of comparisons with all pairs right."""

    pairs: float
    groups: float


@dataclass(frozen=True)
class Graded:
    """A comparison with the grades that its candidates got."""

    comparison: Comparison
    grades: tuple[Grade | str, ...]

    @property
    def right(self) -> list[bool]:
        """For each pair whether the better one has the higher score; a tie or a missing grade is wrong."""
        scores = [one.score if isinstance(one, Grade) else None for one in self.grades]
        return [_above(scores[better], scores[worse]) for better, worse in self.comparison.pairs]


def _above(better: float | None, worse: float | None) -> bool:
    return better is not None and worse is not None and better > worse


def accuracy(graded: Sequence[Graded]) -> Accuracy:
    """Random orders give 1/2 of the pairs; of groups of 2, 3, 4 candidates 1/2, 1/6, 1/24."""
    pairs = [right for one in graded for right in one.right]
    return Accuracy(sum(pairs) / len(pairs), sum(all(one.right) for one in graded) / len(graded))


@dataclass(frozen=True)
class Evolution:
    """How long and how carefully the library evolves; by default as the paper, but for `tolerance`."""

    rounds: int = 5
    learned: float = 0.6  # share of the comparisons that it learns from
    # None: a proposal is kept where the accuracy set aside rises; a number, .075 in the paper: where it falls
    # by no more
    tolerance: float | None = None
    failures: int = 6  # of a round that the writer sees
    successes: int = 2
    proposals: int = 3  # changes of one proposal, at most
    prune_every: int = 50  # rounds between prunings; there is one at the end as well
    uses: int = 3  # of tools for one edit
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 < self.learned < 1:
            raise ValueError(f"evolution: learned must lie between 0 and 1, got {self.learned}")
        for name in ("rounds", "failures", "proposals", "prune_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"evolution: {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Step:
    """What became of one proposal or pruning."""

    round: int
    what: str  # skills, tools or prune
    accepted: bool
    before: float  # accuracy on the pairs set aside
    after: float


@dataclass
class Evolved:
    """The library with the best accuracy on the pairs set aside, and how it came about."""

    library: Library
    first: Accuracy
    last: Accuracy
    steps: list[Step] = field(default_factory=list)


@dataclass
class Evolver:
    """Judge, writer and comparisons, with the pictures read once."""

    judge: Client
    writer: Client
    comparisons: Sequence[Comparison]
    how: Evolution = field(default_factory=Evolution)
    side: int = 512

    def __post_init__(self) -> None:
        order = list(range(len(self.comparisons)))
        random.Random(self.how.seed).shuffle(order)
        cut = round(self.how.learned * len(order))
        if not 0 < cut < len(order):
            raise ValueError(
                f"evolution: {len(order)} comparisons are too few to learn from some and set others aside"
            )
        self.learn = [self.comparisons[i] for i in order[:cut]]
        self.aside = [self.comparisons[i] for i in order[cut:]]
        self._pictures: dict[str, Any] = {}

    def run(self, start: Library, log: Callable[[Step], None] = lambda step: None) -> Evolved:
        library, best = start, start
        first = held = accuracy(self.graded(library, self.aside))
        top = first
        found = Evolved(start, first, first)

        def note(step: Step) -> None:
            found.steps.append(step)
            log(step)

        for number in range(1, self.how.rounds + 1):
            for kind in ("skills", "tools"):
                proposed = self.proposed(kind, library, self.graded(library, self.learn), number)
                if proposed == library:
                    continue
                tried = accuracy(self.graded(proposed, self.aside))
                kept = self.accepts(held.pairs, tried.pairs)
                note(Step(number, kind, kept, held.pairs, tried.pairs))
                if kept:
                    library, held = proposed, tried
                if held.pairs > top.pairs:
                    best, top = library, held
            if number % self.how.prune_every == 0:
                library, held = self.pruned(library, held, number, note)
        found.library, found.last = self.pruned(best, top, self.how.rounds, note)
        return found

    def accepts(self, before: float, after: float) -> bool:
        slack = self.how.tolerance
        return after > before if slack is None else after >= before - slack

    def pruned(
        self, library: Library, held: Accuracy, number: int, note: Callable[[Step], None]
    ) -> tuple[Library, Accuracy]:
        """Without the entries that do not help, tried one after the other."""
        for entry in library.entries:
            less = without(library, entry.name)
            tried = accuracy(self.graded(less, self.aside))
            kept = tried.pairs >= held.pairs
            note(Step(number, "prune", kept, held.pairs, tried.pairs))
            if kept:
                library, held = less, tried
        return library, held

    def graded(self, library: Library, comparisons: Sequence[Comparison]) -> list[Graded]:
        cases = [
            EditCase(one.instruction, self._picture(one.source), self._picture(candidate))
            for one in comparisons
            for candidate in one.candidates
        ]
        grades = iter(grade(self.judge, library, cases, self.how.uses, side=self.side))
        return [Graded(one, tuple(next(grades) for _ in one.candidates)) for one in comparisons]

    def proposed(self, kind: str, library: Library, graded: Sequence[Graded], number: int) -> Library:
        """The library after what the writer proposes for its skills or tools; the same where it is no use."""
        rng = random.Random(f"{self.how.seed} {number} {kind}")
        wrong = [one for one in graded if not all(one.right)]
        right = [one for one in graded if all(one.right)]
        if not wrong:
            return library
        chosen = rng.sample(wrong, min(self.how.failures, len(wrong)))
        chosen += rng.sample(right, min(self.how.successes, len(right)))
        content = [part for one in chosen for part in self._shown(one)]
        text = "\n".join(told(place, one) for place, one in enumerate(chosen, 1))
        [analysis] = self.writer.ask([_question([*content, said(ANALYZE.format(traces=text))], number)])
        if analysis.text is None:
            return library
        shape, fields = SHAPES[kind]
        request = PROPOSE.format(
            kind=kind,
            library=json.dumps(asdict(library)[kind]),
            analysis=analysis.text,
            shape=shape,
            fields=fields,
            most=self.how.proposals,
        )
        replies = answers(
            self.writer,
            [_question([said(request)], number)],
            lambda reply: changed(library, kind, reply, self.how.proposals),
        )
        value = replies[0][0]
        return value if isinstance(value, Library) else library

    def _picture(self, file: str) -> Any:
        if file not in self._pictures:
            self._pictures[file] = open_picture(file)
        return self._pictures[file]

    def _shown(self, one: Graded) -> list[dict[str, Any]]:
        files = (one.comparison.source, *one.comparison.candidates)
        return [shown(self._picture(file), self.side) for file in files]


def _question(content: Sequence[dict[str, Any]], number: int) -> Question:
    """With a temperature; the round makes it another question than in the round before."""
    return Question([{"role": "user", "content": list(content)}], 0.7, number * 1000)


def told(place: int, one: Graded) -> str:
    """A comparison in words, with what the judge said."""
    rows = [f"{place}. instruction: {one.comparison.instruction}"]
    for number, (found, score) in enumerate(zip(one.grades, one.comparison.scores, strict=True), 1):
        said_ = (
            found if isinstance(found, str) else f"{found.instruction:g} and {found.quality:g}: {found.trace}"
        )
        rows.append(f"candidate {number}, which people score {score:g}, was graded {said_}")
    return "\n".join(rows)


def changed(library: Library, kind: str, reply: str, most: int) -> Library:
    """The library after a proposal; ValueError where the reply is no proposal."""
    found = LIST.search(reply)
    if not found:
        raise ValueError(f"the proposal holds no list: {reply[:80]!r}")
    try:
        rows = json.loads(found[0])
    except json.JSONDecodeError as error:
        raise ValueError(f"the proposal holds no JSON: {error}") from None
    for row in rows[:most]:
        if not isinstance(row, dict) or row.get("do") not in ("write", "delete"):
            raise ValueError(f"the proposal neither writes nor deletes: {str(row)[:80]}")
        name = str(row.get("name", ""))
        if not NAME.fullmatch(name):
            raise ValueError(f"names are lower-case words, got {name!r}")
        library = without(library, name)
        if row["do"] == "write":
            words = row.get("words") or []
            text = row.get("text" if kind == "skills" else "question")
            if not isinstance(text, str) or not text.strip() or not isinstance(words, list):
                raise ValueError(f"the proposal writes an entry without text: {str(row)[:80]}")
            lower = tuple(str(word).lower() for word in words)
            if kind == "skills":
                library = replace(library, skills=(*library.skills, Skill(name, text, lower)))
            else:
                library = replace(library, tools=(*library.tools, Tool(name, text, lower)))
    return library


def without(library: Library, name: str) -> Library:
    """The library without the entry of that name, if it has one."""
    return Library(
        tuple(skill for skill in library.skills if skill.name != name),
        tuple(tool for tool in library.tools if tool.name != name),
    )
