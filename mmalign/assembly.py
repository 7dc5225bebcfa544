"""The parts of a run from its settings; what can be wrong with them is found before the first iteration."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mmalign import __version__, checkpoints, grids, report
from mmalign.composition import Composer, Schedule
from mmalign.compositions import Centered
from mmalign.config import ConfigError, RunConfig
from mmalign.contracts import PolicySettings, ReadsAhead, Reward, Writes
from mmalign.copies import numel
from mmalign.coupling import Coupled
from mmalign.data import Prompt, PromptSource, read_prompts
from mmalign.distributed import Distributed
from mmalign.evaluation import Evaluator, Shown, repeat
from mmalign.pipelines import CaptionPolicy, pipeline_class
from mmalign.pipelines import load as load_policy
from mmalign.pipelines.flow import FlowPolicy
from mmalign.plans import forwards
from mmalign.records import Outcome, Plan, Prompts, Split
from mmalign.rewardmodels import load as load_reward
from mmalign.scoring import Scorer, verdict
from mmalign.sde import Noise
from mmalign.subjects import seen_references
from mmalign.tracking import METRICS, ROLLOUTS, SAMPLES, NoTracker, RunTracker, Tracker, write_whole
from mmalign.trainer import AVERAGE, Algorithm, Trainer

CONFIG = "config.yaml"
OURS = (METRICS, ROLLOUTS, SAMPLES, CONFIG, checkpoints.FOLDER, report.EVALUATION, report.FACTS)


@dataclass
class Run:
    """A run that is ready to start."""

    config: RunConfig
    folder: Path
    distributed: Distributed
    policy: FlowPolicy | CaptionPolicy
    algorithm: Algorithm
    trainer: Trainer
    evaluator: Evaluator
    tracker: Tracker
    plan: dict[str, Any]
    cost: dict[str, float]
    began: float = field(default_factory=time.perf_counter)

    def train(self) -> dict[str, Any]:
        """Evaluate the base, train, evaluate what came out; gives report.json on the main process."""
        main = self.distributed.is_main
        places = self.folder / report.EVALUATION
        if self.distributed.any(main and not (places / f"{report.BASE}.json").is_file()):
            self._evaluate(
                report.BASE, 0
            )  # a run that goes on has its base weights until the trainer loads others
        if main:
            self._facts()
        self.trainer.run()
        if self.trainer.iteration < self.config.training.iterations:
            self.tracker.close()  # it was told to stop, and should be quick about it
            return {}
        self._evaluate(report.TRAINED, self.trainer.iteration)
        if self.config.evaluation.average and AVERAGE in self.policy.copies:
            with self.policy.copies.use(AVERAGE):
                self._evaluate(report.AVERAGE, None)
        self.tracker.close()
        result = report.write(self.folder) if main else {}
        self.distributed.barrier()
        return result

    def look(self, iteration: int) -> dict[str, float]:
        """Held-out scores and the sample grid, where they are due after so many iterations."""
        settings = self.config.evaluation
        if iteration == self.config.training.iterations:
            return {}  # the end has an evaluation of its own
        if settings.every and iteration % settings.every == 0:
            scores, shown = self.evaluator.scores(self.policy)
            self._draw(shown, iteration)
            if self.distributed.is_main:
                scores.save(self.folder / report.EVALUATION / f"step_{iteration:06d}.json")
            found = {f"heldout/{name}": score.mean for name, score in scores.scores.items()}
            return found | ({"heldout/diversity": scores.diversity} if scores.diversity is not None else {})
        if settings.grid_every and iteration % settings.grid_every == 0:
            self._draw(self.evaluator.grid(self.policy), iteration)
        return {}

    def _evaluate(self, name: str, iteration: int | None) -> None:
        scores, shown = self.evaluator.scores(self.policy)
        if not self.distributed.is_main:
            return
        folder = self.folder / report.EVALUATION
        folder.mkdir(exist_ok=True)
        if iteration is not None:
            self._draw(shown, iteration)
        if name == report.TRAINED and (folder / "base.pt").is_file():
            before = Shown.load(folder / "base.pt")
            panels = [*shown.before(), before.panel("before"), shown.panel("after")]
            sheet = grids.grid(shown.prompts, panels)
            (self.folder / SAMPLES).mkdir(exist_ok=True)
            sheet.save(self.folder / SAMPLES / report.BEFORE_AFTER)
        shown.save(folder / f"{name}.pt")
        scores.save(folder / f"{name}.json")  # last, so that it stands for all of them

    def _draw(self, shown: Shown, iteration: int) -> None:
        if self.distributed.is_main:
            sheet = grids.grid(
                shown.prompts,
                [*shown.before(), shown.panel("")],
                f"after {iteration} iterations" if iteration else "before training",
            )
            self.tracker.images(iteration, "step", sheet)

    def _facts(self) -> None:
        """What a report should tell that no other file does."""
        path = self.folder / report.FACTS
        before = json.loads(path.read_text()) if path.is_file() else {}
        facts = {
            "setup_seconds": before.get("setup_seconds", 0.0) + time.perf_counter() - self.began,
            "device": device_name(self.distributed.device),
            "processes": self.distributed.world,
            "commit": before.get("commit") or commit(),
            "heldout_file": self.config.prompts.heldout_file or self.config.prompts.file,
            "versions": {
                "python": platform.python_version(),
                "mmalign": __version__,
                **{
                    name: version(name)
                    for name in ("torch", "diffusers", "transformers", "peft", "accelerate")
                },
            },
            "plan": self.plan,
        }
        write_whole(path, json.dumps(facts, indent=1) + "\n")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {os.cpu_count()} cores" if device.type == "cpu" else device.type


def commit() -> str | None:
    """The commit of the checkout that this package was imported from, + where files of it have changed."""
    root = Path(__file__).resolve().parent.parent
    try:
        said = [
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0].strip() + ("+" if said[1].strip() else "")


def assemble(config: RunConfig, *, fresh: bool = False, write: bool = True) -> Run:
    """Everything a run needs. fresh: remove what an earlier run left. write: False makes no file."""
    began = time.perf_counter()
    pipeline_class(config.policy.model)  # cheap checks first
    source = PromptSource.read(config.prompts, config.training.seed)
    heldout = read_prompts(config.prompts.heldout_file or config.prompts.file)
    distributed = Distributed(None if torch.accelerator.is_available() else "cpu")
    source.check_split(distributed.world)
    folder = Path(config.run.dir)
    if write and distributed.is_main:
        prepare_folder(folder, fresh)
    distributed.barrier()
    rewards, weights = make_rewards(config)
    read_ahead(rewards, source.prompts, heldout)
    composer = compose(config, weights, [prompt.text for prompt in source.prompts])
    algorithm = composed(config.algorithm.build(composer.shares), composer)
    check_noise(algorithm, config.training.seed)
    for written in algorithm.loaded.values():
        checkpoints.weights_of(written)
    policy = make_policy(
        config.policy, algorithm.noise, distributed.device, config.training.seed, algorithm.split
    )
    check_kind(config, policy, algorithm)
    check_given(config, algorithm, policy, source.prompts)
    tracker: Tracker = NoTracker()
    if write and distributed.is_main:
        tracker = RunTracker(
            folder,
            tensorboard=config.run.tensorboard,
            wandb=config.run.wandb,
            rollouts_every=config.run.rollouts,
            iterations=config.training.iterations,
            settings=config.to_dict(),
        )
    trainer = Trainer(
        policy,
        algorithm,
        Scorer(rewards, config.training.max_missing),
        source,
        config.training,
        distributed,
        tracker,
        folder if write else None,
        composer=composer,
    )
    evaluator = Evaluator(
        heldout, rewards, config.evaluation, distributed, *seen_references(config.evaluation)
    )
    probe(rewards, policy, evaluator)
    cost = cost_of(config, algorithm, policy)
    plan = derive(config, algorithm, policy, cost, distributed.world, len(source.prompts))
    if write and distributed.is_main:
        save_config(folder, config, plan)
    run = Run(config, folder, distributed, policy, algorithm, trainer, evaluator, tracker, plan, cost, began)
    trainer.evaluate = run.look if write else None
    return run


def make_policy(
    settings: PolicySettings,
    noise: Noise,
    device: torch.device | str = "cpu",
    seed: int = 0,
    split: Split = "whole",
) -> FlowPolicy | CaptionPolicy:
    policy = load_policy(settings, noise, device, seed=seed, split=split)
    checkpoints.begin(policy, settings.weights)
    return policy


def make_rewards(config: RunConfig) -> tuple[list[Reward], dict[str, Schedule]]:
    """The reward models, and their weights over the iterations by the names that they give themselves."""
    rewards = [load_reward(name, **reward.settings) for name, reward in config.rewards.items()]
    weights = {r.name: given.schedule for r, given in zip(rewards, config.rewards.values(), strict=True)}
    if len(weights) < len(rewards):
        raise ConfigError(f"every reward needs a name of its own, got {[r.name for r in rewards]}")
    return rewards, weights


def read_ahead(rewards: Sequence[Reward], *files: Sequence[Prompt]) -> None:
    """Let rewards that look at what prompts bring along do so; ConfigError where it does not serve them."""
    for reward in [reward for reward in rewards if isinstance(reward, ReadsAhead)]:
        for prompts in files:
            try:
                reward.read_ahead(repeat(prompts, range(len(prompts)), 1))
            except ValueError as error:
                raise ConfigError(f"prompts: {error}") from None


def compose(config: RunConfig, weights: Mapping[str, Schedule], prompts: Sequence[str]) -> Composer:
    """What becomes of several rewards; everything that can be wrong with it is said now."""
    try:
        composer = Composer(weights) if config.composition is None else config.composition.build(weights)
    except ValueError as error:
        raise ConfigError(f"rewards: {error}") from None
    known = composer.rule.references if isinstance(composer.rule, Centered) else prompts
    if missing := [text for text in prompts if text not in known]:
        raise ConfigError(
            f"composition.references: {len(missing)} of {len(prompts)} training prompts have no reference, "
            f"the first is {missing[0]!r}"
        )
    return composer


def composed(algorithm: Algorithm, composer: Composer) -> Algorithm:
    """The method with what the composition changes of it."""
    if algorithm.through is not None and (composer.rule or composer.combine or composer.scheduled):
        raise ConfigError(
            "this algorithm differentiates the weighted sum of its rewards: it takes neither a composition "
            "nor weights that change"
        )
    if algorithm.credit.total is not None and (composer.rule or composer.combine):
        raise ConfigError("this algorithm adds its rewards up in a way of its own: it takes no composition")
    try:
        changed = replace(algorithm, credit=composer.credit(algorithm.credit))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return changed if composer.update is None else replace(changed, update=composer.update)


def check_noise(algorithm: Algorithm, seed: int) -> None:
    if algorithm.noise.level == 0 and any(plan.sde_steps for plan in algorithm.plans(0, seed)):
        raise ConfigError(
            "algorithm.noise.level is 0, but the algorithm learns from noise; usual are 0.3 to 1"
        )


def of_captioners(algorithm: Algorithm) -> bool:
    """Whether the method is one for policies that write."""
    return algorithm.plans(0, 0) in ([Plan(1)], [Plan(1, given=True)])


def check_kind(config: RunConfig, policy: FlowPolicy | CaptionPolicy, algorithm: Algorithm) -> None:
    """Raise ConfigError where the method is of models that draw and the policy writes, or the other way."""
    texts = of_captioners(algorithm)
    if texts != isinstance(policy, Writes):
        kinds = ("captioners", "flow models") if texts else ("flow models", "captioners")
        raise ConfigError(
            f"algorithm.name: {config.method} is a method for {kinds[0]}, and policy.model "
            f"{config.policy.model} is one of the {kinds[1]}"
        )


def check_given(
    config: RunConfig,
    algorithm: Algorithm,
    policy: FlowPolicy | CaptionPolicy,
    prompts: Sequence[Prompt],
) -> None:
    """Raise ConfigError where what prompts give is learned from and one gives nothing."""
    if not any(plan.given for plan in algorithm.plans(0, config.training.seed)):
        return
    key: str = "reference"
    kinds: list[Any] = [str]
    if isinstance(policy, FlowPolicy):
        key, kinds = ("image", [str]) if len(policy.shape) == 3 else ("video", [str, list])
    lacking = [
        prompt.text
        for prompt in prompts
        if not all(isinstance(extra.get(key), tuple(kinds)) for extra in prompt.members or (prompt.extra,))
    ]
    if lacking:
        raise ConfigError(
            f'prompts.file: {config.method} learns from the "{key}" of each prompt, and {len(lacking)} '
            f"of {len(prompts)} have none, the first is {lacking[0]!r}"
        )


@torch.no_grad()
def probe(rewards: Sequence[Reward], policy: FlowPolicy | CaptionPolicy, evaluator: Evaluator) -> None:
    """Show every reward two samples, made as quickly as can be, so that what it cannot do comes out now."""
    prompts = repeat(evaluator.prompts, [0], 2)
    before = policy.forwards.sample
    media: Tensor | list[str]
    if isinstance(policy, CaptionPolicy):
        policy.check(prompts)
        media = policy.texts(prompts, (0, "probe"))
    else:
        media = drawn_quickly(policy, prompts, evaluator.settings.steps)
    policy.forwards.sample = before
    for reward in rewards:
        shown = Outcome(prompts, media)
        _, reasons = verdict(reward, shown)
        raised = [reason for reason in reasons if not reason.startswith("the value is not finite")]
        if raised and sum(reasons.values()) == len(prompts):
            raise ConfigError(f"reward {reward.name!r} fails on what this policy draws: {raised[0]}")


def drawn_quickly(policy: FlowPolicy, prompts: Prompts, steps: int) -> Tensor:
    """Pictures or videos in as few steps as the model's schedule has; steps: a number that it must have.

    Qwen-Image and LTX-Video, whose schedules end early, have none of a single step, and distilled models may
    have one alone.
    """
    drawn: Tensor
    for few in (1, 2):
        with suppress(ValueError):
            drawn = policy.images(prompts, few, (0, "probe"))
            return drawn
    drawn = policy.images(prompts, steps, (0, "probe"))
    return drawn


# The folder


def prepare_folder(folder: Path, fresh: bool) -> None:
    """Make the folder, see that it can be written, and with `fresh` remove an earlier run's files from it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".writable_{os.getpid()}"
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"run.dir: cannot write into {folder}: {error.strerror or error}") from None
    if fresh:
        events = [path.name for path in folder.glob("events.out.tfevents.*")]
        for name in (*OURS, "report.json", "report.html", *events):
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()


def save_config(folder: Path, config: RunConfig, plan: Mapping[str, Any]) -> None:
    """The resolved settings, which can be run again, and below them as comments what follows from them."""
    follows = "".join(f"#   {name}: {value}\n" for name, value in plan.items())
    text = (
        f"# Resolved settings of this run, mmalign {__version__}.\n{config.to_yaml()}\n# Derived:\n{follows}"
    )
    write_whole(folder / CONFIG, text)


def changes(folder: Path, config: RunConfig) -> list[str]:
    """What differs between the settings that a folder was run with and the present ones."""
    path = folder / CONFIG
    if not path.is_file():
        return []
    before, now = flat(yaml.safe_load(path.read_text(encoding="utf-8"))), flat(config.to_dict())
    return [
        f"{name}: {before.get(name, 'unset')} -> {now.get(name, 'unset')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name) and name != "run.dir"
    ]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """A nest of mappings by dotted names."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in flat(item, f"{path}.{key}" if path else str(key)).items()
    }


# The plan


def cost_of(config: RunConfig, algorithm: Algorithm, policy: FlowPolicy | CaptionPolicy) -> dict[str, float]:
    """Forwards of an iteration to sample, to train, and (at most) of frozen policies and looks ahead.

    A mean over the first iterations, because windows move. A text costs at most a row for each of its tokens
    to sample, and one to train.
    """
    size, frozen = config.prompts.group, len(algorithm.copies) + len(algorithm.loaded)
    if isinstance(policy, CaptionPolicy):
        written = float(config.prompts.per_iteration * size)
        given = algorithm.plans(0, config.training.seed)[0].given
        longest = 0 if given or config.policy.rollout.url else config.policy.text.max_tokens - 1
        return {"sample": written * longest, "train": written, "reference": written * frozen}
    rows = policy.adapter.rows(config.policy.guidance)
    member = torch.arange(size)
    learners = member[: algorithm.credit.learners or size]
    each = algorithm.through.cost if algorithm.through is not None else lambda plan: 1
    iterations = min(64, config.training.iterations)
    found = [plan for i in range(iterations) for plan in algorithm.plans(i, config.training.seed)]
    share = config.prompts.per_iteration * rows / iterations
    sample = sum(forwards(plan, torch.zeros_like(member), member)[0] for plan in found)
    train = sum(forwards(plan, torch.zeros_like(learners), learners, each(plan))[1] for plan in found)
    frozen += isinstance(algorithm.objective, Coupled)
    return {"sample": share * sample, "train": share * train, "reference": share * train * frozen}


def derive(
    config: RunConfig,
    algorithm: Algorithm,
    policy: FlowPolicy | CaptionPolicy,
    cost: Mapping[str, float],
    world: int,
    prompts: int,
) -> dict[str, Any]:
    """What follows from the settings and is never set: sizes of batches, counts of updates and forwards."""
    trained = sum(numel(p) for p in policy.module.parameters() if p.requires_grad)
    whole = sum(numel(p) for p in policy.module.parameters())
    groups, size, settings = config.prompts.per_iteration, config.prompts.group, config.training
    samples = groups * size
    found = [algorithm.plans(i, config.training.seed) for i in range(min(64, config.training.iterations))]
    frozen = [*algorithm.copies, *algorithm.loaded]
    actions = sorted({len(plan.sde_steps) for plans in found for plan in plans})
    judged = sum(plan.views for plan in found[0])
    updates = f"{settings.updates}, each over {groups // settings.updates} of the groups"
    if algorithm.apart:
        updates = f"{settings.updates} for each action, each over {groups // settings.updates} of the groups"
    if isinstance(policy, CaptionPolicy):
        shape = {"texts": f"of at most {config.policy.text.max_tokens} tokens"}
    else:
        shape = {
            "denoising steps": f"{found[0][0].steps}, of them stochastic {' or '.join(map(str, actions))}",
            "pictures judged an iteration": f"{judged} x {samples} = {judged * samples}",
        }
    return {
        "trained parameters": f"{trained:,} of {whole:,}",
        "prompts in an epoch": f"{prompts // groups * groups:,} of {prompts:,}",
        "samples an iteration": f"{groups} prompts x {size} = {samples}, {samples // world} a process",
        **shape,
        "updates an iteration": updates,
        "forwards an iteration": f"{cost['sample']:.0f} to sample, {cost['train']:.0f} to train"
        + (f", at most {cost['train']:.0f} of each frozen policy ({', '.join(frozen)})" if frozen else ""),
        "network rows of a forward": f"at most {policy.chunk} to sample, {config.training.batch} to train",
    }
