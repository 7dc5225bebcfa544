"""What `sample` and `evaluate` look at: a run, one of its checkpoints, a model, or a folder of images."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign import checkpoints
from mmalign.config import (
    COMMAND_LINE,
    ConfigError,
    RewardSettings,
    RunConfig,
    check_rewards,
    load_config,
    override,
    parse_yaml,
    section,
    split_override,
)
from mmalign.contracts import PolicySettings, RewardModel, judges_alone
from mmalign.data import Prompt, read_prompts
from mmalign.distances import Extract, extracted, pixels
from mmalign.evaluation import (
    KID,
    Alone,
    Evaluated,
    EvaluationSettings,
    Evaluator,
    Score,
    Shown,
    beside,
    gain,
    no_nan,
    summarize,
    verdicts,
    wins,
)
from mmalign.pictures import STILLS, open_picture, stills_in
from mmalign.pipelines import load as load_policy
from mmalign.pipelines import pipeline_class
from mmalign.pipelines.flow import FlowPolicy
from mmalign.probes import LIMIT, Probed, probe_all
from mmalign.records import Outcome, Prompts
from mmalign.rewardmodels import load as load_reward
from mmalign.rewardmodels.features import load_features
from mmalign.sde import Noise

BEFORE, AFTER = "before", "after"
BASELINE = "baseline"


@dataclass(frozen=True)
class Subject:
    """A model on the disk, with or without trained weights over it."""

    name: str
    place: Path  # where what is drawn goes by default
    policy: PolicySettings
    evaluation: EvaluationSettings
    rewards: Mapping[str, RewardSettings]
    prompts: str | None  # file
    trained: Path | None  # folder that policy.load reads

    @property
    def sides(self) -> list[str]:
        return [BEFORE, AFTER] if self.trained else [BEFORE]


def open_subject(
    path: str, overrides: Sequence[str] = (), rewards: Sequence[str] | None = None, lora: str | None = None
) -> Subject:
    """What lies at `path`; settings come from the run it belongs to, with `section.field=value` over them."""
    place = Path(path)
    given = named_rewards(rewards)
    if not place.exists():
        pipeline_class(path)  # a hub id, or an error
    model = (place / "model_index.json").is_file() or (place / "config.json").is_file()
    if model or not place.exists():
        raw: dict[str, Any] = {"policy": {"model": path}}
        for text in overrides:
            override(raw, *split_override(text))
        unknown = set(raw) - {"policy", "evaluation"}
        if unknown:
            raise ConfigError(
                f"{COMMAND_LINE}: a model has the sections policy and evaluation, not {sorted(unknown)}"
            )
        policy = section("policy", raw, COMMAND_LINE, PolicySettings)
        settings = section("evaluation", raw, COMMAND_LINE, EvaluationSettings)
        return Subject(place.name, Path(), policy, settings, given or {}, None, Path(lora) if lora else None)
    if lora:
        raise ConfigError(f"--lora goes over a plain model; {path} brings weights of its own")
    run, trained = run_of(place)
    config: RunConfig = load_config(run / "config.yaml", overrides)
    name = run.name if trained is None else f"{run.name}, {trained.name.replace('_', ' ')}"
    return Subject(
        name,
        run / "samples",
        config.policy,
        config.evaluation,
        config.rewards if given is None else given,
        config.prompts.heldout_file or config.prompts.file,
        trained,
    )


def run_of(place: Path) -> tuple[Path, Path]:
    """The run and the checkpoint that a folder stands for."""
    if (place / "config.yaml").is_file():
        latest = checkpoints.latest(place)
        if latest is None:
            raise ConfigError(f"{place}: this run has no complete checkpoint yet")
        return place, latest
    for above in place.resolve().parents:
        if (above / "config.yaml").is_file() and (above / checkpoints.FOLDER).is_dir():
            return above, place
    raise ConfigError(
        f"{place} is no run (it has no config.yaml), no checkpoint of one, and no model (no model_index.json)"
    )


def named_rewards(given: Sequence[str] | None) -> dict[str, RewardSettings] | None:
    """`lab` or `lab={measure: strict}`, each as in a recipe."""
    if given is None:
        return None
    raw: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        raw[name] = parse_yaml(value, COMMAND_LINE) if equals else 1.0
    return check_rewards(raw, COMMAND_LINE)


def chosen_prompts(given: str | None, default: str | None) -> list[Prompt]:
    """The prompts of a file, or the one text given."""
    if given is not None and Path(given).suffix not in (".txt", ".jsonl"):
        return [Prompt(given)]
    file = given or default
    if file is None:
        raise ConfigError(
            "a plain model brings no prompts: name them by --prompts FILE or --prompts 'a text'"
        )
    return read_prompts(file)


def adapted(settings: EvaluationSettings, options: argparse.Namespace, show: bool) -> EvaluationSettings:
    """The settings with what the command line says; show: all that is drawn is shown, by default few."""
    changes: dict[str, Any] = {}
    count = options.count if options.count is not None else settings.show if show else None
    if count is not None:
        changes |= {"prompts": count, "show": max(1, count or 10**9)}
    seeds = options.seeds if options.seeds is not None else settings.show_seeds if show else None
    if seeds is not None:
        changes |= {"seeds": seeds, "show_seeds": seeds}
    if options.steps is not None:
        changes["steps"] = options.steps
    for option, name in (("reference", "references"), ("features", "features")):
        if getattr(options, option, None) is not None:
            changes[name] = getattr(options, option)
    return replace(settings, **changes)


def open_policy(subject: Subject) -> FlowPolicy:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    policy = load_policy(subject.policy, Noise(), device or "cpu")
    checkpoints.begin(policy, subject.policy.weights)
    return policy


def draw_all(subject: Subject, options: argparse.Namespace) -> dict[str, Shown]:
    """The pictures of each side: base, and trained where there is something trained."""
    settings = adapted(subject.evaluation, options, show=True)
    prompts = chosen_prompts(options.prompts, subject.prompts)
    rewards = make(subject.rewards)
    sides = [side for side in subject.sides if options.only in (None, side)]
    if not sides:
        raise ConfigError(f"{options.subject} has no {options.only!r} side")
    evaluator, policy, shown = Evaluator(prompts, rewards, settings, Alone()), open_policy(subject), {}
    for side in sides:
        if side == AFTER:
            assert subject.trained is not None
            policy.load(subject.trained)
        shown[side] = evaluator.grid(policy)
    return shown


def make(rewards: Mapping[str, RewardSettings]) -> list[RewardModel]:
    return [load_reward(name, **reward.settings) for name, reward in rewards.items()]


def make_single(rewards: Mapping[str, RewardSettings]) -> list[RewardModel]:
    """The rewards, each of which judges pictures one by one; ConfigError for one that compares them."""
    made = make(rewards)
    for reward in made:
        if not judges_alone(reward):
            raise ConfigError(
                f"reward {reward.name!r} compares pictures of one prompt, and none of a folder by itself"
            )
    return made


def evaluate_all(path: str, options: argparse.Namespace) -> dict[str, Evaluated]:
    """Scores by side; a folder of images has the one side `images`."""
    place = Path(path)
    if is_folder_of_images(place):
        if options.overrides:
            raise ConfigError(
                f"{COMMAND_LINE}: a folder of images has no settings, got {' '.join(options.overrides)}"
            )
        for name in ("lora", "prompts", "count", "seeds", "steps", "compare", "references"):
            if getattr(options, name):
                raise ConfigError(
                    f"a folder of images brings prompts and pictures of its own; it takes no --{name}"
                )
        given = named_rewards(options.rewards)
        if not given:
            raise ConfigError("a folder of images needs --rewards NAME [NAME ...] to be scored by")
        extract, pictures = reference_features(options.reference, options.features or "pixels")
        return {"images": score_images(place, make_single(given), extract=extract, references=pictures)}
    subject = open_subject(path, options.overrides, options.rewards, options.lora)
    if not subject.rewards:
        raise ConfigError("a plain model brings no rewards: name them by --rewards NAME [NAME ...]")
    prompts = chosen_prompts(options.prompts, subject.prompts)
    settings = adapted(subject.evaluation, options, show=False)
    evaluator = Evaluator(prompts, make(subject.rewards), settings, Alone(), *seen_references(settings))
    policy, found = open_policy(subject), {}
    if options.references is not None:
        write_references(Path(options.references), evaluator.quantiles(policy, options.quantile), options)
    if subject.trained is None or options.compare:
        found["base"] = evaluator.scores(policy)[0]
    if subject.trained is not None:
        policy.load(subject.trained)
        found["trained"] = evaluator.scores(policy)[0]
    return found


def seen_references(settings: EvaluationSettings) -> tuple[Extract, Tensor] | tuple[None, None]:
    """What `Evaluator` needs to measure distances, if it is to."""
    return reference_features(settings.references, settings.features)


def reference_features(
    place: str | None, features: str = "pixels"
) -> tuple[Extract, Tensor] | tuple[None, None]:
    """The network that sees features, and the features [m, D] of the pictures in a folder or zip, if any."""
    if place is None:
        return None, None
    if len(files := stills_in(Path(place))) < 4:
        raise ConfigError(
            f"references {place}: distances need a folder or zip of four pictures or more, there are "
            f"{len(files)}"
        )
    extract: Extract = pixels if features == "pixels" else load_features(features)
    # One by one, for they may differ in size.
    return extract, torch.cat([extracted(extract, picture_of(path)[None]) for path in files])


def write_references(
    path: Path, table: Mapping[str, Mapping[str, float]], options: argparse.Namespace
) -> None:
    """References of each prompt, as the composition `log_sigmoid` reads them."""
    known = {
        prompt: {name: value for name, value in row.items() if math.isfinite(value)}
        for prompt, row in table.items()
    }
    raw = {"subject": options.subject, "quantile": options.quantile, "references": known}
    path.write_text(json.dumps(raw, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_baseline(path: Path) -> Evaluated:
    """The scores that `mmalign evaluate --json` has written: of the trained side, if there are two."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        side = next(raw[name] for name in ("trained", "images", "base") if name in raw)
        return Evaluated.of(side)
    except (KeyError, TypeError, StopIteration, json.JSONDecodeError) as error:
        raise ConfigError(f"--baseline {path}: not written by mmalign evaluate --json ({error!r})") from None


# Folders of images


def is_folder_of_images(place: Path) -> bool:
    if not place.is_dir() or (place / "config.yaml").is_file() or (place / "model_index.json").is_file():
        return False
    return (place / "metadata.jsonl").is_file() or any(
        path.suffix.lower() in STILLS for path in place.iterdir()
    )


def captioned(place: Path) -> list[tuple[Path, Prompt]]:
    """Images with their prompts: by metadata.jsonl (file_name, prompt or text), else by their names.

    A name is the prompt with _ for spaces; a number at its end tells pictures of one prompt apart.
    """
    table = place / "metadata.jsonl"
    if not table.is_file():
        files = sorted(path for path in place.iterdir() if path.suffix.lower() in STILLS)
        return [
            (path, Prompt(re.sub(r"[_\s-]+\d+$", "", path.stem).replace("_", " ").strip())) for path in files
        ]
    found = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        name, text = row.pop("file_name", None), row.pop("prompt", None) or row.pop("text", None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ConfigError(
                f"{table}, line {number}: expected file_name and prompt (or text), got {line[:80]}"
            )
        if not (place / name).is_file():
            raise ConfigError(f"{table}, line {number}: there is no image {place / name}")
        found.append((place / name, Prompt(text, row)))
    if not found:
        raise ConfigError(f"{table} names no image")
    return found


def picture_of(path: Path) -> Tensor:
    """[3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(open_picture(path))).permute(2, 0, 1).float() / 255


def opened(place: Path) -> tuple[Prompts, Tensor]:
    """The images of a folder [N, 3, H, W] and their prompts; those of equal prompts are seeds of one."""
    rows = captioned(place)
    group_of: dict[str, int] = {}
    groups = [group_of.setdefault(prompt.text, len(group_of)) for _, prompt in rows]
    members = [groups[:i].count(group) for i, group in enumerate(groups)]
    prompts = Prompts(
        [prompt.text for _, prompt in rows],
        torch.tensor(groups),
        torch.tensor(members),
        [prompt.extra for _, prompt in rows],
    )
    images = [picture_of(path) for path, _ in rows]
    odd = next(
        (path for (path, _), image in zip(rows, images, strict=True) if image.shape != images[0].shape), None
    )
    if odd is not None:
        raise ConfigError(
            f"{place}: all images must have one size, but {odd.name} and {rows[0][0].name} differ"
        )
    return prompts, torch.stack(images)


def probe_images(
    place: Path, rewards: Sequence[RewardModel], names: Sequence[str] = (), strength: float = 1.0
) -> list[Probed]:
    """What changes that should not please gain of each reward, on the images of a folder."""
    prompts, images = opened(place)
    outcome = Outcome(prompts, images)
    return [one for reward in rewards for one in probe_all(reward, outcome, names, strength)]


def print_probes(found: Sequence[Probed]) -> None:
    from rich.console import Console
    from rich.table import Table

    note = f"gain in standard deviations of the reward; marked: above {LIMIT} and most samples win"
    table = Table("reward", "probe", "gain", "win", "samples", caption=note)
    for one in found:
        style = "bold red" if one.suspicious else None
        mark = " *" if one.suspicious else ""
        table.add_row(
            one.reward, one.probe + mark, f"{one.gain:+.2f}", f"{one.win:.0%}", str(one.samples), style=style
        )
    Console().print(table)


def score_images(
    place: Path,
    rewards: Sequence[RewardModel],
    batch: int = 64,
    extract: Extract | None = None,
    references: Tensor | None = None,
) -> Evaluated:
    """Scores of the images in a folder; those of equal prompts are seeds of one.

    extract, references: as for `Evaluator`.
    """
    prompts, stack = opened(place)
    result = summarize(verdicts(rewards, prompts, stack, batch), stack, prompts.group)
    if extract is not None and references is not None:
        features = extracted(extract, stack, batch)
        result = beside(result, features, prompts.group, references)
    return replace(result, prompts=list(dict.fromkeys(prompts.text)))


# Saying it


def as_json(subject: str, found: Mapping[str, Evaluated]) -> dict[str, Any]:
    """Scores by side, and where there are two how the one compares with the other, prompt by prompt."""
    result: dict[str, Any] = {"subject": subject}
    result |= {side: asdict(evaluated) for side, evaluated in found.items()}
    if "base" in found and "trained" in found:
        compared = against(found["base"], found["trained"])
        result["gain"] = {name: asdict(of["gain"]) for name, of in compared.items()}
        result["win_rate"] = {name: asdict(of["win rate"]) for name, of in compared.items()}
    if BASELINE in found:
        compared = against(found[BASELINE], subject_of(found))
        result["against_baseline"] = {
            name: {what: asdict(score) for what, score in of.items()} for name, of in compared.items()
        }
    fixed: dict[str, Any] = no_nan(result)
    return fixed


def subject_of(found: Mapping[str, Evaluated]) -> Evaluated:
    """The side that a baseline is compared with: trained, if there is one."""
    return next(found[side] for side in ("trained", "images", "base") if side in found)


def against(base: Evaluated, other: Evaluated) -> dict[str, dict[str, Score]]:
    """Score -> gain and win rate of `other` over `base`, for the scores of prompts that both have."""
    both = [name for name in other.by_prompt if name in base.by_prompt and name != KID]
    return {n: {"gain": gain(base, other, n), "win rate": wins(base, other, n)} for n in both}


def print_table(found: Mapping[str, Evaluated]) -> None:
    """Scores with their intervals, overall and by category."""
    from rich.console import Console
    from rich.table import Table

    from mmalign.report import between, short, signed

    table = Table("score", *found, caption="mean over prompts, 95 % bootstrap interval over prompts")
    names = list(dict.fromkeys(name for evaluated in found.values() for name in evaluated.scores))
    detailed = [name for name in ("strict", "soft") if name in names] or names
    kinds = sorted({kind for e in found.values() for of in e.categories.values() for kind in of})

    def cell(score: Any) -> str:
        return f"{short(score.mean)} {between(score.low, score.high)}" if score and score.images else "–"

    for name in names:
        table.add_row(name, *(cell(e.scores.get(name)) for e in found.values()))
        for kind in kinds if name in detailed else []:
            cells = [cell(e.categories.get(name, {}).get(kind)) for e in found.values()]
            table.add_row(f"  {kind.replace('_', ' ')}", *cells, style="dim")
    table.add_row("diversity", *(short(e.diversity) for e in found.values()))
    if any(e.distances for e in found.values()):
        for name in ("kid", "precision", "recall", "variety"):
            values = [getattr(e.distances, name) if e.distances else None for e in found.values()]
            table.add_row(f"{name} of features", *(short(value) for value in values))
    console = Console()
    console.print(table)
    before = BASELINE if BASELINE in found else "base"
    if before in found and len(found) > 1:
        compared = Table("score", f"gain over {before}", "prompts won", caption="paired by prompt")
        for name, of in against(found[before], subject_of(found)).items():
            won, more = of["win rate"], of["gain"]
            rate = f"{won.mean:.0%} {between(won.low, won.high)}"
            compared.add_row(name, f"{signed(more.mean)} {between(more.low, more.high, True)}", rate)
        console.print(compared)
