"""A judge of captions that needs no model: it compares the words of a caption with those of its reference.

Both are cut into clauses, clauses are matched by the words that tell what they are about (or by sentence
embeddings), and what matched clauses say of color, number, size and place is compared.

It sees no picture, and so takes the reference for the truth where the two contradict each other. What the
reference is silent about it cannot know: such a claim is no error, unless `strict` says that the reference is
complete. It knows no grammar: "a dog chases a cat" and "a cat chases a dog" are the same to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmalign.claims import Comparison, Difference, Fault, Winner
from mmalign.rewardmodels.caption_judges import Case, Judged

Likeness = Literal["words", "minilm"]
ATTRIBUTES = {
    "color": """red green blue yellow purple violet cyan turquoise orange pink brown black white gray grey
        beige golden silver""",
    "count": "one two three four five six seven eight nine ten several many single both",
    "size": "small little tiny medium large big huge tall short long wide narrow",
    "position": """left right top bottom center middle above below behind front foreground background under
        over""",
}
SAME = {
    "grey": "gray",
    "violet": "purple",
    "little": "small",
    "tiny": "small",
    "big": "large",
    "huge": "large",
}
SAME |= {"single": "one", "under": "below", "over": "above", "middle": "center", "turquoise": "cyan"}
OF = {word: aspect for aspect, words in ATTRIBUTES.items() for word in words.split()}
SEVERITY = {"object": 3, "color": 2, "count": 2, "size": 1, "position": 1}
WORDS_OF_GLUE = """a an the is are was were be there it its this that these those of in on at to by from with
    as for and or picture image photo photograph scene shows showing depicts seen can has have having next
    side written thing things some her his their he she they which who while into near"""
GLUE = frozenset(WORDS_OF_GLUE.split())
CUT = re.compile(r"[.;:!?]+\s*|,\s+(?:and\s+)?|\s+and\s+(?=an?\s|the\s|\d)|\s+(?:while|with)\s+", re.I)


@dataclass(frozen=True)
class Clause:
    """Some words of a caption [start, end): what they are about, and what they say of it by aspect."""

    text: str
    start: int
    end: int
    about: frozenset[str]
    says: tuple[tuple[str, str], ...]

    def values(self, aspect: str) -> set[str]:
        return {value for name, value in self.says if name == aspect}


def clauses(caption: str) -> list[Clause]:
    """The clauses of a caption that are about anything, in their order."""
    cuts = [0, *(at for found in CUT.finditer(caption) for at in found.span()), len(caption)]
    found = []
    for start, end in zip(cuts[::2], cuts[1::2], strict=True):
        words = [word.lower() for word in re.findall(r"[A-Za-z]+|\d+", caption[start:end])]
        says = tuple((OF[word], SAME.get(word, word)) for word in words if word in OF)
        about = frozenset(stem(word) for word in words if word not in OF and word not in GLUE)
        if about:
            found.append(Clause(caption[start:end], start, end, about, says))
    return found


def stem(word: str) -> str:
    """A word without the commonest endings of English, so that dogs are a dog."""
    for ending in ("ies", "es", "s", "ing", "ed"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)] + ("y" if ending == "ies" else "")
    return word


@dataclass
class RuleJudge:
    """Compares the words of captions.

    likeness: how clauses are matched: by the words they share, or by MiniLM (pip install 'mmalign[offline]').
    alike: likeness from which two clauses are about the same. strict: what the reference does not say is made
    up.
    """

    likeness: Likeness = "words"
    alike: float = 0.5
    strict: bool = False
    name = "rules"
    needs = ("reference",)

    def __post_init__(self) -> None:
        if self.likeness not in get_args(Likeness):
            raise ValueError(
                f"likeness must be one of {', '.join(get_args(Likeness))}, got {self.likeness!r}"
            )
        if not 0 < self.alike <= 1:
            raise ValueError(f"alike must lie in (0, 1], got {self.alike}")
        self._alike: Callable[[Sequence[Clause], Sequence[Clause]], np.ndarray] = (
            shared_words if self.likeness == "words" else _embedded()
        )

    def compare(self, cases: Sequence[Case]) -> list[Judged]:
        return [self._compare(case) for case in cases]

    def rate(self, cases: Sequence[Case]) -> list[float | str]:
        found: list[float | str] = []
        for case in cases:
            ours, theirs = clauses(case.caption), clauses(case.reference)
            if not theirs:
                found.append("the reference says nothing that rules can read")
                continue
            pairs = self._pairs(ours, theirs)
            held = sum(not contradictions(ours[i], theirs[j]) for i, j in pairs)
            found.append(float(round(20 * held / max(1, len(ours) + len(theirs)))))
        return found

    def _compare(self, case: Case) -> Judged:
        ours, theirs = clauses(case.caption), clauses(case.reference)
        if not theirs:
            return Judged(problem="the reference says nothing that rules can read")
        pairs = self._pairs(ours, theirs)
        found = [d for i, j in pairs for d in about_the_same(ours[i], theirs[j])]
        met, told = {i for i, _ in pairs}, {j for _, j in pairs}
        for i, clause in enumerate(ours):
            if i not in met:
                fault = Fault("object_hallucination", "the reference has none", SEVERITY["object"])
                found.append(_loose(clause, fault if self.strict else None))
        found += [
            Difference(
                "object",
                "",
                clause.text,
                "B",
                Fault("object_omission", clause.text, SEVERITY["object"]),
                None,
            )
            for j, clause in enumerate(theirs)
            if j not in told
        ]
        winner: Winner = "B" if any(d.error_a for d in found) else "Tie"
        return Judged((Comparison(tuple(found), winner),))

    def _pairs(self, ours: Sequence[Clause], theirs: Sequence[Clause]) -> list[tuple[int, int]]:
        """Clauses that are about the same, each in one pair, the likeliest pairs first."""
        if not ours or not theirs:
            return []
        alike = self._alike(ours, theirs)
        # Of equally alike ones those that agree belong together.
        agree = np.array([[-len(contradictions(a, b)) for b in theirs] for a in ours])
        rows, columns = linear_sum_assignment(alike + 0.01 * agree, maximize=True)
        return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if alike[i, j] >= self.alike]


def contradictions(ours: Clause, theirs: Clause) -> list[str]:
    """The aspects of which each says something that the other does not."""
    return [
        aspect
        for aspect in ATTRIBUTES
        if ours.values(aspect) - theirs.values(aspect) and theirs.values(aspect) - ours.values(aspect)
    ]


def about_the_same(ours: Clause, theirs: Clause) -> list[Difference]:
    """What two clauses about the same say differently; what only the caption adds is let stand."""
    found = []
    span = (ours.start, ours.end)
    wrong = contradictions(ours, theirs)
    for aspect in ATTRIBUTES:
        a, b = ours.values(aspect) - theirs.values(aspect), theirs.values(aspect) - ours.values(aspect)
        said, other = ", ".join(sorted(a)), ", ".join(sorted(b))
        if aspect in wrong:
            fault = Fault(f"{aspect}_mismatch", f"is {other}", SEVERITY[aspect])
            found.append(Difference(aspect, said, other, "B", fault, None, span))
        elif b:
            fault = Fault(f"{aspect}_omission", other, SEVERITY[aspect])
            found.append(Difference(aspect, "", other, "B", fault))
        elif a:
            found.append(Difference(aspect, said, "", "both_supported", span=span))
    return found


def _loose(clause: Clause, fault: Fault | None) -> Difference:
    span = (clause.start, clause.end)
    return Difference("object", clause.text, "", "B" if fault else "both_supported", fault, None, span)


def shared_words(ours: Sequence[Clause], theirs: Sequence[Clause]) -> np.ndarray:
    """Words that two clauses are about in common, over those of the one that is about fewer."""
    return np.array(
        [[len(a.about & b.about) / min(len(a.about), len(b.about)) for b in theirs] for a in ours]
    )


def _embedded() -> Callable[[Sequence[Clause], Sequence[Clause]], np.ndarray]:
    """Cosines of the sentence embeddings of what clauses are about."""
    from mmalign.rewardmodels.conse import embed_sentences, load_encoder

    encoder, tokenizer = load_encoder()
    known: dict[frozenset[str], np.ndarray] = {}

    def alike(ours: Sequence[Clause], theirs: Sequence[Clause]) -> np.ndarray:
        new = list({c.about for c in (*ours, *theirs)} - known.keys())
        if new:
            texts = [" ".join(sorted(about)) for about in new]
            known.update(zip(new, embed_sentences(encoder, tokenizer, texts).cpu().numpy(), strict=True))
        found: np.ndarray = (
            np.stack([known[c.about] for c in ours]) @ np.stack([known[c.about] for c in theirs]).T
        )
        return found

    return alike
