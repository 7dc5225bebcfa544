"""Judges of captions behind one contract: what a judge is given, what it answers, and how answers are kept.

A judge compares captions with their references and pictures. What it cannot judge it says so, with a reason.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mmalign.claims import Comparison, recall, record
from mmalign.pictures import Clip, asked
from mmalign.records import Outcome

JUDGES = {
    "endpoint": "mmalign.rewardmodels.vlm_judge:EndpointJudge",
    "local": "mmalign.rewardmodels.vlm_judge:LocalJudge",
    "lab": "mmalign.rewardmodels.lab_judge:LabJudge",
    "rules": "mmalign.rewardmodels.rule_judge:RuleJudge",
}


@dataclass(frozen=True)
class Case:
    """A caption to be judged.

    image: path of the picture. scene: what it shows, in the lab. video: in place of a picture, the folder or
    the files of its frames.
    """

    caption: str
    reference: str
    image: str | None = None
    scene: Mapping[str, Any] | None = None
    video: str | tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """A name for the case: equal for equal captions, references and pictures (by their paths)."""
        seen = [self.image, self.scene] if self.video is None else [self.image, self.scene, self.video]
        shown = json.dumps(seen, sort_keys=True)
        return hashlib.sha256("\0".join([self.caption, self.reference, shown]).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Judged:
    """What a judge said: one comparison for each time it looked. None at all is no verdict; problem says why.

    calls, tokens: what it cost, where it costs.
    """

    looks: tuple[Comparison, ...] = ()
    problem: str = ""
    calls: int = 0
    tokens: int = 0


class CaptionJudge(Protocol):
    """Compares captions with their references and pictures.

    needs: what a case must have beside its caption, as named in `Case`.
    """

    name: str
    needs: tuple[str, ...]

    def compare(self, cases: Sequence[Case]) -> list[Judged]:
        """What there is to say of each case, in their order; a failure is its `problem`, never raised."""
        ...

    def rate(self, cases: Sequence[Case]) -> list[float | str]:
        """How good each caption is on the whole, 0..10, or why that cannot be said."""
        ...


def captions(name: str, outcome: Outcome) -> list[str]:
    """The captions of an outcome; whatever else it holds is refused in the name of the reward."""
    media = outcome.media
    if not isinstance(media, list) or not all(isinstance(text, str) for text in media):
        raise TypeError(
            f"{name} judges captions, and was given {type(media).__name__} instead of a list of strings"
        )
    if len(media) != len(outcome.prompts) * outcome.views:
        raise ValueError(
            f"{name}: the prompts ask for {len(outcome.prompts) * outcome.views} captions (samples x views), "
            f"got {len(media)}"
        )
    return media


def cases(name: str, outcome: Outcome, needs: Sequence[str]) -> list[Case]:
    """One case for each caption, with what its prompt line says of the picture.

    Raises ValueError where a line lacks something that the judge needs.
    """
    found = []
    for row, caption in enumerate(captions(name, outcome)):
        extra = outcome.prompts.extra[row // outcome.views]
        for need in needs:
            if extra.get(need) in (None, "") and not (need == "image" and extra.get("video")):
                raise ValueError(
                    f"{name}: the prompt {outcome.prompts.text[row // outcome.views]!r} has no {need!r}; "
                    "put it into its line of the prompt file"
                )
        scene = extra.get("scene")
        if isinstance(scene, str):
            scene = json.loads(scene)
        image, reference = extra.get("image"), extra.get("reference", "")
        clip = asked(extra)
        found.append(
            Case(
                caption,
                str(reference),
                None if image is None else str(image),
                scene if isinstance(scene, Mapping) else None,
                clip.place if isinstance(clip, Clip) else None,
            )
        )
    return found


def make_judge(judge: str, settings: Mapping[str, Any]) -> CaptionJudge:
    """The judge of that name with its settings; a ValueError names what is not known."""
    if judge not in JUDGES:
        raise ValueError(f"judge must be one of {', '.join(sorted(JUDGES))}, got {judge!r}")
    module, _, kind = JUDGES[judge].partition(":")
    try:
        return getattr(import_module(module), kind)(**settings)  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"judge {judge!r}: {error}") from error


class Recorded:
    """A judge whose answers are kept in a file, and taken from it when the same case comes again.

    file: .jsonl with a line an answer. replay: ask nobody; what is not in the file has no verdict. Ratings
    are kept like comparisons. Failures are not kept.
    """

    def __init__(self, judge: CaptionJudge, file: str | Path, replay: bool = False) -> None:
        self.judge, self.file, self.replay = judge, Path(file), replay
        self.name, self.needs = judge.name, judge.needs
        self._lock = threading.Lock()
        self._compared: dict[str, tuple[Comparison, ...]] = {}
        self._rated: dict[str, float] = {}
        if self.file.exists():
            self._read()
        elif replay:
            raise ValueError(f"judge: there is no recording {self.file} to replay")

    def compare(self, cases: Sequence[Case]) -> list[Judged]:
        asked = [case for case in _distinct(cases) if case.key not in self._compared]
        fresh: dict[str, Judged] = {}
        if asked and self.replay:
            fresh = {
                case.key: Judged(problem=f"the recording {self.file} has no such case") for case in asked
            }
        elif asked:
            fresh = {case.key: said for case, said in zip(asked, self.judge.compare(asked), strict=True)}
            self._keep({key: said.looks for key, said in fresh.items() if said.looks}, {})
        return [fresh[case.key] if case.key in fresh else Judged(self._compared[case.key]) for case in cases]

    def rate(self, cases: Sequence[Case]) -> list[float | str]:
        asked = [case for case in _distinct(cases) if case.key not in self._rated]
        fresh: dict[str, float | str] = {}
        if asked and self.replay:
            fresh = {case.key: f"the recording {self.file} has no such case" for case in asked}
        elif asked:
            fresh = {case.key: said for case, said in zip(asked, self.judge.rate(asked), strict=True)}
            self._keep({}, {key: said for key, said in fresh.items() if not isinstance(said, str)})
        return [fresh[case.key] if case.key in fresh else self._rated[case.key] for case in cases]

    def _keep(self, compared: Mapping[str, tuple[Comparison, ...]], rated: Mapping[str, float]) -> None:
        with self._lock:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a") as out:
                for key, looks in compared.items():
                    self._compared[key] = looks
                    out.write(json.dumps({"key": key, "looks": [record(look) for look in looks]}) + "\n")
                for key, rating in rated.items():
                    self._rated[key] = rating
                    out.write(json.dumps({"key": key, "rating": rating}) + "\n")

    def _read(self) -> None:
        for number, text in enumerate(self.file.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
                if "rating" in line:
                    self._rated[line["key"]] = float(line["rating"])
                else:
                    self._compared[line["key"]] = tuple(recall(look) for look in line["looks"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.file}, line {number}: is no answer of a judge ({error})") from error


def _distinct(cases: Sequence[Case]) -> list[Case]:
    return list({case.key: case for case in cases}.values())
