"""A captioner that takes milliseconds: a table of next-word scores for each picture and previous word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from toys import Notes, exact

from mmalign.contracts import Forwards, Key, RewardModel
from mmalign.copies import Copies
from mmalign.data import Prompt, PromptSource
from mmalign.randomness import generator
from mmalign.records import (
    Evaluation,
    Outcome,
    Pick,
    Plan,
    Prompts,
    RewardSignal,
    Spans,
    Steps,
    Trajectory,
    Unit,
    Where,
    Whole,
)
from mmalign.scoring import Scorer
from mmalign.trainer import Trainer, TrainingSettings

WORDS = ("end", "a", "red", "blue", "dog", "cat", "hat", ".")  # the first ends a text
TRUTH = {0: {"red", "dog"}, 1: {"blue", "cat"}}  # what is true of each picture


class Table(nn.Module):
    def __init__(self, pictures: int, words: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(0.5 * torch.randn(pictures, words, words))

    def forward(self, picture: Tensor, previous: Tensor) -> Tensor:
        """Log-probabilities of the next word, [*, words]."""
        return log_softmax(self.scores[picture, previous])


def log_softmax(scores: Tensor) -> Tensor:
    """Without the kernels that give a row other last bits in another batch."""
    shape = scores.shape
    rows = scores.reshape(-1, shape[-1])
    rows = rows - rows.amax(1, keepdim=True).detach()
    return (rows - exact(torch.log, exact(torch.exp, rows).sum(1))[:, None]).reshape(shape)


class ToyWriter:
    """Writes at most `length` words about a picture, whose number is the prompt."""

    def __init__(self, pictures: int = 2, length: int = 8, words: Sequence[str] = WORDS, seed: int = 0):
        self.words, self.length = tuple(words), length
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module: nn.Module = Table(pictures, len(words))
        self.copies, self.forwards = Copies(self.module), Forwards()

    @torch.no_grad()
    def sample(self, prompts: Prompts, plan: Plan, key: Key) -> Trajectory:
        picture = torch.tensor([int(text) for text in prompts.text])
        names = zip(prompts.group.tolist(), prompts.member.tolist(), strict=True)
        chances = torch.stack(
            [torch.rand(self.length, generator=generator(*key, "word", *name)) for name in names]
        )
        previous, alive = torch.zeros_like(picture), torch.ones(len(picture), dtype=torch.bool)
        tokens, mask, likely = [], [], []
        for step in range(self.length):
            log_p = self.module(picture, previous)
            below = exact(torch.exp, log_p).cumsum(1) < chances[:, step : step + 1]
            drawn = torch.where(alive, below.sum(1).clamp(max=len(self.words) - 1), 0)
            tokens.append(drawn)
            mask.append(alive)
            likely.append(torch.where(alive, log_p.gather(1, drawn[:, None])[:, 0], 0.0))
            previous, alive = drawn, alive & (drawn != 0)
            self.forwards.sample += len(picture)
        token = torch.stack(tokens, 1)
        texts = [" ".join(self.words[i] for i in row if i) for row in token.tolist()]
        replay = {"picture": picture, "token": token}
        return Trajectory(Outcome(prompts, texts), torch.stack(likely, 1), torch.stack(mask, 1), replay, plan)

    def picks(self, trajectory: Trajectory, rows: Tensor, size: int) -> Iterator[Pick]:
        for part in rows.split(size):
            place, column = trajectory.mask[part].nonzero(as_tuple=True)
            yield Pick(part[place], column)

    def evaluate(self, trajectory: Trajectory, pick: Pick, guidance: float | None = None) -> Evaluation:
        token = trajectory.replay["token"][pick.rows, pick.columns]
        log_p = self._next(trajectory, pick.rows, pick.columns)
        return Evaluation(log_p.gather(-1, token[:, None])[:, 0])

    def distributions(
        self, trajectory: Trajectory, rows: Tensor, size: int
    ) -> Iterator[tuple[slice, Tensor]]:
        columns = torch.arange(trajectory.log_prob.shape[1])
        for part in columns.split(size):
            row, column = torch.broadcast_tensors(rows[:, None], part)
            with torch.no_grad():
                yield slice(int(part[0]), int(part[-1]) + 1), self._next(trajectory, row, column)

    def _next(self, trajectory: Trajectory, rows: Tensor, columns: Tensor) -> Tensor:
        token = trajectory.replay["token"]
        previous = torch.cat([torch.zeros_like(token[:, :1]), token[:, :-1]], 1)[rows, columns]
        counted = "train" if torch.is_grad_enabled() else "reference"
        setattr(self.forwards, counted, getattr(self.forwards, counted) + len(torch.unique(rows)))
        found: Tensor = self.module(trajectory.replay["picture"][rows], previous)
        return found

    def locate(self, where: Where, trajectory: Trajectory) -> Tensor:
        token = trajectory.replay["token"]
        if isinstance(where, Whole):
            return torch.ones(1, 1, token.shape[1])
        if isinstance(where, Steps):
            return nn.functional.one_hot(where.index, token.shape[1]).float()
        if isinstance(where, Spans):
            size = torch.tensor([0, *(len(word) for word in self.words[1:])])[token]
            start = (size + (size > 0)).cumsum(1) - size - (size > 0).long()
            touched = (start[:, None] < where.end[..., None]) & (
                where.start[..., None] < (start + size)[:, None]
            )
            return touched.float()
        raise TypeError(f"a captioner cannot place {type(where).__name__} on its words; it can place Spans")

    def save(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        torch.save(dict(state or self.module.state_dict()), folder / "writer.pt")

    def load(self, folder: Path) -> None:
        self.module.load_state_dict(torch.load(folder / "writer.pt", weights_only=True))


def trainer(
    method: Any,
    iterations: int = 1,
    rewards: Sequence[RewardModel] = (),
    weights: Mapping[str, float] | None = None,
    policy: ToyWriter | None = None,
    run_dir: Path | None = None,
    group: int = 8,
    **settings: Any,
) -> Trainer:
    """A trainer of the toy, whose tracker remembers; weights: of the rewards, 1 where none is given."""
    rewards = rewards or [Claims()]
    algorithm = method.build({model.name: (weights or {}).get(model.name, 1.0) for model in rewards})
    usual = TrainingSettings(iterations=iterations, learning_rate=5e-2, batch=1000, ema_decay=0.0)
    return Trainer(
        policy or ToyWriter(),
        algorithm,
        Scorer(list(rewards), missing_limit=1.0),
        pictures(group=group),
        replace(usual, **settings),
        tracker=Notes(),  # type: ignore[arg-type]
        run_dir=run_dir,
    )


def pictures(per_iteration: int = 2, group: int = 8, seed: int = 0) -> PromptSource:
    """Prompts for the two pictures."""
    return PromptSource([Prompt(str(i)) for i in range(2)], per_iteration, group, seed)


def spans(texts: Sequence[str], words: set[str]) -> list[list[tuple[int, int]]]:
    """Where each of the words stands in each text."""
    found = []
    for text in texts:
        place, row = 0, []
        for word in text.split(" ") if text else []:
            if word in words:
                row.append((place, place + len(word)))
            place += len(word) + 1
        found.append(row)
    return found


class Claims:
    """1 for each true word about the picture, -1 for each false one; by_claim: at its place, else their sum.

    missing: what each truth that is not told costs; it speaks about the whole text.
    """

    def __init__(self, by_claim: bool = False, missing: float = 0.0, name: str = "claims") -> None:
        self.by_claim, self.missing, self.name = by_claim, missing, name

    def __call__(self, outcome: Outcome) -> RewardSignal:
        assert isinstance(outcome.media, list)
        told = set().union(*TRUTH.values())
        places = spans(outcome.media, told)
        rows: list[list[tuple[int, int, float]]] = []
        for text, number, found in zip(outcome.media, outcome.prompts.text, places, strict=True):
            truth = TRUTH[int(number)]
            row = [(a, b, 1.0 if text[a:b] in truth else -1.0) for a, b in found]
            left = truth - {text[a:b] for a, b in found}
            rows.append(row + [(0, len(text), -self.missing) for _ in left if self.missing])
        if not self.by_claim:
            total = [sum(value for *_, value in row) for row in rows]
            return RewardSignal(self.name, torch.tensor(total)[:, None])
        units = max(1, *map(len, rows))
        filled = torch.full((len(rows), units, 3), torch.nan)
        for i, row in enumerate(rows):
            if row:
                filled[i, : len(row)] = torch.tensor(row)
        place = filled[..., :2].nan_to_num().long()
        return RewardSignal(self.name, filled[..., 2], Unit.CLAIM, where=Spans(place[..., 0], place[..., 1]))


class Truth:
    """1 for a text that names something true of the picture, else 0."""

    name = "truth"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        found = [[float(any(row))] for row in told(outcome)]
        return RewardSignal(self.name, torch.tensor(found))


class Rubric:
    """Whether each of the truths about a picture is told."""

    name = "rubric"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return RewardSignal(self.name, torch.tensor(told(outcome)).float(), Unit.CRITERION)


def told(outcome: Outcome) -> list[list[bool]]:
    """Which of the truths about its picture each text tells."""
    assert isinstance(outcome.media, list)
    return [
        [word in text.split(" ") for word in sorted(TRUTH[int(number)])]
        for text, number in zip(outcome.media, outcome.prompts.text, strict=True)
    ]
