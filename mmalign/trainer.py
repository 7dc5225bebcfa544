"""The loop: sample, reward, credit, update. It names no model, no reward and no method."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mmalign import checkpoints
from mmalign.composition import Composer
from mmalign.contracts import Key, LearnedReward, Policy
from mmalign.coupling import Coupled
from mmalign.credit import Credit, Peers
from mmalign.distributed import Distributed
from mmalign.gradients import Differentiated, OnLatents
from mmalign.health import Clock, Running, StaticAlarm, peak_memory
from mmalign.learning import AVERAGE, Learner, TrainingError
from mmalign.mismatch import corrected, mismatch
from mmalign.objectives import REFERENCE, Objective
from mmalign.overlap import sample_and_judge
from mmalign.plans import PlanAt
from mmalign.records import Advantage, Outcome, Plan, Prompts, RewardSignal, Split, Trajectory
from mmalign.scoring import Scorer, Scores, summarize
from mmalign.sde import Noise
from mmalign.tracking import NoTracker, Tracker
from mmalign.updates import Summed, Update

__all__ = ["AVERAGE", "REFERENCE", "Algorithm", "Trainer", "TrainingError", "TrainingSettings"]

SHARDED = "sharded"  # folder of a checkpoint for what no rank holds as a whole
Evaluate = Callable[
    [int], Mapping[str, float]
]  # after so many iterations -> metrics, none where it is not due


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how fast and how carefully to train."""

    iterations: int = 100  # each samples, scores and learns from per_iteration x group samples
    learning_rate: float = 3e-4  # of AdamW; lower it when rewards collapse, raise it when ratios stay at 1
    warmup: int = 0  # optimizer updates over which the learning rate rises to its value
    # Share of the iterations, the last ones, over which the learning rate falls to 0. It averages out what
    # single updates got wrong, so that a higher rate can be held before; 0 keeps the rate.
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    weight_decay: float = 1e-4  # of AdamW; pulls LoRA weights, and so the policy, back to the base model
    grad_clip: float = 1.0  # largest norm of the gradient in an update
    updates: int = 2  # optimizer updates per iteration, each over its part of the groups; 1 keeps ratios at 1
    batch: int = 16  # network rows per forward in the update; changes memory and speed, not the result
    # Parts in which samples are drawn, each judged while the next is drawn; results stay. Raise it to 4 or 8
    # where rewards wait for servers or have a device of their own; 1: judged when all is drawn
    overlap: int = 1
    seed: int = 0  # of everything that is drawn: prompts, noise, windows, fresh adapters
    ema_decay: float = 0.9  # of the moving average of the parameters, with warm-up; 0: keep no average
    ema_every: int = 1  # optimizer updates between two moves of the average
    skip_idle: bool = False  # leave out samples whose gradient is exactly zero; faster, same result
    noise_floor: Literal["error", "warn"] = "error"  # where rounding fills a third of the clip range
    max_missing: float = 0.2  # share of samples without a verdict above which the run stops
    max_bad_steps: int = 5  # updates in a row with NaN or infinite loss or gradient before the run stops
    save_every: int = 20  # iterations between checkpoints; the last iteration always has one; 0: only that
    keep_checkpoints: int = 2  # how many to keep; 0: all

    def __post_init__(self) -> None:
        for name in ("iterations", "updates", "batch", "ema_every", "max_bad_steps", "overlap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "save_every", "keep_checkpoints"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is a share between 0 and 1, got {self.decay}")
        if not 0 <= self.max_missing <= 1:
            raise ValueError(f"max_missing is a share between 0 and 1, got {self.max_missing}")


class Memory(Protocol):
    """What a method remembers beyond the number of the iteration; the same on all ranks, and checkpointed."""

    def observe(
        self, signals: Sequence[RewardSignal], trajectory: Trajectory, peers: Peers
    ) -> Mapping[str, float]:
        """Take in one batch, after its credit and before its update; gives metrics."""
        ...

    def note(self, iteration: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Take in what an iteration measured, before the copies move; gives metrics of its own."""
        ...

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Algorithm:
    """All that makes one method differ from another."""

    plans: PlanAt
    credit: Credit
    objective: Objective | Coupled
    noise: Noise  # of the policy's stochastic steps
    update: Update = field(default_factory=Summed)
    # Frozen copies of the parameters taken at the start, and how much of itself each keeps after an iteration
    # (a number, or a function of the iteration) as it follows the live ones: 1 never moves, 0 is that
    # of the last iteration.
    copies: Mapping[str, float | Callable[[int], float]] = field(default_factory=dict)
    # Copies read from folders that runs have written, and which stay as they are.
    loaded: Mapping[str, Path] = field(default_factory=dict)
    # The copy that samples, or which one does in an iteration; None: the live parameters.
    sampler: str | Callable[[int], str | None] | None = None
    split: Split = "whole"  # what an action of a denoiser is split into
    alone: bool = False  # samples are not compared, so that a group may have one member
    apart: bool = False  # every action of a plan has optimizer updates of its own, one action after another
    memory: Memory | None = None  # what plans, credit or copies depend on beside iteration and seed
    # Rewards that the objective differentiates; it meets them first.
    through: Differentiated | OnLatents | None = None
    # What only the policy knows about its actions, put into their advantage; no gradient.
    refine: Callable[[Policy, Trajectory, Advantage, Peers], Advantage] | None = None

    def sampled_by(self, iteration: int) -> str | None:
        return self.sampler(iteration) if callable(self.sampler) else self.sampler


class Source(Protocol):
    """Where prompts come from: a function of the iteration, dealt out to ranks."""

    def at(self, iteration: int, rank: int = 0, world: int = 1) -> Prompts: ...


class Trainer:
    """Runs an algorithm on a policy until it has made `settings.iterations`, and goes on where a checkpoint
    left off.

    run_dir: where checkpoints go; None makes none. evaluate: called after each iteration with their number;
    its metrics join those of the iteration. composer: what becomes of several rewards; None: as the method's
    credit says.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        scorer: Scorer,
        prompts: Source,
        settings: TrainingSettings,
        distributed: Distributed | None = None,
        tracker: Tracker | None = None,
        run_dir: Path | None = None,
        evaluate: Evaluate | None = None,
        composer: Composer | None = None,
    ) -> None:
        self.policy, self.algorithm, self.scorer, self.prompts = policy, algorithm, scorer, prompts
        self.settings, self.run_dir, self.evaluate = settings, run_dir, evaluate
        self.composer = composer or Composer({n: {0: w} for n, w in algorithm.credit.weights.items()})
        self.distributed = distributed or Distributed("cpu")
        self.tracker = tracker if tracker is not None and self.distributed.is_main else NoTracker()
        self.iteration = 0
        self.seconds: dict[str, float] = {}  # by phase, over the whole run
        self._stop = False
        self._check_groups()
        if algorithm.through is not None:
            algorithm.through.meet(scorer.rewards)
        self.learner = Learner(policy, algorithm, settings, self.distributed)
        self.clock = Clock(self.distributed.device)
        self.alarm = StaticAlarm()

    def _check_groups(self) -> None:
        prompts = self.prompts.at(0, self.distributed.rank, self.distributed.world)
        group = Peers(prompts, self.distributed.gather).group
        groups, sizes = torch.unique(group, return_counts=True)
        if int(sizes.min()) < 2 and not self.algorithm.alone:
            raise ValueError(
                "a group of one has nobody to be compared with; prompts.group must be at least 2"
            )
        for plan in self.algorithm.plans(0, self.settings.seed):
            for size in sizes.unique().tolist():
                plan.check_group(size)
        if len(groups) % self.settings.updates:
            raise ValueError(
                f"training.updates={self.settings.updates} must divide the {len(groups)} groups of an "
                f"iteration (prompts.per_iteration), because each update takes whole groups"
            )

    # The run.

    def run(self) -> None:
        """Train to the end, from the latest checkpoint if there is one. SIGTERM ends it with a checkpoint."""
        self.resume()
        self.clock.lap()
        with self._graceful():
            while self.iteration < self.settings.iterations:
                metrics = self.step(self.iteration)
                self.iteration += 1
                if self.evaluate is not None:
                    with self.clock("evaluate"):
                        metrics |= self.evaluate(self.iteration)
                metrics |= self._lap()
                with self.clock("log"):
                    self.tracker.log(self.iteration - 1, metrics)
                stop = self.distributed.any(self._stop)
                if self._due() or stop:
                    with self.clock("checkpoint"):
                        self.save()
                if stop:
                    break

    def _due(self) -> bool:
        every = self.settings.save_every
        return self.iteration == self.settings.iterations or bool(every and self.iteration % every == 0)

    @contextmanager
    def _graceful(self) -> Iterator[None]:
        def stop(number: int, frame: object) -> None:
            self._stop = True

        try:
            before = signal.signal(signal.SIGTERM, stop)
        except ValueError:  # not in the main thread, which alone may handle signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _lap(self) -> dict[str, float]:
        lap = self.clock.lap()
        for phase, seconds in lap.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        whole = max(lap["iteration"], 1e-9)
        shares = {f"share/{phase}": seconds / whole for phase, seconds in lap.items() if phase != "iteration"}
        return {f"seconds/{phase}": seconds for phase, seconds in lap.items()} | shares

    def step(self, iteration: int) -> dict[str, float]:
        """One iteration: sample, reward, credit, update; gives what was measured."""
        self.learner.iteration = iteration
        with self.clock("sample"):
            prompts = self.prompts.at(iteration, self.distributed.rank, self.distributed.world)
            peers = Peers(prompts, self.distributed.gather)
        plans = self.algorithm.plans(iteration, self.settings.seed)
        measured = [self._follow(plan, prompts, peers, (iteration, i)) for i, plan in enumerate(plans)]
        running = Running()
        for one in measured:
            running.add(one)
        metrics = running.means()
        metrics |= self.composer.close()
        metrics |= self.alarm(metrics)
        if self.algorithm.memory is not None:
            metrics |= self.algorithm.memory.note(iteration, metrics)
        for name, rule in self.algorithm.copies.items():
            keep = rule(iteration) if callable(rule) else rule
            if keep < 1:
                self.policy.copies.follow(name, keep)
        metrics |= self.learner.counts()
        counts = [self.policy.forwards.sample, self.policy.forwards.train, self.policy.forwards.reference]
        memory = peak_memory(self.distributed.device)
        totals = self.distributed.gather(torch.tensor([[*counts, memory]], dtype=torch.int64))
        for name, count in zip(("sample", "train", "reference"), totals.sum(0).tolist(), strict=False):
            metrics[f"forwards/{name}"] = float(count)
        metrics["memory/peak_bytes"] = float(totals[:, -1].max())
        return metrics

    def _follow(self, plan: Plan, prompts: Prompts, peers: Peers, place: tuple[int, int]) -> dict[str, float]:
        """Sample under one plan and learn from it."""
        key: Key = (self.settings.seed, "sample", *place)
        before = self.policy.forwards.sample
        sampler = self.algorithm.sampled_by(place[0])
        with self.policy.copies.use(sampler) if sampler else nullcontext():
            trajectory, scores = sample_and_judge(
                self.policy,
                self.scorer,
                prompts,
                plan,
                key,
                self.settings.overlap,
                self.clock,
                self.distributed.gather,
            )
        cost = (self.policy.forwards.sample - before) / max(1, len(prompts))
        with self.clock("credit"):
            part = self._parts(trajectory, peers)
            composed = self.composer(scores.signals, trajectory.outcome, peers, place[0])
            credit = replace(self.algorithm.credit, weights=composed.weights)
            advantage = credit(composed.signals, trajectory, self.policy.locate, peers, part)
            if self.algorithm.refine is not None:
                advantage = self.algorithm.refine(self.policy, trajectory, advantage, peers)
            if trajectory.behavior is not None:
                advantage = corrected(advantage, trajectory)
            metrics = summarize(scores, peers, trajectory.outcome.views, self.distributed.gather_objects)
            if trajectory.behavior is not None:
                metrics |= mismatch(trajectory, self.distributed.gather)
            metrics |= composed.metrics
            metrics |= self._about(advantage, peers)
            if self.algorithm.memory is not None:
                metrics |= self.algorithm.memory.observe(composed.signals, trajectory, peers)
        with self.clock("update"):
            metrics |= self.learner.learn(trajectory, advantage, part, plan, peers, sampler is None)
        with self.clock("fit"):
            for reward in self.scorer.rewards:
                if isinstance(reward, LearnedReward):
                    learned = reward.fit(trajectory.outcome)
                    metrics |= {f"reward/{reward.name}/fit/{name}": value for name, value in learned.items()}
        with self.clock("log"):
            rows = rollouts(trajectory.outcome, key, scores, advantage, cost)
            self.tracker.rollouts(place[0], self.distributed.gather_objects(rows))
        return metrics

    def _parts(self, trajectory: Trajectory, peers: Peers) -> Tensor:
        """The update in which each action takes part, [B, S]: whole groups, and with `apart` one action."""
        groups, updates = torch.unique(peers.group), self.settings.updates
        part = torch.searchsorted(groups, trajectory.group.cpu()) * updates // len(groups)
        actions = trajectory.mask.shape[1]
        column = torch.arange(actions) if self.algorithm.apart else torch.zeros(actions, dtype=torch.int64)
        return column * updates + part[:, None]

    def _about(self, advantage: Advantage, peers: Peers) -> dict[str, float]:
        """How many groups say nothing, and how strong the advantage is."""
        size = peers.all(advantage.values.abs().transpose(0, 1).flatten(1).amax(1).cpu().double())
        counted = peers.all((advantage.weight.flatten(1) > 0).any(1).long()).bool()
        groups, row = torch.unique(peers.group, return_inverse=True)
        loudest = torch.zeros(len(groups), dtype=torch.float64).scatter_reduce_(0, row, size, "amax")
        return {
            "groups/flat_share": (loudest == 0).double().mean().item(),
            "samples/counted_share": counted.double().mean().item(),
            "advantage/size": size.mean().item(),
        }

    # Checkpoints.

    def save(self) -> Path | None:
        """Write a checkpoint: all that the loop needs, and the policy in the format of its own library."""
        if self.run_dir is None:
            return None
        return checkpoints.save(
            self.run_dir,
            self.iteration,
            self._write,
            self.settings.keep_checkpoints,
            self.distributed.is_main,
            self.distributed.barrier,
        )

    def _write(self, folder: Path) -> None:
        learned = {r.name: r.state_dict() for r in self.scorer.rewards if isinstance(r, LearnedReward)}
        own = self.distributed.gather_objects([{"random": checkpoints.random_state(), "rewards": learned}])
        state: dict[str, Any] = {
            "iteration": self.iteration,
            "holding": self.distributed.holding,
            "updates": self.learner.updates,
            "bad": self.learner.bad,
            "bad_in_a_row": self.learner.bad_in_a_row,
            "loss_scale": self.learner.scale.state_dict() if self.learner.scale is not None else None,
            "memory": self.algorithm.memory.state_dict() if self.algorithm.memory is not None else None,
            "update": self.algorithm.update.state_dict(),
            "composition": self.composer.state_dict(),
            "alarm": self.alarm.state_dict(),
            "seconds": dict(self.seconds),
            "forwards": self._forwards(),
            "ranks": own,
        }
        if self.distributed.sharded:
            self.distributed.save_sharded(folder / SHARDED)
            copies = folder / SHARDED / f"copies_{self.distributed.rank}.pt"
            torch.save(self.policy.copies.state_dict(), copies)
        else:
            state |= {"weights": self._weights(), "optimizer": self.learner.optimizer.state_dict()}
            state["copies"] = self.policy.copies.state_dict()
        if self.distributed.is_main:
            checkpoints.write_state(folder, state)
        self._export(folder)
        if AVERAGE in self.policy.copies:
            with self.policy.copies.use(AVERAGE):
                self._export(folder / AVERAGE)

    def _export(self, folder: Path) -> None:
        """The policy as its own library loads it; all ranks must call it."""
        whole = self.distributed.whole(self.policy.module)
        if self.distributed.is_main:
            folder.mkdir(exist_ok=True)
            self.policy.save(folder, whole)

    def resume(self) -> bool:
        """Go back to the latest complete checkpoint of the run directory, if there is one."""
        folder = checkpoints.latest(self.run_dir) if self.run_dir is not None else None
        if folder is None:
            self.tracker.resume(0)
            return False
        self.load(folder)
        self.tracker.resume(self.iteration)
        return True

    def load(self, folder: Path) -> None:
        """Take over the state of a checkpoint."""
        state = checkpoints.read_state(folder)
        held, holding = state.get("holding", self.distributed.holding), self.distributed.holding
        if held != holding:
            raise checkpoints.CheckpointError(
                f"{folder} holds {held}, and each process of this run is to hold {holding}: launch it as "
                "before"
            )
        if self.distributed.sharded:
            self.distributed.load_sharded(folder / SHARDED)
            own = torch.load(folder / SHARDED / f"copies_{self.distributed.rank}.pt", weights_only=True)
            self.policy.copies.load_state_dict(own)
        else:
            self._take(state["weights"], folder)
            self.learner.load_optimizer(state["optimizer"])
            self.policy.copies.load_state_dict(state["copies"])
        self.iteration, learner = state["iteration"], self.learner
        learner.updates, learner.bad, learner.bad_in_a_row = (
            state[name] for name in ("updates", "bad", "bad_in_a_row")
        )
        # A run in fp16 that began before losses were scaled has none.
        if learner.scale is not None and state.get("loss_scale"):
            learner.scale.load_state_dict(state["loss_scale"])
        self.seconds = dict(state["seconds"])
        if self.algorithm.memory is not None:
            self.algorithm.memory.load_state_dict(state["memory"])
        self.algorithm.update.load_state_dict(state["update"])
        self.composer.load_state_dict(state["composition"])
        if "alarm" in state:  # a run that began before there was one starts to listen here
            self.alarm.load_state_dict(state["alarm"])
        if len(state["ranks"]) != self.distributed.world:
            warnings.warn(
                f"{folder} was written by {len(state['ranks'])} processes and is read by "
                f"{self.distributed.world}: the run goes on, but not bit for bit as it would have",
                RuntimeWarning,
                stacklevel=2,
            )
        own = state["ranks"][self.distributed.rank % len(state["ranks"])]
        forwards = (
            state["forwards"][self.distributed.rank]
            if self.distributed.rank < len(state["forwards"])
            else [0] * 3
        )
        counts = self.policy.forwards
        counts.sample, counts.train, counts.reference = forwards
        for reward in self.scorer.rewards:
            if isinstance(reward, LearnedReward):
                reward.load_state_dict(own["rewards"][reward.name])
        checkpoints.restore_random(own["random"])

    def _forwards(self) -> list[list[int]]:
        counts = self.policy.forwards
        own = torch.tensor([[counts.sample, counts.train, counts.reference]], dtype=torch.int64)
        rows: list[list[int]] = self.distributed.gather(own).tolist()
        return rows

    def _trainable(self) -> dict[str, nn.Parameter]:
        bare = self.distributed.unwrap(self.policy.module)
        return {name: p for name, p in bare.named_parameters() if p.requires_grad}

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._trainable().items()}

    @torch.no_grad()
    def _take(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        live = self._trainable()
        if (live.keys() != weights.keys()) or any(live[n].shape != w.shape for n, w in weights.items()):
            raise checkpoints.CheckpointError(
                f"{folder}: its weights are not those of this policy (other model, LoRA rank or targets?)"
            )
        for name, parameter in live.items():
            parameter.copy_(weights[name])


def rollouts(
    outcome: Outcome, key: Key, scores: Scores, advantage: Advantage, cost: float
) -> list[dict[str, object]]:
    """One row a sample: what it was, every reward at its own grain (None: no verdict), its advantage."""
    prompts, views, media = outcome.prompts, outcome.views, outcome.media
    credited = advantage.values.transpose(0, 1).cpu()
    rows: list[dict[str, object]] = []
    for b, text in enumerate(prompts.text):
        judged = {}
        for verdict in scores.signals:
            assert verdict.valid is not None  # filled in by RewardSignal
            at = slice(b * views, (b + 1) * views)
            units = [
                value if ok else None
                for value, ok in zip(
                    verdict.values[at].flatten().tolist(), verdict.valid[at].flatten().tolist(), strict=True
                )
            ]
            judged[verdict.name] = units[0] if len(units) == 1 else units
        rows.append(
            {
                "prompt": text,
                **({"text": media[b * views]} if isinstance(media, list) else {}),
                "group": int(prompts.group[b]),
                "member": int(prompts.member[b]),
                "key": list(key),
                "rewards": judged,
                "details": {name: list(d[b * views : (b + 1) * views]) for name, d in scores.details.items()},
                "advantage": credited[b].squeeze().tolist(),
                "counted": bool((advantage.weight[b] > 0).any()),
                "forwards": cost,
            }
        )
    return rows
