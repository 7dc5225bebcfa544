"""How DeScore learns (arXiv:2605.05922): first to score thoughts that are given, then to think.

Stage 1, discriminative cold start. With given reasoning c, for both videos of a pair or, with probability
`hide`, for neither:

    L1 = -log sigmoid(s(x+, c+) - s(x-, c-)),   0 for ties

Stage 2, both objectives on the model's own thoughts, several for each video:

    r  = .7 accuracy + .1 format + .2 length         of a thought
    L2 = GRPO(r) + beta KL(model | stage 1) + 5e-3 * mean over rollouts of L1

accuracy: share of the dimensions of a video to which the thought gives the score of the label. Length: .2 for
every 500 characters, and 1 instead of .8 from 2000 on, as in the public code. LoRA, head and the embedding of
the one new token learn; all else is frozen, also what sees, which the public code tunes in stage 1. A pair
without reasoning is always read without it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.contracts import LoraSettings
from mmalign.copies import Copies
from mmalign.credit import zscore
from mmalign.objectives import REFERENCE, clipped_gain, divergence
from mmalign.pictures import Clip, missing_video
from mmalign.pipelines.captioner import saved_name
from mmalign.pipelines.flow import add_lora, take
from mmalign.pipelines.videos import open_video
from mmalign.pipelines.vlm import LINEAR, linears
from mmalign.randomness import generator, seed_of
from mmalign.records import Evaluation
from mmalign.rewardmodels.descore import (
    ADAPTER,
    ADAPTER_SAID,
    Inputs,
    Thinker,
    Thought,
    adapter_of,
    answer_of,
    settings_of,
    shown_of,
)
from mmalign.rewardmodels.precisions import Precision
from mmalign.rewardmodels.training_state import Row, TrainingState, fingerprint

PAIRS = "pairs.jsonl"
Loss = Literal["bradley_terry", "margin", "tie_aware"]
MARGIN, TIE = 0.57, math.log(5.0)
KEPT = 2**31  # bytes of inputs of videos that are kept
Log = Callable[[Row], None]


@dataclass(frozen=True)
class Side:
    """One video of a pair. reasoning: given, "" for none; scores: of its dimensions, empty where unknown."""

    video: Clip
    reasoning: str
    scores: Mapping[str, int]


@dataclass(frozen=True)
class Pair:
    """Two videos for one prompt. kind: what they differ in, for tables alone."""

    prompt: str
    chosen: Side
    rejected: Side
    tie: bool = False
    kind: str = ""

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.chosen, self.rejected


def read_pairs(folder: Path) -> list[Pair]:
    """The pairs of `folder/pairs.jsonl`, videos beside it; ValueError names the line that is wrong.

    A line: {"prompt": ..., "chosen": {"video": ..., "reasoning": ..., "scores": {...}}, "rejected": {...},
    "tie": false, "kind": ...}; only prompt and both videos are needed.
    """
    file = folder / PAIRS
    if not file.is_file():
        raise ValueError(f"{folder}: has no {PAIRS}; scripts/descore.py pairs writes one")
    pairs = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            chosen, rejected = (_side(row[name], folder) for name in ("chosen", "rejected"))
            tie, kind = bool(row.get("tie", False)), str(row.get("kind", ""))
            found = Pair(str(row["prompt"]), chosen, rejected, tie, kind)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}:{number}: needs a prompt, and chosen and rejected videos: {error!r}"
            ) from error
        pairs.append(found)
    if not pairs or all(pair.tie for pair in pairs):
        raise ValueError(f"{file}: needs pairs, and not ties alone")
    return pairs


def _side(row: Mapping[str, object], folder: Path) -> Side:
    place = folder / str(row["video"])
    if why := missing_video(str(place)):
        raise ValueError(why)
    scores = row.get("scores", {})
    if not isinstance(scores, dict) or any(type(score) is not int for score in scores.values()):
        raise ValueError(f"scores must be a whole number for each dimension, got {scores}")
    return Side(Clip(str(place)), str(row.get("reasoning", "")), scores)


# ---- formulas


def preference_loss(chosen: Tensor, rejected: Tensor, tie: Tensor, kind: Loss = "bradley_terry") -> Tensor:
    """Of pairs of scores [n], with tie [n] bool; [n].

    bradley_terry: -log sigmoid(d), 0 for ties. margin: the same with d - 0.57. tie_aware (Rao and Kupper
    1967, k = 5): -log sigmoid(d - log k), and for a tie also -log sigmoid(-d - log k).
    """
    gap = chosen - rejected
    if kind == "tie_aware":
        return -F.logsigmoid(gap - TIE) - F.logsigmoid(-gap - TIE) * tie
    return -F.logsigmoid(gap - (MARGIN if kind == "margin" else 0.0)) * ~tie


def accuracy(said: Mapping[str, int] | None, scores: Mapping[str, int]) -> float:
    """The share of the labeled dimensions that a thought gives the right score; 0 without an answer."""
    if not scores:
        return 0.0
    return sum((said or {}).get(name) == score for name, score in scores.items()) / len(scores)


def length_reward(characters: int, step: int = 500) -> float:
    """0, .2, .4, .6 from 0, 1, 2, 3 steps of characters on, and 1 from 4 steps on."""
    steps = characters // step
    return 1.0 if steps >= 4 else 0.2 * steps


def thought_reward(text: str, scores: Mapping[str, int], step: int = 500) -> float:
    """What a thought on a video with these scores is worth, in [0, 1]."""
    said = answer_of(text)
    return 0.7 * accuracy(said, scores) + 0.1 * (said is not None) + 0.2 * length_reward(len(text), step)


def hidden_pairs(count: int, hide: float, draws: torch.Generator) -> list[bool]:
    """For each pair whether the reasoning of both its videos is hidden."""
    return (torch.rand(count, generator=draws) < hide).tolist()


# ---- training


@dataclass(frozen=True)
class ColdStart:
    """Stage 1; lr, warmup, hide, rank and alpha are the paper's, for a model of 8B."""

    steps: int = 1000
    batch: int = 16  # pairs of one update
    chunk: int = 16  # pairs in one forward; lower it for less memory
    lr: float = 2e-6  # raise it for small models and heads that begin from nothing
    warmup: float = 0.05  # share of the steps
    hide: float = 0.5  # pairs that are scored without reasoning; 0 trains no `think: false`
    loss: Loss = "bradley_terry"
    # Of minus the mean log-probability of a token of the given reasoning; 0 in the paper. Raise it where a
    # small model, at the rate that it needs, would forget how to write: stage 2 would find no thought to
    # reward.
    words: float = 0.0
    rank: int = 64
    alpha: int = 128
    seed: int = 0
    save_every: int = 50  # steps, of which a killed run loses the last ones

    def __post_init__(self) -> None:
        _positive("cold start", steps=self.steps, batch=self.batch, lr=self.lr, rank=self.rank)
        _positive("cold start", alpha=self.alpha, chunk=self.chunk, save_every=self.save_every)
        if not 0 <= self.hide <= 1 or not 0 <= self.warmup <= 1:
            raise ValueError(f"hide and warmup lie in 0..1, got {self.hide}, {self.warmup}")
        if self.words < 0:
            raise ValueError(f"words must be 0 or more, got {self.words}")
        if self.loss not in (known := get_args(Loss)):
            raise ValueError(f"loss must be one of {', '.join(known)}, got {self.loss!r}")


@dataclass(frozen=True)
class DualRL:
    """Stage 2; rollouts, lr, kl and weight are the paper's, for a model of 8B."""

    steps: int = 200
    batch: int = 8  # pairs whose videos are thought about before updates
    chunk: int = 8  # pairs in one forward, with all their thoughts; lower it for less memory
    rollouts: int = 8  # thoughts on each video
    minibatch: int = 2  # pairs of one update, with all their rollouts
    lr: float = 1e-6
    clip: float = 0.2
    kl: float = 1e-5  # raise it where thoughts lose their language
    weight: float = 5e-3  # of the preference loss
    length_step: int = 500  # characters of a fifth of the length reward; invites padding: watch `characters`
    seed: int = 0
    save_every: int = 10  # steps, of which a killed run loses the last ones

    def __post_init__(self) -> None:
        _positive("dual rl", steps=self.steps, batch=self.batch, lr=self.lr, minibatch=self.minibatch)
        _positive("dual rl", length_step=self.length_step, clip=self.clip, chunk=self.chunk)
        _positive("dual rl", save_every=self.save_every)
        if self.rollouts < 2:
            raise ValueError(f"rollouts are compared with each other: 2 or more, got {self.rollouts}")
        if self.kl < 0 or self.weight < 0:
            raise ValueError(f"kl and weight must be 0 or more, got {self.kl}, {self.weight}")


def _positive(stage: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{stage}: {name} must be above 0, got {number}")


class Student:
    """A judge that learns: adapters on its language model, its head, and the one row, all in fp32."""

    def __init__(self, judge: Thinker, rank: int, alpha: int, seed: int = 0) -> None:
        self.judge, self.rank, self.alpha = judge, rank, alpha
        self.targets = linears(judge.network, LINEAR)
        add_lora(judge.network, LoraSettings(rank, alpha), self.targets, seed)
        self.adapter = {name: p for name, p in judge.network.named_parameters() if p.requires_grad}
        judge.head.requires_grad_(True)
        judge.row.requires_grad_(True)
        self._inputs: dict[tuple[str, Clip], Inputs] = {}
        self._room = KEPT

    @property
    def learned(self) -> list[nn.Parameter]:
        return [*self.adapter.values(), self.judge.head.weight, self.judge.row]

    @classmethod
    def load(cls, folder: Path, model: str | None = None, precision: Precision = "fp32") -> Student:
        """What `save` wrote, to be trained further; model: where its base lies now."""
        judge = Thinker(settings_of(str(folder), model), precision)
        judge.take(folder)
        state, rank, alpha = adapter_of(folder)
        student = cls(judge, rank, alpha)
        live = {saved_name(name): p for name, p in student.adapter.items()}
        with torch.no_grad():
            take(live, state, folder)
        return student

    def save(self, folder: Path) -> None:
        """A folder that the reward `descore` reads; the adapter also loads in peft."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        said = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": self.targets,
            "base_model_name_or_path": self.judge.settings.model,
            "inference_mode": True,
        }
        (folder / ADAPTER_SAID).write_text(json.dumps(said, indent=2) + "\n")
        layers = {saved_name(name): p.detach().cpu().contiguous() for name, p in self.adapter.items()}
        save_file(layers, folder / ADAPTER, {"format": "pt"})
        self.judge.save(folder)  # last: without its settings a folder is no judge

    def asked(self, pairs: Sequence[Pair]) -> list[Inputs]:
        """What the judge reads of pairs, chosen and rejected in turn; it is kept as long as there is room."""
        found = []
        for pair in pairs:
            for side in pair.sides:
                name = (pair.prompt, side.video)
                inputs = self._inputs.get(name) or look(self.judge, *name)
                if name not in self._inputs and self._room > 0:
                    self._inputs[name] = inputs
                    self._room -= sum(tensor.nbytes for tensor in inputs.values())
                found.append(inputs)
        return found


def look(judge: Thinker, prompt: str, video: Clip) -> Inputs:
    """What a judge reads of a video and its prompt: the frames that the reward shows of it."""
    film = open_video(video, judge.settings.frames, shown_of)
    shown = torch.from_numpy(np.stack([np.asarray(frame) for frame in film.frames]))
    return judge.encode(shown.permute(0, 3, 1, 2).float() / 255, prompt)


def batches(pairs: Sequence[Pair], size: int, seed: int, purpose: str) -> Iterator[list[Pair]]:
    """Endless batches, every pair once in each round; smaller than `size` where there are fewer pairs."""
    order: list[int] = []
    for turn in range(2**31):
        draws = generator(seed, purpose, turn)
        order += torch.randperm(len(pairs), generator=draws).tolist()
        while len(order) >= min(size, len(pairs)):
            yield [pairs[i] for i in order[:size]]
            order = order[size:]


def cold_start(
    student: Student,
    pairs: Sequence[Pair],
    settings: ColdStart,
    log: Log = lambda row: None,
    folder: Path | None = None,
) -> None:
    """Stage 1: the head learns to score given thoughts, and videos without them.

    log is called after each step. folder: of the checkpoint from which a killed run goes on exactly; `log` is
    then first told of the steps that were done. ValueError where it was begun with other settings or pairs.
    """
    judge = student.judge
    if not any(side.reasoning for pair in pairs for side in pair.sides):
        raise ValueError("the cold start reads given reasoning, and no pair has any")
    for pair in pairs:
        if bool(pair.chosen.reasoning) != bool(pair.rejected.reasoning):
            raise ValueError(f"a pair needs reasoning on both videos or on none, and {pair.prompt!r} on one")
    given = {text: judge.spell(text) for text in {side.reasoning for pair in pairs for side in pair.sides}}
    warm = max(1, round(settings.warmup * settings.steps))

    def update(step: int, some: list[Pair], optimizer: torch.optim.Optimizer) -> Row:
        optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (step + 1) / warm)
        hidden = hidden_pairs(len(some), settings.hide, generator(settings.seed, "hide", step))
        thoughts = [
            Thought() if hide or not given[side.reasoning] else Thought(given[side.reasoning], judge.end)
            for pair, hide in zip(some, hidden, strict=True)
            for side in pair.sides
        ]
        tie = torch.tensor([pair.tie for pair in some], device=judge.network.device)
        count = max(1, sum(len(thought.tokens) + 1 for thought in thoughts if thought.tokens))
        scores, total, surprise = [], 0.0, 0.0
        for part in parts(len(some), settings.chunk):
            asked, told = student.asked(some[part]), thoughts[2 * part.start : 2 * part.stop]
            if settings.words:
                token, mask = laid_out(told, judge.network.device)
                log_prob, score = likely(judge, asked, told, token)
                unlikely = -torch.where(mask, log_prob, 0.0).sum() / count
            else:
                score = judge.read(asked, [thought.tokens for thought in told]).score
                unlikely = score.new_zeros(())
            score = score.reshape(-1, 2)
            loss = preference_loss(score[:, 0], score[:, 1], tie[part], settings.loss).sum() / len(some)
            (loss + settings.words * unlikely).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            surprise += unlikely.item()
            scores.append(score.detach())
        chosen, rejected = torch.cat(scores).unbind(1)
        row = {"loss": total, "right": share(chosen > rejected, ~tie), "norm": _step(optimizer, student)}
        return row | ({"surprise": surprise} if settings.words else {})

    _train(student, pairs, settings, "cold start", update, log, folder)


def dual_rl(
    student: Student,
    pairs: Sequence[Pair],
    settings: DualRL,
    log: Log = lambda row: None,
    folder: Path | None = None,
) -> None:
    """Stage 2: thoughts learn by their reward, the head by preferences on them; arguments as in stage 1."""
    judge = student.judge
    if lacking := next((pair for pair in pairs for side in pair.sides if not side.scores), None):
        raise ValueError(f"dual rl needs scores of both videos, and {lacking.prompt!r} has none")
    copies = Copies(nn.ParameterList(student.learned))
    copies.save(REFERENCE)

    def update(step: int, some: list[Pair], optimizer: torch.optim.Optimizer) -> Row:
        rolled = roll(student, some, settings, seed_of(settings.seed, "thoughts", step) % 2**31)
        found: list[Row] = []
        for minibatch in parts(len(some), settings.minibatch):
            whole = rolled.take(minibatch)
            for chunk in parts(len(whole.tie), settings.chunk):
                part, reference = whole.take(chunk), None
                if settings.kl:
                    with torch.no_grad(), copies.use(REFERENCE):
                        reference = likely(judge, part.asked, part.thoughts, part.token)[0]
                loss, row = dual_loss(judge, part, reference, settings, whole)
                loss.backward()  # type: ignore[no-untyped-call]
                found.append(row)
            found[-1]["norm"] = _step(optimizer, student)
        mean = {name: float(np.nanmean([row[name] for row in found if name in row])) for name in found[-1]}
        return {**rolled.measures, **mean}

    _train(student, pairs, settings, "dual rl", update, log, folder)


def _train(
    student: Student,
    pairs: Sequence[Pair],
    settings: ColdStart | DualRL,
    stage: str,
    update: Callable[[int, list[Pair], torch.optim.Optimizer], Row],
    log: Log,
    folder: Path | None,
) -> None:
    """The steps of a stage, from where its checkpoint stands.

    Every draw is keyed by its step, so that a checkpoint needs no generator.
    """
    optimizer = torch.optim.AdamW(student.learned, settings.lr, weight_decay=0.0)
    begun = _begun(student, pairs, settings, stage) if folder else {}
    state = TrainingState(folder, begun, student.learned, [optimizer], every=settings.save_every)
    rows = state.load()
    for row in rows:
        log(row)
    feed = islice(batches(pairs, settings.batch, settings.seed, stage), len(rows), None)
    for step in range(len(rows), settings.steps):
        rows.append({"step": step + 1, **update(step, next(feed), optimizer)})
        state.save(rows, last=step + 1 == settings.steps)
        log(rows[-1])


def _begun(
    student: Student, pairs: Sequence[Pair], settings: ColdStart | DualRL, stage: str
) -> dict[str, Any]:
    """By what a run is known again: all that its numbers depend on, places of files left aside."""
    told = [
        (pair.prompt, pair.tie, [(side.reasoning, sorted(side.scores.items())) for side in pair.sides])
        for pair in pairs
    ]
    known = {
        **asdict(student.judge.settings),
        **asdict(settings),
        "stage": stage,
        "precision": str(student.judge.network.dtype),
        "pairs": hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest(),
        "weights": fingerprint(student.learned),
    }
    return {name: value for name, value in known.items() if name not in ("model", "save_every")}


@dataclass(frozen=True)
class Rolled:
    """Thoughts on both videos of P pairs: rollout i on a side of pair p is row (2 p + side) * rollouts + i.

    asked, thoughts: [N]. advantage: [N]. tie: [P]. token, mask: [N, T], the thoughts with what ended them,
    True where there is one. old: [N, T], their log-probabilities as they were drawn.
    """

    asked: list[Inputs]
    thoughts: list[Thought]
    advantage: Tensor
    tie: Tensor
    token: Tensor
    mask: Tensor
    old: Tensor
    measures: Mapping[str, float]

    def take(self, pairs: slice) -> Rolled:
        """Some pairs, with all their thoughts."""
        each = len(self.asked) // len(self.tie)
        rows = slice(pairs.start * each, pairs.stop * each)
        return replace(
            self,
            asked=self.asked[rows],
            thoughts=self.thoughts[rows],
            advantage=self.advantage[rows],
            tie=self.tie[pairs],
            token=self.token[rows],
            mask=self.mask[rows],
            old=self.old[rows],
        )


@torch.no_grad()
def roll(student: Student, pairs: Sequence[Pair], settings: DualRL, seed: int) -> Rolled:
    """Draws thoughts at temperature 1 and compares those on one video with each other."""
    judge, count = student.judge, settings.rollouts
    asked = [one for one in student.asked(pairs) for _ in range(count)]
    sides = [side for pair in pairs for side in pair.sides for _ in range(count)]
    thoughts = []
    for part in parts(len(pairs), settings.chunk):
        rows = slice(2 * count * part.start, 2 * count * part.stop)
        thoughts += judge.think(asked[rows], 1.0, seed + part.start)
    texts = [judge.words(thought.tokens) for thought in thoughts]
    reward = torch.tensor(
        [
            thought_reward(text, side.scores, settings.length_step)
            for text, side in zip(texts, sides, strict=True)
        ]
    )
    group = torch.arange(len(sides)) // count
    advantage = zscore(reward[:, None], torch.ones(len(sides), 1, dtype=torch.bool), group, True)[:, 0]
    device = judge.network.device
    token, mask = laid_out(thoughts, device)
    old = torch.cat(
        [
            likely(judge, asked[i : i + count], thoughts[i : i + count], token[i : i + count])[0]
            for i in range(0, len(asked), count)
        ]
    )
    said = [answer_of(text) for text in texts]
    right = [accuracy(one, side.scores) for one, side in zip(said, sides, strict=True)]
    measures = {
        "reward": reward.mean().item(),
        "accuracy": sum(right) / len(right),
        "format": sum(one is not None for one in said) / len(said),
        "characters": sum(map(len, texts)) / len(texts),
        "cut_off": sum(thought.end is None for thought in thoughts) / len(thoughts),
    }
    tie = torch.tensor([pair.tie for pair in pairs], device=device)
    return Rolled(asked, thoughts, advantage.float().to(device), tie, token, mask, old, measures)


def laid_out(thoughts: Sequence[Thought], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask [N, T] of thoughts, each with the token that ended it."""
    rows = [[*one.tokens, *([] if one.end is None else [one.end])] for one in thoughts]
    length = max(1, *map(len, rows))
    token = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows], device=device)
    return token, mask


def likely(
    judge: Thinker, asked: Sequence[Inputs], thoughts: Sequence[Thought], token: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens [N, T] along thoughts, without meaning after their ends, and scores [N]."""
    reading = judge.read(asked, [thought.tokens for thought in thoughts], along=True)
    length = token.shape[1]
    hidden = F.pad(reading.hidden, (0, 0, 0, max(0, length - reading.hidden.shape[1])))[:, :length]
    return judge.log_probs(hidden, token), reading.score


def dual_loss(
    judge: Thinker, rolled: Rolled, reference: Tensor | None, settings: DualRL, whole: Rolled
) -> tuple[Tensor, Row]:
    """What some pairs add to L2 of the `whole` minibatch that they are from.

    reference: log-probabilities [N, T] of stage 1, None without a pull to it.
    """
    new, score = likely(judge, rolled.asked, rolled.thoughts, rolled.token)
    new = torch.where(rolled.mask, new, 0.0)
    old = torch.where(rolled.mask, rolled.old, 0.0)
    log_ratio = new - old
    loss = -clipped_gain(log_ratio, rolled.advantage[:, None], settings.clip, settings.clip)
    measures = {"ratio": log_ratio.detach().exp()[rolled.mask].mean().item()}
    if reference is not None:
        away = divergence(Evaluation(new), Evaluation(torch.where(rolled.mask, reference, 0.0)))
        loss = loss + settings.kl * away
        measures["kl"] = away.detach()[rolled.mask].mean().item()
    policy = loss[rolled.mask].sum() / whole.mask.sum()
    chosen, rejected = score.reshape(len(rolled.tie), 2, -1).unbind(1)
    preference = preference_loss(chosen, rejected, rolled.tie[:, None])
    measures |= {"preference": preference.mean().item(), "right": share(chosen > rejected, ~rolled.tie)}
    return policy + settings.weight * 2 * preference.sum() / len(whole.asked), measures


def share(right: Tensor, counts: Tensor) -> float:
    """Of True among the rows that count; nan where none does."""
    return right[counts].float().mean().item()


def parts(count: int, size: int) -> Iterator[slice]:
    """Slices of up to `size` that cover `count` rows."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def _step(optimizer: torch.optim.Optimizer, student: Student) -> float:
    norm = nn.utils.clip_grad_norm_(student.learned, 1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


# ---- what it is worth


@dataclass(frozen=True)
class Judgement:
    """Of one side of a pair: its scores with and without a thought, and the thought."""

    thought: float
    direct: float
    text: str


@torch.no_grad()
def judged(judge: Thinker, pairs: Sequence[Pair], batch: int = 16) -> list[tuple[Judgement, Judgement]]:
    """Greedy thoughts on both videos of each pair, and the raw scores; batch: videos at once."""
    rows: list[Judgement] = []
    sides = [(pair.prompt, side.video) for pair in pairs for side in pair.sides]
    for first in range(0, len(sides), batch):
        asked = [look(judge, *side) for side in sides[first : first + batch]]
        thoughts = [thought.tokens for thought in judge.think(asked)]
        with_, without = (judge.read(asked, some).score for some in (thoughts, [()] * len(asked)))
        texts = map(judge.words, thoughts)
        rows += map(Judgement, with_.tolist(), without.tolist(), texts)
    return list(zip(rows[::2], rows[1::2], strict=True))


def calibrated(judge: Thinker, pairs: Sequence[Pair], batch: int = 16) -> None:
    """Measures the mean and deviation of both kinds of score, by which the reward standardizes."""
    found = [one for both in judged(judge, pairs, batch) for one in both]
    scale = tuple(
        (float(np.mean(values)), max(float(np.std(values)), 1e-6))
        for values in ([one.thought for one in found], [one.direct for one in found])
    )
    judge.settings = replace(judge.settings, scale=(scale[0], scale[1]))


def evaluated(judge: Thinker, pairs: Sequence[Pair], batch: int = 16) -> dict[str, dict[str, float]]:
    """Shares of pairs in which the chosen video scores higher, by kind and in all; ties are left out.

    thought, direct: by the head with and without reasoning. words: by the sum of the scores that the thoughts
    name, equal ones counting as half. dimensions: share of right scores among those; answers: thoughts that
    name any. Without a kind there is but "all".
    """
    rows: dict[str, list[tuple[float, ...]]] = {}
    for pair, (chosen, rejected) in zip(pairs, judged(judge, pairs, batch), strict=True):
        if pair.tie:
            continue
        said = [answer_of(one.text) or {} for one in (chosen, rejected)]
        first, second = (sum(one.values()) for one in said)
        right = [accuracy(one, side.scores) for one, side in zip(said, pair.sides, strict=True)]
        row = (
            float(chosen.thought > rejected.thought),
            float(chosen.direct > rejected.direct),
            0.5 + 0.5 * float(np.sign(first - second)),
            sum(right) / 2,
            sum(map(bool, said)) / 2,
        )
        for name in {"all", pair.kind} - {""}:
            rows.setdefault(name, []).append(row)
    names = ("thought", "direct", "words", "dimensions", "answers")
    return {
        kind: {**dict(zip(names, np.mean(found, 0).tolist(), strict=True)), "pairs": float(len(found))}
        for kind, found in sorted(rows.items())
    }
