"""What the untouched model reaches by drawing more, and where a trained one lies beside it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign.charts import Line, figure
from mmalign.config import ConfigError
from mmalign.contracts import RewardModel, judges_alone
from mmalign.data import Prompt
from mmalign.evaluation import bootstrap, no_nan, spread
from mmalign.frontier import Frontier, Point, best_of_n, frontier, path_kl
from mmalign.pipelines.flow import FlowPolicy
from mmalign.subjects import chosen_prompts, make, open_policy, open_subject

BASE = "base"


@dataclass(frozen=True)
class Baseline:
    """The curves of the base model, and the trained model's point where the subject has one."""

    subject: str
    reward: str
    prompts: int
    left_out: int  # prompts with a draw that has no verdict
    draws: int
    steps: int
    frontier: Frontier
    trained: Point | None

    @property
    def points(self) -> list[Point]:
        return [*self.frontier.best_of_n, *self.frontier.tilted, *([self.trained] if self.trained else [])]

    def as_json(self) -> dict[str, Any]:
        fixed: dict[str, Any] = no_nan(asdict(self))
        return fixed


def measure(options: argparse.Namespace) -> Baseline:
    """Draw, judge and sum up, as the command line says."""
    sizes = sorted(set(options.n))
    if sizes[0] < 1 or sizes[-1] < 2:
        raise ConfigError(f"--n: numbers of draws to choose the best from, 1 or more, got {options.n}")
    if any(beta <= 0 for beta in options.betas):
        raise ConfigError(f"--betas must be positive, got {options.betas}")
    subject = open_subject(options.subject, options.overrides, options.rewards, options.lora)
    chooser, *watched = judges(make(subject.rewards))
    prompts = chosen_prompts(options.prompts, subject.prompts)
    count = subject.evaluation.prompts if options.count is None else options.count
    prompts = [prompts[place] for place in spread(len(prompts), count)]
    steps = options.steps or subject.evaluation.steps
    policy = open_policy(subject)
    drawn = best_of_n(policy, chooser, prompts, sizes[-1], steps, watched=watched)
    judged = torch.isfinite(drawn.rewards).all(1)
    if not judged.any():
        raise ConfigError(f"reward {chooser.name!r} has no verdict on some draw of every prompt")
    others = {name: values[judged] for name, values in drawn.watched.items()}
    curves = frontier(drawn.rewards[judged], options.betas, sizes, others)
    trained = None
    if subject.trained is not None:
        policy.copies.save(BASE)
        policy.load(subject.trained)
        trained = place_of(
            policy, chooser, watched, prompts, options.seeds or subject.evaluation.seeds, steps
        )
    silent = int((~judged).sum())
    return Baseline(options.subject, chooser.name, len(prompts), silent, sizes[-1], steps, curves, trained)


def judges(rewards: Sequence[RewardModel]) -> list[RewardModel]:
    """The rewards that can choose; the first one does."""
    able = [reward for reward in rewards if judges_alone(reward)]
    if not able:
        raise ConfigError(
            "best-of-n needs a reward that scores pictures one by one: --rewards NAME [NAME ...]"
        )
    return able


def place_of(
    policy: FlowPolicy,
    chooser: RewardModel,
    watched: Sequence[RewardModel],
    prompts: Sequence[Prompt],
    seeds: int,
    steps: int,
) -> Point:
    """The trained policy: mean rewards of single draws, and its divergence of paths from the base."""
    drawn = best_of_n(policy, chooser, prompts, seeds, steps, watched=watched)
    by_prompt = torch.where(drawn.rewards.isfinite(), drawn.rewards, math.nan).double().nanmean(1)
    kl = path_kl(policy, BASE, prompts, min(steps, 10))
    others: Mapping[str, float] = {name: float(v.double().nanmean()) for name, v in drawn.watched.items()}
    low, high = bootstrap(by_prompt)
    return Point(
        "trained", float(by_prompt.nanmean()), low, high, float(kl.mean()), float(seeds), None, others
    )


def plot(found: Baseline) -> str:
    """Reward over the square root of the divergence, as an SVG file."""

    def line(name: str, points: Sequence[Point], bound: bool = False) -> Line:
        kl = [point.kl_bound if bound and point.kl_bound is not None else point.kl for point in points]
        return Line(name, [math.sqrt(max(0.0, k)) for k in kl], [point.reward for point in points], dots=True)

    lines = [
        line("best of n", found.frontier.best_of_n),
        line("best of n, bound", found.frontier.best_of_n, bound=True),
        line("tilted", found.frontier.tilted),
    ]
    if found.trained:
        lines.append(line("trained (paths)", [found.trained]))
    return figure(lines, f"{found.reward}: the base model's frontier", "root of the KL from the base, nats")


def print_table(found: Baseline) -> None:
    from rich.console import Console
    from rich.table import Table

    from mmalign.report import between, short

    names = list(dict.fromkeys(name for point in found.points for name in point.watched))
    caption = f"{found.prompts - found.left_out} prompts, {found.draws} draws each; KL in nats"
    if found.left_out:
        caption += f"; {found.left_out} prompts left out, which have draws without a verdict"
    table = Table("", found.reward, "KL", "KL at most", *names, caption=caption)
    for point in found.points:
        table.add_row(
            point.name,
            f"{short(point.reward)} {between(point.low, point.high)}",
            short(point.kl),
            short(point.kl_bound),
            *(short(point.watched.get(name)) for name in names),
        )
    Console().print(table)


def write(found: Baseline, out: Path) -> list[Path]:
    """The numbers as JSON and the plot beside them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    written = [out.with_suffix(".json"), out.with_suffix(".svg")]
    written[0].write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
    written[1].write_text(plot(found), encoding="utf-8")
    return written
