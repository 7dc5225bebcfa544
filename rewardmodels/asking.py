"""Whoever answers questions about pictures, and asking until an answer can be read."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from mmalign.rewardmodels.endpoint import Answer, Endpoint, Question
from mmalign.rewardmodels.local_chat import LocalChat

T = TypeVar("T")


class Client(Protocol):
    """Whoever answers questions: `Endpoint` or `LocalChat`."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]: ...


def open_client(judge: str, model: str, url: str, settings: Mapping[str, Any]) -> Client:
    """The client of a judge: "endpoint", a model behind an address, or "local", one of transformers here.

    ValueError where the judge or a setting is not known.
    """
    if judge not in ("endpoint", "local"):
        raise ValueError(f"judge must be endpoint or local, got {judge!r}")
    try:
        client: Client = (
            Endpoint(url, model, **settings) if judge == "endpoint" else LocalChat(model, **settings)
        )
    except TypeError as error:
        raise ValueError(f"judge {judge!r}: {error}") from error
    return client


def answers(
    client: Client, questions: Sequence[Question], read: Callable[[str], T], attempts: int = 3, seed: int = 0
) -> list[tuple[T | str, int, int]]:
    """For each question what `read` makes of its answer, or the problem; with the calls and tokens it cost.

    read: raises a ValueError where an answer cannot be read; the question is then asked again, up to
    `attempts` times, at temperatures that are the same in every run, so that a recording can be replayed.
    """
    found: list[T | str] = [""] * len(questions)
    cost = [[0, 0] for _ in questions]
    open_ = list(range(len(questions)))
    for attempt in range(attempts + 1):
        again = []
        batch = [questions[i] for i in open_]
        if attempt:
            heat = random.Random(f"{seed} {attempt}").random()
            batch = [replace(q, attempt=q.attempt + attempt, temperature=heat) for q in batch]
        for i, answer in zip(open_, client.ask(batch), strict=True):
            cost[i][0] += answer.calls
            cost[i][1] += answer.tokens
            if answer.text is None:
                found[i] = answer.problem
                continue
            try:
                found[i] = read(answer.text)
            except ValueError as error:
                found[i] = str(error)
                again.append(i)
        open_ = again
        if not open_:
            break
    return [(value, calls, tokens) for value, (calls, tokens) in zip(found, cost, strict=True)]
