"""Experiments: arms that are run on an equal budget, and the claims that they are run for.

An experiment is a YAML file (assets/experiments/). An arm is any recipe with settings put over it. The
budget is counted in forwards of the network, so that methods of unequal iterations are comparable:

    sample + 3 train + reference        a backward counts two forwards

Every arm is run once per seed into a folder of its own. A run that is finished is not run again, one that was
broken off goes on. All arms that begin with the same model see it evaluated once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmalign import assembly, checkpoints, report
from mmalign.config import ConfigError, RunConfig, load_config, nearest, parse_yaml, recipe, section
from mmalign.evaluation import Alone, EvaluationSettings, Evaluator, spread
from mmalign.frontier import path_kl
from mmalign.subjects import chosen_prompts, make, open_policy, open_subject, seen_references
from mmalign.tracking import METRICS

KL_PROMPTS, KL_STEPS = 64, 10  # how many held-out prompts the divergence is measured on, by how many steps
NOTHING = "nothing"  # what an arm is compared with where its own number is meant
STOPPED = 143  # as a shell says of a process that SIGTERM ended
KL, BASE_FILES = "kl.json", (f"{report.BASE}.pt", f"{report.BASE}.json")


@dataclass(frozen=True)
class Budget:
    """What every run may spend, by one of the two; with neither an arm has the iterations of its recipe."""

    forwards: int = 0  # of training: sample + 3 train + reference; the iterations of an arm follow from it
    iterations: int = 0  # the same for all arms, whatever they cost

    def __post_init__(self) -> None:
        if min(self.forwards, self.iterations) < 0 or (self.forwards and self.iterations):
            raise ValueError(
                f"budget needs a positive number of forwards or of iterations, not both, got "
                f"forwards={self.forwards}, iterations={self.iterations}"
            )


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared."""

    recipe: str  # name of a recipe, or its file
    set: tuple[str, ...] = ()  # section.field=value, put over the recipe and what all arms have in common


@dataclass(frozen=True)
class Comparison:
    """A number of one arm less that of another; it holds where its whole interval lies above `by`."""

    # What is compared, a path: heldout/SCORE of the trained policy; heldout@NAME/SCORE under one of the extra
    # evaluations; forwards_to/SCORE and seconds_to/SCORE, what `than` spent over what the arm needs for the
    # final score of `than`; report/DOTTED.PATH, a number of report.json; metrics/NAME, the mean of its last
    # tenth in metrics.jsonl, and least/NAME, the least that it ever was; kl, of the path to the base model.
    metric: str
    arm: str
    than: str = "base"  # another arm, base: what the arm began with, or nothing: the number itself is meant
    by: float = 0.0  # how much more it must be; 1 is as dear as the other in forwards_to and seconds_to
    lower: bool = False  # less is better: the sign of the difference is turned
    at: Literal["end", "seconds"] = "end"  # seconds: when the faster of the two had ended

    def __post_init__(self) -> None:
        kind, _, name = self.metric.partition("/")
        if kind.partition("@")[0] not in KINDS or (not name and kind != "kl"):
            raise ValueError(f"metric must be {' or '.join(PATHS)}, got {self.metric!r}")
        if self.than == report.BASE and kind.partition("@")[0] != "heldout":
            raise ValueError(
                f"{self.metric} is compared with another arm, or with {NOTHING}: set than (the base has none)"
            )
        if self.than == NOTHING and (kind in ("forwards_to", "seconds_to") or self.at != "end"):
            raise ValueError(f"{self.metric}, at {self.at}, needs another arm: than={NOTHING} is none")


PATHS = (
    "heldout/SCORE",
    "heldout@NAME/SCORE",
    "forwards_to/SCORE",
    "seconds_to/SCORE",
    "report/PATH",
    "metrics/NAME",
    "least/NAME",
    "kl",
)
KINDS = ("heldout", "forwards_to", "seconds_to", "report", "metrics", "least", "kl")


@dataclass(frozen=True)
class Claim:
    """A sentence that is shown if all of its comparisons hold."""

    text: str  # what is claimed
    holds: tuple[Comparison, ...]  # what would show it
    source: str = ""  # who claims it


@dataclass(frozen=True)
class Experiment:
    """Arms, what they may spend, and what they are to show."""

    title: str
    question: str  # what is asked, and what the answer rests on
    arms: Mapping[str, Arm]
    budget: Budget = Budget()
    claims: tuple[Claim, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)  # of training; more tell more about other seeds
    common: tuple[str, ...] = ()  # section.field=value, put over the recipe of every arm
    points: int = 2  # evaluations along the way, for curves; each costs as much as the last one
    scores: tuple[str, ...] = ("strict", "soft")  # the held-out scores of the table
    # Pairs of these scores that are traded for each other: the second is plotted against the first.
    frontiers: tuple[tuple[str, str], ...] = ()
    # Further evaluations of what came out, each by settings of the section evaluation: other steps, guidance.
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kl: bool = True  # measure the divergence of each trained policy from what it began with
    name: str = ""  # of the file

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ValueError("an experiment needs at least one arm and one seed")
        if len(set(self.seeds)) < len(self.seeds) or {report.BASE, NOTHING} & set(self.arms):
            raise ValueError(
                f"seeds must differ, and no arm may be called base or nothing, got {list(self.seeds)}"
            )
        if self.points < 0:
            raise ValueError(f"points must not be negative, got {self.points}")
        if odd := sorted({score for pair in self.frontiers for score in pair} - set(self.scores)):
            raise ValueError(f"frontiers: {odd[0]!r} is none of the scores {list(self.scores)}")
        for one in [c for claim in self.claims for c in claim.holds]:
            for arm, others in ((one.arm, ()), (one.than, (report.BASE, NOTHING))):
                if arm not in (*others, *self.arms):
                    raise ValueError(f"claims: there is no arm {arm!r}{nearest(arm, self.arms)}")
            named = one.metric.partition("/")[0].partition("@")[2]
            if named and named not in self.evaluations:
                raise ValueError(
                    f"claims: there is no evaluation {named!r}{nearest(named, self.evaluations)}"
                )


def read_experiment(path: Path) -> Experiment:
    """The experiment of a YAML file; ConfigError where it cannot be one."""
    if not path.is_file():
        raise ConfigError(f"there is no experiment {path}")
    raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(raw, Mapping) or "name" in raw:
        raise ConfigError(f"{path}: expected the fields of an experiment (name is that of the file)")
    found = section("experiment", {"experiment": {**raw, "name": path.stem}}, str(path), Experiment)
    for name, given in found.evaluations.items():
        section("evaluation", {"evaluation": dict(given)}, f"{path}, evaluations.{name}", EvaluationSettings)
    for arm in found.arms:
        configure(found, arm, found.seeds[0])
    return found


# Running


def configure(experiment: Experiment, name: str, seed: int, folder: Path | None = None) -> RunConfig:
    """The settings of one run, but for the iterations that a budget of forwards allows."""
    arm = experiment.arms[name]
    config = load_config(recipe(arm.recipe), [*experiment.common, *arm.set, f"training.seed={seed}"])
    place = str(folder) if folder is not None else config.run.dir
    training = replace(config.training, iterations=experiment.budget.iterations or config.training.iterations)
    return replace(config, training=training, run=replace(config.run, dir=place))


def spread_points(config: RunConfig, points: int) -> RunConfig:
    """The settings with so many evaluations along the way, about evenly."""
    every = -(-config.training.iterations // (points + 1)) if points else 0
    return replace(config, evaluation=replace(config.evaluation, every=every))


def spent(forwards: Mapping[str, float]) -> float:
    """The budget that counts of forwards stand for."""
    return forwards["sample"] + 3 * forwards["train"] + forwards["reference"]


def affordable(experiment: Experiment, name: str) -> int:
    """Iterations of an arm within the budget."""
    config = configure(experiment, name, experiment.seeds[0])
    if not experiment.budget.forwards:
        return config.training.iterations
    cost = spent(assembly.assemble(config, write=False).cost)
    if cost > experiment.budget.forwards:
        raise ConfigError(
            f"{experiment.name}: an iteration of {name} takes {cost:.0f} forwards, more than the budget of "
            f"{experiment.budget.forwards}"
        )
    return int(experiment.budget.forwards / cost)


def folder_of(runs: Path, experiment: Experiment, name: str, seed: int) -> Path:
    return runs / experiment.name / name / f"seed_{seed}"


def run(
    experiment: Experiment, runs: Path, only: Sequence[str] = (), say: Callable[[str], None] = print
) -> int:
    """Run what is not finished; gives how many runs failed.

    only: the arms to run (none: all). A run that fails is told of, and the others go on.
    """
    failed = 0
    for name in only:
        if name not in experiment.arms:
            raise ConfigError(f"{experiment.name}: there is no arm {name!r}{nearest(name, experiment.arms)}")
    for name in only or experiment.arms:
        iterations = 0
        for seed in experiment.seeds:
            folder = folder_of(runs, experiment, name, seed)
            title = f"{experiment.name}: {name}, seed {seed}"
            try:
                if not (folder / "report.json").is_file():
                    iterations = iterations or affordable(experiment, name)
                    config = configure(experiment, name, seed, folder)
                    config = replace(config, training=replace(config.training, iterations=iterations))
                    config = spread_points(config, experiment.points)
                    check_unchanged(folder, config)
                    going_on = checkpoints.latest(folder)
                    say(f"{title}: {'goes on' if going_on else f'{iterations} iterations'}, {folder}")
                    ready = assembly.assemble(config)
                    if not (folder / report.EVALUATION / BASE_FILES[-1]).is_file():
                        borrow(runs / experiment.name, folder, BASE_FILES)
                    if not ready.train():
                        say(f"{title}: stopped; the same command goes on")
                        raise SystemExit(STOPPED)
                measure(experiment, runs / experiment.name, folder)
            except (ConfigError, RuntimeError, ValueError, OSError) as error:
                say(f"{title}: failed: {error}")
                failed += 1
            else:
                say(f"{title}: finished")
    return failed


def check_unchanged(folder: Path, config: RunConfig) -> None:
    """Refuse to go on with a run that was begun with other settings."""
    if (folder / METRICS).is_file() and (changed := assembly.changes(folder, config)):
        raise ConfigError(f"{folder} was begun with other settings ({'; '.join(changed)}); remove it")


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings that a run's folder was begun with."""
    path = folder / assembly.CONFIG
    found: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    return found


def beginning(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the evaluation of an untrained policy depends on."""
    watched = (
        *("prompts", "seeds", "steps", "guidance", "seed", "show", "show_seeds"),
        *("references", "features"),
    )
    return {
        "policy": config["policy"],
        "rewards": {name: {**given, "weight": 0} for name, given in config["rewards"].items()},
        "prompts": config["prompts"]["heldout_file"] or config["prompts"]["file"],
        "evaluation": {name: config["evaluation"][name] for name in watched},
    }


def borrow(home: Path, folder: Path, files: Sequence[str]) -> bool:
    """Take the evaluation of the untrained policy from a sibling that began with the same one.

    files: of the folder `evaluation`, the last of which stands for all.
    """
    mine = settings_of(folder)
    for other in sorted(home.glob(f"*/seed_*/{report.EVALUATION}/{files[-1]}")):
        if beginning(settings_of(other.parent.parent)) == beginning(mine):
            (folder / report.EVALUATION).mkdir(exist_ok=True)
            for name in files:
                shutil.copy(other.with_name(name), folder / report.EVALUATION / name)
            return True
    return False


def measure(experiment: Experiment, home: Path, folder: Path) -> None:
    """The extra evaluations of a finished run, before and after, and its divergence from the base."""
    place = folder / report.EVALUATION
    sides = [(side, name) for name in experiment.evaluations for side in (report.BASE, report.TRAINED)]
    missing = [(side, name) for side, name in sides if not (place / extra(side, name)).is_file()]
    missing = [
        (side, name)
        for side, name in missing
        if side == report.TRAINED or not borrow(home, folder, [extra(side, name)])
    ]
    if not missing and (not experiment.kl or (place / KL).is_file()):
        return
    subject = open_subject(str(folder))
    assert subject.trained is not None  # a run has weights of its own
    policy, rewards = open_policy(subject), make(subject.rewards)
    prompts = chosen_prompts(None, subject.prompts)
    policy.copies.save(report.BASE)
    policy.load(subject.trained)
    for side, name in missing:
        settings = replace(subject.evaluation, **experiment.evaluations[name])
        evaluator = Evaluator(prompts, rewards, settings, Alone(), *seen_references(settings))
        with policy.copies.use(side) if side == report.BASE else nullcontext():
            evaluator.scores(policy)[0].save(place / extra(side, name))
    if experiment.kl:
        found = path_kl(policy, report.BASE, [prompts[i] for i in spread(len(prompts), KL_PROMPTS)], KL_STEPS)
        (place / KL).write_text(json.dumps({"kl": float(found.mean())}) + "\n")


def extra(side: str, name: str) -> str:
    """The file of an extra evaluation; one that is changed needs another name."""
    return f"{side}@{name}.json"
