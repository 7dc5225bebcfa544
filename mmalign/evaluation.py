"""How good a policy, or a folder of pictures, is in the eyes of a set of rewards; with confidence intervals.

A score is the mean over prompts of the mean over seeds. Its 95 % interval is a percentile bootstrap over
prompts, because seeds of one prompt say little of what other prompts would give. Base and trained see the
same prompts and the same initial noise, so their difference is bootstrapped in pairs.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mmalign import claims_page
from mmalign.claims_page import Told
from mmalign.contracts import (
    Forwards,
    Key,
    KnowsReferences,
    Media,
    Reward,
    RewardModel,
    Writes,
    judges_alone,
)
from mmalign.data import Prompt
from mmalign.distances import Distances, Extract, compare, extracted, kid_parts
from mmalign.grids import CELL, Panel, fit, from_pil
from mmalign.pictures import open_picture, still
from mmalign.randomness import generator
from mmalign.records import Outcome, Prompts
from mmalign.scoring import judge as ask
from mmalign.tracking import write_whole

RESAMPLES = 2000
POOLED = 16  # diversity looks at pictures of this size
KID = "kid"  # score of pictures beside references, in the features that were asked for; less is better
ANSWERED = "answered"  # score of captioners: share of the questions about a picture that are answered rightly
FAMILIAR = "reference_log_prob"  # score of policies that know references: minus their held-out token loss
LINE = 30  # letters of a line under a picture


@dataclass(frozen=True)
class EvaluationSettings:
    """Held-out pictures of the base and the trained policy by the plain ODE, or texts as they are sampled."""

    prompts: int = (
        64  # how many held-out prompts, evenly from the file; 0: all. Raise it for tighter intervals
    )
    seeds: int = 4  # pictures a prompt; at least 2 to measure diversity
    steps: int = 20  # denoising steps
    guidance: float | None = None  # classifier-free guidance; null: that of the policy
    batch: int = 64  # pictures at once; lower it for less memory
    every: int = 0  # also score during training every n iterations; 0: only before and after
    grid_every: int = 20  # draw the sample grid every n iterations; 0: only before and after
    show: int = 6  # prompts in the sample grids
    show_seeds: int = 3  # pictures of each in the grids
    # Share of the steps, from the noise on, that the trained model takes; the base model takes the others
    # (MixGRPO's hybrid inference). Lower it, usually to 0.8, against over-optimized detail. Needs LoRA.
    tuned: float = 1.0
    # Of the questions that a captioner's prompt lines bring, how many are asked of each picture: whether it
    # still can what it could (`answered`). 0: none.
    questions: int = 1
    # A folder, zip or .tar of pictures that the drawn ones are to look like: measure KID (the score `kid`,
    # less is better), precision and recall.
    references: str | None = None
    features: str = "pixels"  # what these are measured in: pixels, efficientnet, or an image model's folder
    average: bool = False  # also evaluate the moving average of the parameters, where training keeps one
    seed: int = 0  # of the initial noise; the same for base and trained

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch", "show", "show_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.tuned <= 1:
            raise ValueError(f"tuned is a share between 0 and 1, got {self.tuned}")
        for name in ("prompts", "every", "grid_every", "questions"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class Gathers(Protocol):
    """What the processes of a run tell each other."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gather(self, rows: Tensor) -> Tensor: ...

    def gather_objects(self, items: Sequence[Any]) -> list[Any]: ...


class Alone:
    """The only process."""

    rank, world = 0, 1

    def gather(self, rows: Tensor) -> Tensor:
        return rows.cpu()

    def gather_objects(self, items: Sequence[Any]) -> list[Any]:
        return list(items)


class Draws(Protocol):
    """A policy that draws pictures without recording actions."""

    forwards: Forwards

    def images(
        self,
        prompts: Prompts,
        steps: int,
        key: Key,
        guidance: float | None = None,
        tuned: float = 1.0,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Score:
    """A mean over prompts with its 95 % interval."""

    mean: float
    low: float
    high: float
    prompts: int
    images: int


@dataclass(frozen=True)
class Verdict:
    """All that the rewards said of one sample: values by name (NaN: no verdict), and the kind of task."""

    values: Mapping[str, float]
    category: str = ""
    text: str = ""
    claims: tuple[Mapping[str, Any], ...] = ()  # of a text, as the rewards that judge claims tell them

    def said(self, names: Sequence[str]) -> str:
        """What stands under the picture: the text that was written about it, and a line a reward."""
        scores = [f"{name} {self.values[name]:.2f}" for name in names if math.isfinite(self.values[name])]
        return "\n".join([*textwrap.wrap(self.text, LINE), *scores])


@dataclass(frozen=True)
class Evaluated:
    """The scores of one set of pictures, and what is needed to compare it with another."""

    scores: Mapping[str, Score]
    categories: Mapping[str, Mapping[str, Score]]  # score -> category -> Score
    diversity: float | None
    by_prompt: Mapping[str, list[float]] = field(
        default_factory=dict
    )  # score -> mean of each prompt, NaN: none
    seconds: float = 0.0
    forwards: int = 0
    prompts: list[str] = field(default_factory=list)  # in the order of by_prompt
    distances: Distances | None = None  # to reference pictures, where there are some

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(no_nan(asdict(self)), indent=1))

    @staticmethod
    def load(path: Path) -> Evaluated:
        return Evaluated.of(json.loads(path.read_text(encoding="utf-8")))

    @staticmethod
    def of(raw: Mapping[str, Any]) -> Evaluated:
        """From what `asdict` and JSON made of one."""
        distances = raw.get("distances")
        return Evaluated(
            scores={k: score_of(v) for k, v in raw["scores"].items()},
            categories={k: {c: score_of(s) for c, s in v.items()} for k, v in raw["categories"].items()},
            diversity=raw["diversity"],
            by_prompt={k: [math.nan if x is None else x for x in v] for k, v in raw["by_prompt"].items()},
            seconds=raw["seconds"],
            forwards=raw["forwards"],
            prompts=list(raw.get("prompts", [])),
            distances=Distances(**{**distances, "kid_interval": tuple(distances["kid_interval"])})
            if distances
            else None,
        )


def score_of(raw: Mapping[str, Any]) -> Score:
    """A score as JSON holds it, where NaN is null."""
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in raw.items()}
    return Score(**values)


def no_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON lacks."""
    if isinstance(value, Mapping):
        return {k: no_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [no_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Drawing and judging


def spread(size: int, count: int) -> list[int]:
    """`count` places evenly over 0..size-1 (all of them if count is 0 or too large)."""
    if not count or count >= size:
        return list(range(size))
    return [i * size // count for i in range(count)]


def repeat(prompts: Sequence[Prompt], places: Sequence[int], seeds: int) -> Prompts:
    """The prompts at `places` `seeds` times each: group = place of the prompt, member = seed."""
    return Prompts(
        [prompts[place].text for place in places for _ in range(seeds)],
        torch.tensor(places, dtype=torch.int64).repeat_interleave(seeds),
        torch.arange(seeds).repeat(len(places)),
        [prompts[place].extra for place in places for _ in range(seeds)],
    )


def batches(count: int, size: int) -> list[Tensor]:
    """0..count-1 in parts of at most `size`."""
    return [torch.arange(first, min(first + size, count)) for first in range(0, count, size)]


def familiar(policy: Draws | Writes, prompts: Prompts, settings: EvaluationSettings) -> list[float] | None:
    """`reference_log_prob` of each prompt; None where the policy cannot tell or a prompt has no reference."""
    known = all(isinstance(extra.get("reference"), str) for extra in prompts.extra)
    if not isinstance(policy, KnowsReferences) or not known:
        return None
    before = policy.forwards.reference
    each, place = torch.unique(prompts.group, return_inverse=True)  # seeds of a prompt share its reference
    firsts = torch.stack([(prompts.group == number).nonzero()[0, 0] for number in each])
    found = [
        policy.reference_log_prob(prompts.take(firsts[rows])) for rows in batches(len(each), settings.batch)
    ]
    policy.forwards.reference = before
    said: list[float] = torch.cat(found)[place].tolist()
    return said


def answered(policy: Draws | Writes, prompts: Prompts, settings: EvaluationSettings) -> list[float] | None:
    """Share of its questions that are answered rightly, of each prompt.

    None where the policy does not write or a prompt brings no `questions`, a list of {question, choices,
    answer}.
    """
    asked = [extra.get("questions") for extra in prompts.extra]
    if not isinstance(policy, Writes) or not settings.questions or not all(asked):
        return None
    each, place = torch.unique(prompts.group, return_inverse=True)  # seeds of a prompt share its questions
    rows: list[tuple[int, int, Mapping[str, Any]]] = []
    for number in each.tolist():
        first = int((prompts.group == number).nonzero()[0, 0])
        questions: Any = asked[first]
        rows += [(number, first, one) for one in questions[: settings.questions]]
    texts = [f"{one['question']} {listed(one['choices'])}?" for _, _, one in rows]
    numbers = torch.tensor([number for number, _, _ in rows])
    member = torch.tensor([sum(n == number for n, _, _ in rows[:i]) for i, (number, _, _) in enumerate(rows)])
    put = Prompts(texts, numbers, member, [prompts.extra[first] for _, first, _ in rows])
    before = policy.forwards.sample  # those counts are of training
    said = [
        text
        for part in batches(len(put), settings.batch)
        for text in policy.texts(put.take(part), (settings.seed, "questions"))
    ]
    policy.forwards.sample = before
    right = [
        is_right(text, one["choices"], one["answer"]) for text, (_, _, one) in zip(said, rows, strict=True)
    ]
    share = torch.zeros(len(each)).index_add(
        0, torch.searchsorted(each, numbers), torch.tensor(right).float()
    )
    share /= torch.bincount(torch.searchsorted(each, numbers), minlength=len(each))
    found: list[float] = share[place].tolist()
    return found


def listed(choices: Sequence[str]) -> str:
    """a, b or c."""
    return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else "".join(choices)


def is_right(text: str, choices: Sequence[str], answer: str) -> bool:
    """Whether a text names the answer and no other choice; a choice inside a longer one is not named."""
    named = [c for c in choices if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text, re.I)]
    longest = [c for c in named if not any(c != other and c.lower() in other.lower() for other in named)]
    return longest == [answer]


def draw(policy: Draws | Writes, prompts: Prompts, settings: EvaluationSettings) -> Media:
    """Pictures [B, 3, H, W] on the CPU, or B texts; each depends on its group and member, not on others."""
    key: Key = (settings.seed, "evaluation")
    before = policy.forwards.sample  # those counts are of training
    if isinstance(policy, Writes):
        texts = [
            text
            for rows in batches(len(prompts), settings.batch)
            for text in policy.texts(prompts.take(rows), key)
        ]
        policy.forwards.sample = before
        return texts
    parts = [
        policy.images(prompts.take(rows), settings.steps, key, settings.guidance, settings.tuned)
        .float()
        .cpu()
        for rows in batches(len(prompts), settings.batch)
    ]
    policy.forwards.sample = before
    return torch.cat(parts)


def chosen(media: Media, rows: Tensor) -> Media:
    """The samples at `rows` [b] (int64)."""
    return media[rows] if isinstance(media, Tensor) else [media[row] for row in rows.tolist()]


def verdicts(
    rewards: Sequence[RewardModel], prompts: Prompts, media: Media, batch: int = 64
) -> list[Verdict]:
    """Ask every reward about every picture or text; one verdict each.

    A reward gives its mean over units under its own name, and every number in its details under the name
    there (with the reward's name before it if two rewards use the same one). Of one that has no verdict on
    some samples a RuntimeWarning tells why.
    """
    found: list[dict[str, float]] = [{} for _ in range(len(prompts))]
    claims: list[tuple[Mapping[str, Any], ...]] = [()] * len(prompts)
    category = [str(extra.get("category") or "") for extra in prompts.extra]
    taken = {reward.name: "" for reward in rewards}
    for reward in rewards:
        silent: Counter[str] = Counter()
        for rows in batches(len(prompts), batch):
            signal, reasons = ask(reward, Outcome(prompts.take(rows), chosen(media, rows)))
            silent += reasons
            for i, (row, mean) in enumerate(zip(rows.tolist(), signal.mean.tolist(), strict=True)):
                found[row][reward.name] = mean
                detail = signal.details[i] if signal.details else {}
                for name, value in detail.items():
                    if isinstance(value, bool | int | float):
                        own = taken.setdefault(name, reward.name) == reward.name
                        found[row][name if own else f"{reward.name}.{name}"] = float(value)
                category[row] = str(detail.get("category") or "") or category[row]
                told = detail.get("claims")
                if isinstance(told, list):
                    claims[row] = (*claims[row], *told)
        if silent:
            said = "; ".join(f"{count} x {reason}" for reason, count in silent.most_common(3))
            warnings.warn(
                f"reward {reward.name!r} has no verdict for {silent.total()} of {len(prompts)} samples "
                f"({said}). Its scores are those of the others.",
                RuntimeWarning,
                stacklevel=2,
            )
    rows_of = zip(found, category, claims, strict=True)
    return [Verdict(values, kind, claims=told) for values, kind, told in rows_of]


# Scores


def prompt_means(values: Tensor, group: Tensor) -> Tensor:
    """Mean over the samples of each prompt, [B] -> [N] in the order of the groups; NaN where none counts."""
    place = {number: n for n, number in enumerate(sorted(set(group.tolist())))}
    index = torch.tensor([place[number] for number in group.tolist()], dtype=torch.int64)
    count = len(place)
    good = torch.isfinite(values)
    total = torch.zeros(count, dtype=torch.float64).index_add(
        0, index, torch.where(good, values.double(), 0.0)
    )
    return total / torch.zeros(count, dtype=torch.float64).index_add(0, index, good.double())


def bootstrap(means: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the mean of `means` [N], resampled with replacement."""
    means = means[torch.isfinite(means)]
    if len(means) < 2:
        return math.nan, math.nan
    picks = torch.randint(len(means), (resamples, len(means)), generator=generator(seed, "bootstrap"))
    low, high = means[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def score(values: Tensor, group: Tensor) -> Score:
    means = prompt_means(values, group)
    known = means[torch.isfinite(means)]
    low, high = bootstrap(means)
    mean = float(known.mean()) if len(known) else math.nan
    return Score(mean, low, high, len(known), int(torch.isfinite(values).sum()))


def gain(base: Evaluated, trained: Evaluated, name: str) -> Score:
    """Trained minus base, prompt by prompt; nobody's luck with easy prompts counts."""
    before, after = paired(base, trained, name)
    return score(after - before, torch.arange(len(before)))


def wins(base: Evaluated, trained: Evaluated, name: str) -> Score:
    """Share of the prompts on which trained is better than base; equal ones count 1/2."""
    before, after = paired(base, trained, name)
    return score((torch.sign(after - before) + 1) / 2, torch.arange(len(before)))


def paired(base: Evaluated, trained: Evaluated, name: str) -> tuple[Tensor, Tensor]:
    """A score of either by prompt, [N] each; ValueError where the prompts are not the same."""
    before = torch.tensor(base.by_prompt[name], dtype=torch.float64)
    after = torch.tensor(trained.by_prompt[name], dtype=torch.float64)
    if len(before) != len(after) or (base.prompts and trained.prompts and base.prompts != trained.prompts):
        raise ValueError(
            f"{name}: base has {len(before)} prompts and trained {len(after)}, or they differ; evaluate both "
            "alike"
        )
    return before, after


def pooled(media: Tensor) -> Tensor:
    """Pictures or the frames of videos, by area, [B, channels, 16, 16]; what was pooled stays as it is."""
    return adaptive_avg_pool2d(media.flatten(1, -3), POOLED)


def diversity(images: Tensor, group: Tensor) -> float | None:
    """How much the pictures of one prompt differ: mean over prompts of the mean distance between two of them.

    images: [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]; group: [B]. Pictures, or frames, are pooled to 16 x 16
    by area; a distance is the root of the mean square over pixels and channels. 0: all seeds give one
    picture. None: no prompt has two.
    """
    small = pooled(images.float()).flatten(1).double()
    distances = []
    for number in sorted(set(group.tolist())):
        members = small[group == number]
        if len(members) > 1:
            distances.append(torch.pdist(members).mean() / math.sqrt(members.shape[1]))
    return float(torch.stack(distances).mean()) if distances else None


def wording(texts: Sequence[str], group: Tensor) -> float | None:
    """How much the texts of one prompt differ: mean over prompts of the mean distance between two of them.

    The distance of two texts is 1 minus the share of their words that both have (Jaccard). 0: all seeds give
    the same words. None: no prompt has two.
    """
    words = [set(text.lower().split()) for text in texts]
    distances = []
    for number in sorted(set(group.tolist())):
        members = [words[row] for row in (group == number).nonzero()[:, 0].tolist()]
        pairs = [(a, b) for i, a in enumerate(members) for b in members[:i]]
        if pairs:
            apart = [1 - len(a & b) / max(1, len(a | b)) if a | b else 0.0 for a, b in pairs]
            distances.append(sum(apart) / len(apart))
    return sum(distances) / len(distances) if distances else None


def summarize(found: Sequence[Verdict], media: Media, group: Tensor) -> Evaluated:
    """Scores over all prompts and over those of each category; media are for the diversity."""
    names = list(dict.fromkeys(name for verdict in found for name in verdict.values))
    values = {
        name: torch.tensor([verdict.values.get(name, math.nan) for verdict in found], dtype=torch.float64)
        for name in names
    }
    kinds = sorted({verdict.category for verdict in found if verdict.category})
    of_kind = {kind: torch.tensor([verdict.category == kind for verdict in found]) for kind in kinds}
    return Evaluated(
        scores={name: score(column, group) for name, column in values.items()},
        categories={
            name: {kind: score(column[rows], group[rows]) for kind, rows in of_kind.items()}
            for name, column in values.items()
            if kinds
        },
        diversity=diversity(media, group) if isinstance(media, Tensor) else wording(media, group),
        by_prompt={name: prompt_means(column, group).tolist() for name, column in values.items()},
    )


def described(prompts: Prompts) -> Tensor:
    """The pictures that the prompts ask about, [B, 3, side, side], on white where they are not square."""
    side = CELL
    sheet = torch.ones(len(prompts), 3, side, side)
    for row, extra in enumerate(prompts.extra):
        picture = still(extra)
        if picture is None:
            continue
        picture.thumbnail((side, side))
        pixels = from_pil(fit(picture, side) if picture.width <= side // 2 else picture)[:, :side, :side]
        sheet[row, :, : pixels.shape[1], : pixels.shape[2]] = pixels
    return sheet


@dataclass(frozen=True)
class Shown:
    """The pictures that go into grids, [len(prompts) * seeds, 3, H, W], prompt by prompt, with captions."""

    prompts: list[str]
    images: Tensor
    captions: list[str]
    told: list[Told] = field(default_factory=list)  # of a captioner: its texts with their claims
    sources: Tensor | None = (
        None  # of an editor: the first picture that each prompt edits, [len(prompts), ...]
    )

    def panel(self, title: str) -> Panel:
        return Panel(title, self.images, self.captions)

    def before(self) -> list[Panel]:
        """A panel of what is edited, where there is something."""
        return [] if self.sources is None else [Panel("source", self.sources)]

    def save(self, path: Path) -> None:
        pixels = (self.images.clamp(0, 1) * 255).round().byte()
        raw = {"prompts": self.prompts, "images": pixels, "captions": self.captions}
        torch.save(raw if self.sources is None else raw | {"sources": self.sources}, path)
        if self.told:
            claims_page.save(self.told, claims_of(path))

    @staticmethod
    def load(path: Path) -> Shown:
        raw = torch.load(path, weights_only=True)
        told = claims_page.load(claims_of(path)) if claims_of(path).is_file() else []
        return Shown(raw["prompts"], raw["images"].float() / 255, raw["captions"], told, raw.get("sources"))


def sources_of(prompts: Sequence[Prompt]) -> Tensor | None:
    """The first picture that each prompt names as its source, [N, 3, CELL, CELL]; None without any."""
    named = [prompt.extra.get("source") for prompt in prompts]
    files = [names[0] if isinstance(names, list) and names else names for names in named]
    if not prompts or not all(isinstance(file, str) for file in files):
        return None
    shown = [fit(open_picture(str(file))) for file in files]
    return torch.stack([from_pil(picture.resize((CELL, CELL))) for picture in shown])


def claims_of(path: Path) -> Path:
    """Where the texts and claims lie that belong to an evaluation."""
    return path.with_name(f"{path.stem}_claims.json")


def beside(found: Evaluated, features: Tensor, group: Tensor, references: Tensor) -> Evaluated:
    """The same with distances to references [m, D], by the features [B, D] of the pictures of `group` [B]."""
    parts = kid_parts(features, references)
    return replace(
        found,
        distances=compare(features, group, references),
        scores={**found.scores, KID: score(parts, group)},
        by_prompt={**found.by_prompt, KID: prompt_means(parts, group).tolist()},
    )


class Evaluator:
    """Draws and judges the same prompts from the same noise whenever asked; processes share the work."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        rewards: Sequence[Reward],
        settings: EvaluationSettings,
        distributed: Gathers,
        extract: Extract | None = None,
        references: Tensor | None = None,
    ) -> None:
        """extract, references: how features are seen, and those of references [m, D] to compare with."""
        self.extract, self.references = extract, references
        self.prompts = [prompts[place] for place in spread(len(prompts), settings.prompts)]
        # A judge of pairs has no verdict on a picture by itself.
        self.rewards = [reward for reward in rewards if judges_alone(reward)]
        self.settings, self.distributed = settings, distributed
        self.on_grid = spread(len(self.prompts), min(settings.show, len(self.prompts)))

    def scores(self, policy: Draws | Writes) -> tuple[Evaluated, Shown]:
        """All prompts and seeds."""
        began = time.perf_counter()
        places = list(range(len(self.prompts)))
        images, found, group, small, features = self._run(policy, places, self.settings.seeds)
        result = replace(summarize(found, small, group), prompts=[prompt.text for prompt in self.prompts])
        if self.references is not None:
            result = beside(result, features, group, self.references)
        seeds = min(self.settings.seeds, self.settings.show_seeds)
        shown = self._shown(images, found, self.on_grid, self.settings.seeds, seeds)
        seconds = time.perf_counter() - began
        return replace(
            result, seconds=seconds, forwards=len(places) * self.settings.seeds * self.settings.steps
        ), shown

    def quantiles(self, policy: Draws | Writes, quantile: float) -> dict[str, dict[str, float]]:
        """Of the rewards over the seeds of each prompt: references that training can be compared with."""
        if not 0 <= quantile <= 1:
            raise ValueError(f"a quantile lies in [0, 1], got {quantile}")
        _, found, group, _, _ = self._run(policy, list(range(len(self.prompts))), self.settings.seeds)
        names = [reward.name for reward in self.rewards]
        table: dict[str, dict[str, float]] = {}
        for place, prompt in enumerate(self.prompts):
            rows = [found[i] for i in (group == place).nonzero().flatten().tolist()]
            values = {name: torch.tensor([row.values[name] for row in rows]).double() for name in names}
            table[prompt.text] = {n: float(v.nanquantile(quantile)) for n, v in values.items()}
        return table

    def grid(self, policy: Draws | Writes) -> Shown:
        """Only what the grids show."""
        seeds = min(self.settings.seeds, self.settings.show_seeds)
        images, found, _, _, _ = self._run(policy, self.on_grid, seeds)
        return self._shown(images, found, self.on_grid, seeds, seeds)

    def _run(
        self, policy: Draws | Writes, places: list[int], seeds: int
    ) -> tuple[dict[int, Tensor], list[Verdict], Tensor, Media, Tensor]:
        """Pictures of the grid's prompts by place, verdicts, prompt of each; small pictures, or all texts;
        features.

        What is written about a picture is shown under it.
        """
        share = -(
            -len(places) // self.distributed.world
        )  # every rank takes equally many, or they would wait for ever
        first = self.distributed.rank * share
        mine = [places[(first + i) % len(places)] for i in range(share)]
        prompts = repeat(self.prompts, mine, seeds)
        media = draw(policy, prompts, self.settings)
        count = len(places) * seeds  # beyond it prompts come a second time
        judged = verdicts(self.rewards, prompts, media)
        if (likely := familiar(policy, prompts, self.settings)) is not None:
            judged = [
                replace(verdict, values={**verdict.values, FAMILIAR: value})
                for verdict, value in zip(judged, likely, strict=True)
            ]
        if (right := answered(policy, prompts, self.settings)) is not None:
            judged = [
                replace(verdict, values={**verdict.values, ANSWERED: value})
                for verdict, value in zip(judged, right, strict=True)
            ]
        found = self.distributed.gather_objects(judged)[:count]
        group = self.distributed.gather(prompts.group)[:count]
        features = torch.zeros(len(prompts), 0)
        if self.extract is not None and self.references is not None:
            if not isinstance(media, Tensor) or media.ndim != 4:
                does = "draws videos" if isinstance(media, Tensor) else "writes"
                raise ValueError(f"distances to reference pictures are of pictures, and this model {does}")
            features = extracted(self.extract, media, self.settings.batch)
        features = self.distributed.gather(features)[:count]
        keep = torch.tensor([g in self.on_grid for g in prompts.group.tolist()], dtype=torch.bool)
        small: Media
        if isinstance(media, Tensor):
            small = self.distributed.gather(pooled(media))[:count]
            kept = self.distributed.gather(media[keep])
        else:
            small = self.distributed.gather_objects(media)[:count]
            found = [replace(verdict, text=text) for verdict, text in zip(found, small, strict=True)]
            kept = self.distributed.gather(described(prompts.take(keep.nonzero()[:, 0])))
        owner = self.distributed.gather(prompts.group[keep]).tolist()
        of_place: dict[int, list[Tensor]] = {}
        for place, image in zip(owner, kept, strict=True):
            of_place.setdefault(place, []).append(image)
        return (
            {place: torch.stack(rows[:seeds]) for place, rows in of_place.items()},
            found,
            group,
            small,
            features,
        )

    def _shown(
        self, images: Mapping[int, Tensor], found: Sequence[Verdict], places: list[int], seeds: int, show: int
    ) -> Shown:
        """The first `show` seeds of the prompts on the grid; `found` has `seeds` verdicts a prompt."""
        names = [reward.name for reward in self.rewards][:2]
        of_all = len(found) == len(self.prompts) * seeds
        row = {place: place if of_all else n for n, place in enumerate(places)}
        captions = [found[row[place] * seeds + seed].said(names) for place in places for seed in range(show)]
        return Shown(
            [self.prompts[place].text for place in places],
            torch.cat([images[place][:show] for place in places]),
            captions,
            [self._told(p, v, names) for p in places if (v := found[row[p] * seeds]).text],
            sources_of([self.prompts[place] for place in places]),
        )

    def _told(self, place: int, verdict: Verdict, names: Sequence[str]) -> Told:
        """The text of the first seed about a prompt's picture."""
        extra = self.prompts[place].extra
        image = extra.get("image")
        values = {name: v for name in names if math.isfinite(v := verdict.values[name])}
        return Told(
            verdict.text,
            image if isinstance(image, str) else None,
            str(extra.get("reference") or ""),
            claims_page.marks(verdict.claims, verdict.text),
            values,
        )
