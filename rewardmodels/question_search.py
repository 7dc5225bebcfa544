"""The question about artifacts that a frozen model answers best, by search on labels (arXiv:2601.03468).

Beam search with textual gradients (ProTeGi, arXiv:2305.03495). A round, for each question of the beam:

    errors      pictures of a minibatch that it answers wrongly
    gradients   what a writer finds wrong with the question, from a few errors each
    edits       the question, mended by each gradient; and each of these said in other words

The best of old and new ones by accuracy on the minibatch go on. At the end the best by accuracy on all
pictures searched on is held against others, which no round has seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mmalign.rewardmodels.endpoint import Endpoint, Question, said, shown
from mmalign.rewardmodels.vlm_score import YesNo, picture_of

START = "Does this picture have artifacts or broken parts? Please answer yes or no."
WHY = """A model is asked about pictures: "{question}" It should say yes for pictures with artifacts of a
generator, and no for pictures without. For the pictures above its answers were wrong:
{errors}
Say in two sentences what about the question may have misled it, and which damage it should look for."""
MEND = """A model is asked about pictures: "{question}" It should find pictures with artifacts. The question
was criticized: {why}
Write a better question that is answered by yes or no, yes for artifacts. Answer with the question alone."""
ANOTHER = 'Say the same in other words, as one question answered by yes or no, and nothing else: "{question}"'


class Asker(Protocol):
    """Answers a question about pictures."""

    def yes(self, question: str, images: Tensor) -> Tensor:
        """How likely yes is for each picture [n, 3, H, W] in [0, 1]: [n], NaN where there is no answer."""


class Writer(Protocol):
    """Writes about pictures."""

    def write(self, request: str, images: Sequence[Tensor]) -> str:
        """The answer to a request that speaks of these pictures; "" where there is none."""


@dataclass
class ModelAsker:
    """A model of transformers, by the probabilities of its first token."""

    model: YesNo
    batch: int = 8

    def yes(self, question: str, images: Tensor) -> Tensor:
        found: Tensor = self.model.ask(images, [question] * len(images), self.batch)
        return found


@dataclass
class EndpointWriter:
    """A model behind an endpoint, with a temperature."""

    client: Endpoint
    temperature: float = 0.7
    asked: int = field(default=0, init=False)

    def write(self, request: str, images: Sequence[Tensor]) -> str:
        parts = [*(shown(picture_of(image)) for image in images), said(request)]
        self.asked += 1  # so that the same request is not answered from the cache
        question = Question([{"role": "user", "content": parts}], self.temperature, self.asked)
        return (self.client.ask([question])[0].text or "").strip()


@dataclass(frozen=True)
class Search:
    """How wide and how long is searched; by default as the paper."""

    rounds: int = 6
    beam: int = 4  # questions that go on to the next round
    minibatch: int = 60  # pictures that a round judges by
    gradients: int = 4  # critiques of a question in a round
    errors: int = 4  # wrong answers that a critique is about
    expansion: int = 5  # new questions that are kept of those that came of one
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "beam", "minibatch", "gradients", "errors", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"search: {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Found:
    """The best question, its accuracy where it was searched and on held-out pictures; that of the first."""

    question: str
    searched: float
    held_out: float
    first_held_out: float


def accuracy(probability: Tensor, artifact: Tensor) -> float:
    """Share of pictures with the right answer at 1/2; no answer is a wrong one."""
    right = torch.where(artifact, probability > 0.5, probability <= 0.5) & ~probability.isnan()
    return right.float().mean().item()


def search(
    asker: Asker,
    writer: Writer,
    images: Tensor,
    artifact: Tensor,
    start: Sequence[str] = (START,),
    settings: Search | None = None,
    log: Callable[[int, Sequence[tuple[float, str]]], None] = lambda number, beam: None,
) -> Found:
    """Search on two thirds of the pictures [N, 3, H, W], and hold the best question against the others.

    artifact: [N] bool. log gets each round's number and its beam with accuracies, the best first.
    """
    how, rng = settings or Search(), random.Random((settings or Search()).seed)
    order = list(range(len(images)))
    rng.shuffle(order)
    held, rest = order[: len(order) // 3], order[len(order) // 3 :]
    if not held:
        raise ValueError(f"search: needs at least 3 labeled pictures, got {len(images)}")
    beam = list(dict.fromkeys(start))
    for number in range(how.rounds):
        rows = rng.sample(rest, min(how.minibatch, len(rest)))
        shown_, truth = images[rows], artifact[rows]
        answers = {question: asker.yes(question, shown_) for question in beam}
        for question in beam:
            wrong = (truth != (answers[question] > 0.5)).nonzero()[:, 0].tolist()
            new = _offspring(writer, question, wrong, shown_, truth, how, rng) if wrong else []
            for text in new:
                if text not in answers:
                    answers[text] = asker.yes(text, shown_)
        ranked = sorted(((accuracy(p, truth), text) for text, p in answers.items()), key=lambda row: -row[0])
        beam = [text for _, text in ranked[: how.beam]]
        log(number + 1, ranked[: how.beam])
    scores = [accuracy(asker.yes(text, images[rest]), artifact[rest]) for text in beam]
    best = max(range(len(beam)), key=scores.__getitem__)
    last, first = (accuracy(asker.yes(text, images[held]), artifact[held]) for text in (beam[best], start[0]))
    return Found(beam[best], scores[best], last, first)


def _offspring(
    writer: Writer,
    question: str,
    wrong: Sequence[int],
    images: Tensor,
    truth: Tensor,
    how: Search,
    rng: random.Random,
) -> list[str]:
    """New questions from the errors of one."""
    new: list[str] = []
    for _ in range(how.gradients):
        rows = rng.sample(wrong, min(how.errors, len(wrong)))
        errors = "\n".join(
            f"picture {place}: said {'no' if truth[row] else 'yes'}, right is {'yes' if truth[row] else 'no'}"
            for place, row in enumerate(rows, 1)
        )
        why = writer.write(WHY.format(question=question, errors=errors), [images[row] for row in rows])
        mended = writer.write(MEND.format(question=question, why=why), []) if why else ""
        new += [
            text for text in (mended, mended and writer.write(ANOTHER.format(question=mended), [])) if text
        ]
    new = [text for text in dict.fromkeys(new) if text not in ("", question)]
    return rng.sample(new, min(how.expansion, len(new)))
