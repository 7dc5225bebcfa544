"""What a judge says of two captions of one picture, difference by difference, and how that becomes a reward.

After ClaimDiff-RL (Li et al. 2026, arXiv:2605.20278): a judge sees the picture, the actor's caption A and a
reference caption B, and lists where they differ, who is right, and what kind of error each side made.
Caption B is an anchor, not the truth. `claim_rewards` makes a short formula of the errors. Unlike in the
released code, an answer without any difference is an answer, and an unreadable one no verdict, not a 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Judgment = Literal["A", "B", "both_wrong", "both_supported"]
Winner = Literal["A", "B", "Tie"]
Side = Literal["A", "B"]


class ClaimError(ValueError):
    """An answer of a judge that is not in the agreed form; the message says where."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with one side of a difference: an open type such as `color_hallucination`, and how bad.

    severity: 3 the subject or identity, 2 important, 1 peripheral.
    """

    type: str
    detail: str = ""
    severity: int = 2

    def __post_init__(self) -> None:
        if self.severity not in (1, 2, 3):
            raise ClaimError(f"severity must be 1, 2 or 3, got {self.severity!r}")
        if not self.type or self.type.upper() == "NONE":
            raise ClaimError("a fault has a type; where nothing is wrong there is no fault")

    @property
    def omission(self) -> bool:
        """Whether something was left out or cut short, rather than said wrongly."""
        return any(part in self.type.lower() for part in OMISSIONS)


@dataclass(frozen=True)
class Difference:
    """One concrete difference between the captions.

    span: the characters [start, end) of caption A that make the claim, where there are any.
    """

    aspect: str
    claim_a: str
    claim_b: str
    judgment: Judgment
    error_a: Fault | None = None
    error_b: Fault | None = None
    span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.judgment not in get_args(Judgment):
            raise ClaimError(
                f"judgment must be one of {', '.join(get_args(Judgment))}, got {self.judgment!r}"
            )

    def fault(self, side: Side) -> Fault | None:
        return self.error_a if side == "A" else self.error_b


@dataclass(frozen=True)
class Comparison:
    """All differences that a judge found, who is better on the whole, and how many were unreadable."""

    differences: tuple[Difference, ...]
    winner: Winner
    malformed: int = 0

    def __post_init__(self) -> None:
        if self.winner not in get_args(Winner):
            raise ClaimError(
                f"overall_winner must be one of {', '.join(get_args(Winner))}, got {self.winner!r}"
            )

    @property
    def swapped(self) -> Comparison:
        """The same with A and B exchanged; spans, which are of A, are lost."""
        turn: dict[str, Any] = {"A": "B", "B": "A"}
        return Comparison(
            tuple(
                Difference(
                    d.aspect, d.claim_b, d.claim_a, turn.get(d.judgment, d.judgment), d.error_b, d.error_a
                )
                for d in self.differences
            ),
            turn.get(self.winner, self.winner),
            self.malformed,
        )

    def placed(self, caption: str) -> Comparison:
        """With a span for every claim of A that is found in its caption: see `find`."""
        return replace(
            self,
            differences=tuple(
                d if d.span or not d.claim_a.strip() else replace(d, span=find(d.claim_a, caption))
                for d in self.differences
            ),
        )


FALSE = ("hallucination", "mismatch", "incorrect", "wrong", "nonexistent", "fabricated", "overreach")
OMISSIONS = ("omission", "missing", "truncation", "incomplete", "partial")
STYLE = ("style", "aesthetic", "misinterpretation", "subjective")

GLUE = ("the", "and", "with", "are", "has")  # words that tell nothing of a claim

_FAULT: dict[str, Any] = {
    "type": "object",
    "required": ["type", "detail", "severity"],
    "additionalProperties": False,
    "properties": {
        "type": {"type": "string", "description": "NONE, or <dimension>_<nature of the error>"},
        "detail": {"type": "string"},
        "severity": {"enum": [1, 2, 3, None]},
    },
}
_DIFFERENCE: dict[str, Any] = {
    "type": "object",
    "required": ["aspect", "claim_a", "claim_b", "judgment", "error_a", "error_b"],
    "additionalProperties": False,
    "properties": {
        "aspect": {"type": "string"},
        "claim_a": {"type": "string"},
        "claim_b": {"type": "string"},
        "judgment": {"enum": list(get_args(Judgment))},
        "error_a": _FAULT,
        "error_b": _FAULT,
    },
}
# The strict form of an answer, for judges that can be held to a JSON schema.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["differences", "overall_winner"],
    "additionalProperties": False,
    "properties": {
        "differences": {"type": "array", "items": _DIFFERENCE},
        "overall_winner": {"enum": list(get_args(Winner))},
    },
}


def inferred_severity(type: str) -> int:
    """The severity that the name of an error type suggests: false 3, left out 2, style 1, otherwise 2."""
    name = type.lower()
    if any(part in name for part in FALSE):
        return 3
    if any(part in name for part in (*OMISSIONS, "error")):
        return 2
    return 1 if any(part in name for part in STYLE) else 2


def parse(answer: str) -> Comparison:
    """The comparison in an answer, as JSON or in the line format, with whatever stands around it.

    Nothing is invented: an entry that is not as agreed is left out and counted as malformed. An answer
    without a winner, or none of whose entries can be read, raises ClaimError.
    """
    found = _json_in(answer)
    winner, entries = _from_lines(answer) if found is None else _from_json(found)
    differences: list[Difference] = []
    problems: list[str] = []
    for entry in entries:
        try:
            differences.append(_difference(entry))
        except ClaimError as error:
            problems.append(str(error))
    if problems and not differences:
        raise ClaimError(f"none of the {len(problems)} differences can be read: {problems[0]}")
    return Comparison(tuple(differences), winner, len(problems))


def to_json(comparison: Comparison) -> str:
    """The comparison in the strict form of `SCHEMA`; `parse` is the inverse, but for spans."""
    return json.dumps(_strict(comparison))


def record(comparison: Comparison) -> dict[str, Any]:
    """All of a comparison as plain values, spans too; `recall` is the inverse."""
    spans = [d.span for d in comparison.differences]
    return {**_strict(comparison), "spans": spans, "malformed": comparison.malformed}


def recall(found: Mapping[str, Any]) -> Comparison:
    """The comparison that `record` wrote down; ClaimError where it is not as written."""
    try:
        differences = [
            replace(_difference(entry), span=None if span is None else (int(span[0]), int(span[1])))
            for entry, span in zip(found["differences"], found["spans"], strict=True)
        ]
        return Comparison(tuple(differences), _winner(found["overall_winner"]), int(found["malformed"]))
    except (KeyError, TypeError, IndexError) as error:
        raise ClaimError(f"this is no recorded comparison ({error})") from error


def _strict(comparison: Comparison) -> dict[str, Any]:
    return {
        "differences": [
            {
                "aspect": d.aspect,
                "claim_a": d.claim_a,
                "claim_b": d.claim_b,
                "judgment": d.judgment,
                "error_a": _plain(d.error_a),
                "error_b": _plain(d.error_b),
            }
            for d in comparison.differences
        ],
        "overall_winner": comparison.winner,
    }


def to_lines(comparison: Comparison) -> str:
    """The comparison in the lines of the paper's reward server; `parse` is the inverse, but for spans."""
    lines = []
    for number, d in enumerate(comparison.differences, 1):
        lines += [f"[DIFFERENCE {number}]", f"ASPECT: {d.aspect}", f"CAPTION_A_CLAIM: {d.claim_a}"]
        lines += [f"CAPTION_B_CLAIM: {d.claim_b}", f"JUDGMENT: {d.judgment}"]
        for side, fault in (("A", d.error_a), ("B", d.error_b)):
            found = _plain(fault)
            lines += [f"CAPTION_{side}_ERROR:", f"ERROR_TYPE: {found['type']}"]
            lines += [f"ERROR_DETAIL: {found['detail']}", f"SEVERITY_LEVEL: {found['severity'] or 'NA'}"]
    return "\n".join([*lines, "[OVERALL_WINNER]", comparison.winner])


def _plain(fault: Fault | None) -> dict[str, Any]:
    return {"type": "NONE", "detail": "", "severity": None} if fault is None else dict(vars(fault))


def _json_in(answer: str) -> Mapping[str, Any] | None:
    """The first JSON object in the answer that has differences or a winner; None where there is none."""
    decoder = json.JSONDecoder()
    for start in (found.start() for found in re.finditer(r"\{", answer)):
        try:
            found, _ = decoder.raw_decode(answer, start)
        except ValueError:
            continue
        if isinstance(found, dict) and ("differences" in found or "overall_winner" in found):
            return found
    return None


def _from_json(found: Mapping[str, Any]) -> tuple[Winner, Sequence[Any]]:
    entries = found.get("differences")
    if not isinstance(entries, list):
        raise ClaimError("the answer has no list of differences")
    return _winner(found.get("overall_winner")), entries


_HEADER = re.compile(r"^[ \t*#]*\[DIFFERENCE\s+\d+\][ \t*]*$", re.M)
_WINNER = re.compile(r"^[ \t*#]*\[OVERALL_WINNER\][ \t*:]*\s*(\S+)", re.M)
_FIELDS = {
    "aspect": "ASPECT",
    "claim_a": "CAPTION_A_CLAIM",
    "claim_b": "CAPTION_B_CLAIM",
    "judgment": "JUDGMENT",
}


def _from_lines(answer: str) -> tuple[Winner, Sequence[Any]]:
    last = _WINNER.search(answer)
    if last is None:
        raise ClaimError("the answer has neither JSON with differences nor an [OVERALL_WINNER]")
    _, *blocks = _HEADER.split(answer[: last.start()])
    return _winner(last[1].strip("*.")), [_entry(block) for block in blocks]


def _entry(block: str) -> Mapping[str, Any]:
    """One block of lines as the JSON entry that says the same; what is missing stays missing."""

    def line(name: str, text: str) -> str | None:
        found = re.search(rf"^[ \t*]*{name}:[ \t]*(.*?)[ \t]*$", text, re.M)
        return found[1] if found else None

    found: dict[str, Any] = {key: line(name, block) for key, name in _FIELDS.items()}
    for key, side in (("error_a", "A"), ("error_b", "B")):
        part = re.search(
            rf"^[ \t*]*CAPTION_{side}_ERROR:(.*?)(?=^[ \t*]*CAPTION_[AB]_ERROR:|\Z)", block, re.M | re.S
        )
        if part:
            severity = line("SEVERITY_LEVEL", part[1])
            found[key] = {
                "type": line("ERROR_TYPE", part[1]),
                "detail": line("ERROR_DETAIL", part[1]) or "",
                "severity": int(severity) if severity and severity.isdecimal() else severity,
            }
    return {key: value for key, value in found.items() if value is not None}


def _winner(given: object) -> Winner:
    for known in get_args(Winner):
        if isinstance(given, str) and given.strip().lower() == known.lower():
            return known  # type: ignore[no-any-return]  # get_args forgets what it is given
    raise ClaimError(f"overall_winner must be one of {', '.join(get_args(Winner))}, got {given!r}")


def _difference(entry: object) -> Difference:
    """One entry as agreed, else ClaimError."""
    if not isinstance(entry, dict):
        raise ClaimError(f"a difference must be an object, got {entry!r}")
    if missing := [key for key in _DIFFERENCE["required"] if key not in entry]:
        raise ClaimError(f"a difference lacks {', '.join(missing)}")
    for key in ("aspect", "claim_a", "claim_b", "judgment"):
        if not isinstance(entry[key], str):
            raise ClaimError(f"{key} of a difference must be text, got {entry[key]!r}")
    judgment = entry["judgment"].strip().lower().replace(" ", "_").replace("-", "_")
    return Difference(
        entry["aspect"].strip(),
        entry["claim_a"].strip(),
        entry["claim_b"].strip(),
        next((known for known in get_args(Judgment) if known.lower() == judgment), entry["judgment"]),
        _fault(entry["error_a"]),
        _fault(entry["error_b"]),
    )


def _fault(given: object) -> Fault | None:
    """The fault of one side; severity is null just where the type is NONE, and inferred where absent."""
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        raise ClaimError(f"an error must be an object with a type, got {given!r}")
    kind, severity = given["type"].strip(), given.get("severity", "absent")
    if kind.upper() in ("NONE", "NA", ""):
        if severity not in (None, "absent", "NA"):
            raise ClaimError(f"an error of type NONE has severity null, got {severity!r}")
        return None
    if severity == "absent":
        severity = inferred_severity(kind)
    if severity not in (1, 2, 3) or isinstance(severity, bool):
        raise ClaimError(f"severity of {kind!r} must be 1, 2 or 3, got {severity!r}")
    return Fault(kind, str(given.get("detail", "")), severity)


def find(claim: str, caption: str) -> tuple[int, int] | None:
    """Characters of the caption that make a claim: its words in order, or the place that has most of them.

    A place counts if it holds at least half of the claim's telling words, and no claim is
    found in a caption that shares none. The place is cut to the words in common.
    """
    words = re.findall(r"\w+", claim.lower())
    if not words:
        return None
    exact = re.search(r"\W+".join(map(re.escape, words)), caption, re.I)
    if exact:
        return exact.span()
    telling = {word for word in words if len(word) > 2 and word not in GLUE} or set(words)
    tokens = [(found[0].lower(), *found.span()) for found in re.finditer(r"\w+", caption)]
    width = len(words) + 2
    best: tuple[int, int, int] | None = None
    for first in range(len(tokens)):
        shared = [token for token in tokens[first : first + width] if token[0] in telling]
        count = len({token[0] for token in shared})
        if 2 * count >= len(telling) and shared and (best is None or count > best[0]):
            best = (count, shared[0][1], shared[-1][2])
    return None if best is None else best[1:]
