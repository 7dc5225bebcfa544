"""CAPTURE: the objects, attributes and relations that a caption shares with its reference (arXiv:2405.19092).

    matched = pairs that are equal + pairs that are synonyms        each element in one pair at most
    P = (matched + sum over what is left of the caption of its best likeness) / elements of the caption
    R = likewise from the reference;    F = 2 P R / (P + R) of each kind
    CAPTURE = (0.5 F_objects + 0.5 F_attributes + 0.2 F_relations) / 1.2

Synonyms contain one another, or share a synset of WordNet. Attributes are compared as words, whatever they
are of. A kind that neither text has is left out of the mean, where the public code counts it as 0. Of several
references the mean counts.

Texts are parsed by FACTUAL (a T5, arXiv:2305.17497), as in the paper, or by the words of the lab.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.caption_judges import captions
from mmalign.rewardmodels.caption_overlap import references_of
from mmalign.rewardmodels.inputs import extras

WEIGHTS = {"objects": 0.5, "attributes": 0.5, "relations": 0.2}
TRIPLE = re.compile(r"\(([^()]*)\)")
SENTENCE = re.compile(r"(?<=[.!?])\s+")
BEAMS, LONGEST = 5, 128  # of the parser, as published
Synonyms = Callable[[str], frozenset[str]]
Embed = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class CaptionGraph:
    """What a text tells. Relations are (object, relation, object)."""

    objects: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    relations: frozenset[tuple[str, str, str]] = frozenset()

    def elements(self, kind: str) -> list[str]:
        """Of one kind, as words, sorted."""
        return sorted(" ".join(e) if isinstance(e, tuple) else e for e in getattr(self, kind))

    def joined(self, other: CaptionGraph) -> CaptionGraph:
        return CaptionGraph(*(getattr(self, kind) | getattr(other, kind) for kind in WEIGHTS))


def read_triples(text: str) -> CaptionGraph:
    """The graph in what FACTUAL writes: ( dog , is , brown ), ( dog , on , grass ).

    What follows "is" is an attribute, unless it is an object elsewhere. What is no triple is left out.
    """
    rows = [tuple(part.strip().lower() for part in found.split(",")) for found in TRIPLE.findall(text)]
    triples = [row for row in rows if len(row) == 3 and all(row)]
    objects = {end for a, link, b in triples if link != "is" for end in (a, b)}
    objects |= {a for a, link, _ in triples if link == "is"}
    attributes = {b for _, link, b in triples if link == "is" and b not in objects}
    relations = {(a, link, b) for a, link, b in triples if link != "is"}
    return CaptionGraph(frozenset(objects), frozenset(attributes), frozenset(relations))


def kind_score(
    ours: Sequence[str], theirs: Sequence[str], same: Synonyms, embed: Embed | None
) -> float | None:
    """F1 of the elements of one kind; None where neither text has any."""
    if not ours and not theirs:
        return None
    left, right, matched = list(ours), list(theirs), 0
    for alike in (lambda a, b: a == b, lambda a, b: synonymous(a, b, same)):
        for one in list(left):
            if (other := next((b for b in right if alike(one, b)), None)) is not None:
                left.remove(one)
                right.remove(other)
                matched += 1
    soft = [0.0, 0.0]
    if left and right and embed is not None:
        a, b = embed(left), embed(right)
        likeness = (a @ b.T).clamp(min=0)
        soft = [float(likeness.amax(1).sum()), float(likeness.amax(0).sum())]
    precision = (matched + soft[0]) / len(ours) if ours else 0.0
    recall = (matched + soft[1]) / len(theirs) if theirs else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def synonymous(one: str, other: str, same: Synonyms) -> bool:
    """Whether one contains the other as words, or they share a meaning."""
    first, second = one.split(), other.split()
    inside = any(
        short == long[i : i + len(short)]
        for short, long in ((first, second), (second, first))
        for i in range(len(long) - len(short) + 1)
    )
    return inside or bool(same(one) & same(other))


def capture(scores: Mapping[str, float | None]) -> float:
    """The weighted mean of the F1 of objects, attributes and relations; None is left out."""
    found = [(WEIGHTS[kind], score) for kind, score in scores.items() if score is not None]
    return sum(w * s for w, s in found) / sum(w for w, _ in found) if found else 0.0


def wordnet(folder: Path) -> Synonyms:
    """The words that share a synset with a word, by the files of WordNet (data.noun, ...).

    Nouns, adjectives and verbs. ValueError where the folder is none.
    """
    words: dict[str, set[str]] = {}
    for part in ("noun", "adj", "verb"):
        file = folder / f"data.{part}"
        if not file.is_file():
            raise ValueError(f"capture: wordnet {folder} has no {file.name}; name the folder of its database")
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue  # the licence at the top
            fields = line.split()
            meaning = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            names = [re.sub(r"\(.*\)$", "", word).replace("_", " ").lower() for word in meaning]
            for name in names:
                words.setdefault(name, set()).update(names)
    return lambda word: frozenset(words.get(word, ()))


def no_synonyms(word: str) -> frozenset[str]:
    return frozenset()


@dataclass
class Factual:
    """A parser of sentences into triples: FACTUAL, or another T5 that was taught its format."""

    model: str
    device: str | None = None
    batch: int = 16

    def __post_init__(self) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.model)
            self._network: Any = AutoModelForSeq2SeqLM.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise ValueError(f"capture: parser {self.model} does not load: {error}") from error
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self._network.to(self.device or found).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[CaptionGraph]:
        """The graph of each text, its sentences parsed one by one."""
        parts = [(i, part) for i, text in enumerate(texts) for part in SENTENCE.split(text) if part.strip()]
        found = [CaptionGraph()] * len(texts)
        for first in range(0, len(parts), self.batch):
            some = parts[first : first + self.batch]
            asked = [f"Generate Scene Graph: {part.strip()}" for _, part in some]
            inputs = self._tokenizer(
                asked, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            ).to(self._network.device)
            kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            tokens = self._network.generate(**kept, num_beams=BEAMS, max_new_tokens=LONGEST, do_sample=False)
            written = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for (i, _), text in zip(some, written, strict=True):
                found[i] = found[i].joined(read_triples(text))
        return found


@dataclass
class Embedded:
    """Mean-pooled embeddings of length 1 by a sentence model: MiniLM, or a folder or hub id."""

    model: str

    def __post_init__(self) -> None:
        from mmalign.rewardmodels.conse import load_encoder

        if self.model == "minilm":
            self._encoder, self._tokenizer = load_encoder()
            return
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.model)
            self._encoder = AutoModel.from_pretrained(self.model).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise ValueError(f"capture: likeness {self.model} does not load: {error}") from error

    def __call__(self, texts: Sequence[str]) -> Tensor:
        from mmalign.rewardmodels.conse import embed_sentences

        found: Tensor = embed_sentences(self._encoder, self._tokenizer, texts)
        return found


@dataclass(eq=False)
class Capture:
    """How much of its reference's scene graph a caption tells, from 0 to 1; needs `reference(s)`."""

    parser: str = "lab"  # lab: by the words of the lab; else FACTUAL or another T5, local folder or hub id
    likeness: str | None = (
        None  # of what is left: minilm, or a sentence model; null: only equals and synonyms
    )
    wordnet: str | None = None  # folder of WordNet's database, for synonyms; null: only words in one another
    device: str | None = None  # where the parser runs; null: the accelerator, if there is one
    name = "capture"

    def __post_init__(self) -> None:
        self._graphs: dict[str, CaptionGraph] = {}
        self._same = no_synonyms if self.wordnet is None else wordnet(Path(self.wordnet))

    @cached_property
    def _parse(self) -> Callable[[Sequence[str]], list[CaptionGraph]]:
        if self.parser == "lab":
            from mmalign.rewardmodels.lab_graph import graphs

            exact: Callable[[Sequence[str]], list[CaptionGraph]] = graphs
            return exact
        return Factual(self.parser, self.device)

    @cached_property
    def _embed(self) -> Embed | None:
        return None if self.likeness is None else Embedded(self.likeness)

    def __call__(self, outcome: Outcome) -> RewardSignal:
        texts = captions(self.name, outcome)
        references = [references_of(extra) for extra in extras(outcome)]
        self._read({text for several in (texts, *references) for text in several})
        values: list[float] = []
        details: list[Mapping[str, object]] = []
        for text, several in zip(texts, references, strict=True):
            if not several:
                values.append(math.nan)
                details.append({"missing": "the prompt line has no reference"})
                continue
            rows = [self.compare(self._graphs[text], self._graphs[one]) for one in several]
            values.append(mean(capture(row) for row in rows))
            own = {kind: [row[kind] for row in rows if row[kind] is not None] for kind in WEIGHTS}
            details.append({kind: mean(found) for kind, found in own.items() if found})  # type: ignore[type-var]
        return RewardSignal(self.name, torch.tensor(values)[:, None], details=details)

    def compare(self, ours: CaptionGraph, theirs: CaptionGraph) -> dict[str, float | None]:
        """F1 of each kind."""
        return {
            kind: kind_score(ours.elements(kind), theirs.elements(kind), self._same, self._embed)
            for kind in WEIGHTS
        }

    def _read(self, texts: Iterable[str]) -> None:
        """Parse what was not parsed before: references come again in every epoch."""
        new = sorted(text for text in texts if text not in self._graphs)
        self._graphs |= dict(zip(new, self._parse(new), strict=True))
