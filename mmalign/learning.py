"""The update: from samples with their credit to steps of the parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.checkpoints import weights_of
from mmalign.contracts import KeepsStep, Policy, ReadsInPart, TellsPrecision
from mmalign.copies import Copies
from mmalign.coupling import Coupled
from mmalign.credit import Peers
from mmalign.distributed import Distributed
from mmalign.health import Meter, Reading, Running, named
from mmalign.loss_scale import LossScale, unscale
from mmalign.objectives import Objective
from mmalign.records import Advantage, Minibatch, Pick, Plan, Trajectory
from mmalign.updates import Balanced

if TYPE_CHECKING:
    from mmalign.trainer import Algorithm, TrainingSettings

AVERAGE = "average"


class TrainingError(RuntimeError):
    """Training that must not go on; the message says what was seen and what to try."""


@dataclass(frozen=True)
class Credited:
    """A trajectory with its credit on the grid: values [K, B, S, *site], weight and pull [B, S, *site]."""

    trajectory: Trajectory
    values: Tensor
    weight: Tensor
    pull: Tensor | None
    names: tuple[str, ...]

    @classmethod
    def of(cls, trajectory: Trajectory, advantage: Advantage) -> Credited:
        grid = trajectory.log_prob.shape
        pull = None if advantage.pull is None else advantage.pull.expand(grid)
        values, weight = advantage.values.expand(-1, *grid), advantage.weight.expand(grid)
        return cls(trajectory, values, weight, pull, advantage.names)

    def minibatch(self, pick: Pick, fresh: bool = False) -> Minibatch:
        at = (pick.rows, pick.columns)
        pull = None if self.pull is None else self.pull[at]
        return Minibatch(self.trajectory, pick, self.values[:, *at], self.weight[at], fresh, pull)

    def speaks(self, taking: Tensor) -> Tensor:
        """Which objectives have an advantage on an action of an update; taking: [B, S], gives [K] bool."""
        said = (self.values != 0) & (self.weight > 0)
        return torch.stack([(_anywhere(one) & taking).any() for one in said])

    def silent(self, pick: Pick, fresh: bool) -> Minibatch:
        """The same forward and backward with no weight."""
        batch = self.minibatch(pick, fresh)
        return replace(batch, weight=torch.zeros_like(batch.weight))


def _anywhere(flags: Tensor) -> Tensor:
    """Which actions have a site that is so: [B, S, *site] to [B, S], on the CPU."""
    return (flags.flatten(2).any(2) if flags.ndim > 2 else flags).cpu()


class Learner:
    """Holds the optimizer and the trained parameters of a policy, and moves them."""

    def __init__(
        self, policy: Policy, algorithm: Algorithm, settings: TrainingSettings, distributed: Distributed
    ) -> None:
        self.policy, self.algorithm, self.settings, self.distributed = (
            policy,
            algorithm,
            settings,
            distributed,
        )
        self.updates = self.bad = self.bad_in_a_row = 0
        self.iteration = 0  # the one that is learned from
        self._floor_known = False
        self.scale = _scale_of(policy, distributed)
        trainable = [p for p in policy.module.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("the policy has no trainable parameters")
        if any(p.dtype.itemsize < 4 for p in trainable):
            raise ValueError("trainable parameters must be fp32, or small updates would be rounded away")
        optimizer = torch.optim.AdamW(
            trainable, settings.learning_rate, settings.betas, weight_decay=settings.weight_decay
        )
        if distributed.sharded and isinstance(algorithm.update, Balanced):
            raise ValueError(
                "objectives can only be balanced where every rank holds all parameters, not sharded"
            )
        in_part = isinstance(policy, ReadsInPart) and policy.in_part
        policy.module, self.optimizer = distributed.prepare(
            policy.module, optimizer, settings.grad_clip, in_part
        )
        self.parameters = [p for p in policy.module.parameters() if p.requires_grad]
        if distributed.sharded:
            policy.copies = Copies(policy.module)  # sharding has replaced the parameters, or emptied them
        if distributed.gathers and isinstance(policy, KeepsStep):
            policy.anyone = distributed.any
        for name in algorithm.copies:
            policy.copies.save(name)
        for name, folder in algorithm.loaded.items():
            self._load_copy(name, folder)
        if settings.ema_decay:
            policy.copies.save(AVERAGE)

    def _load_copy(self, name: str, folder: Path) -> None:
        """Take a copy from what a run has written; the live parameters stay."""
        if self.distributed.sharded:
            raise ValueError(f"{name}: weights of another run cannot be read into sharded parameters")
        before = [p.detach().clone() for p in self.parameters]
        self.policy.load(weights_of(folder))
        self.policy.copies.save(name)
        with torch.no_grad():
            for p, value in zip(self.parameters, before, strict=True):
                p.copy_(value)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take over the moments of a checkpoint, but keep the settings of now."""
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group |= {"betas": self.settings.betas, "weight_decay": self.settings.weight_decay}

    def learn(
        self,
        trajectory: Trajectory,
        advantage: Advantage,
        part: Tensor,
        plan: Plan,
        peers: Peers,
        live: bool = True,
    ) -> dict[str, float]:
        """Every update over one batch of samples; part: [B, S], the one in which each action takes part.

        live: the live parameters sampled, not a copy.
        """
        credited, columns = Credited.of(trajectory, advantage), trajectory.mask.shape[1]
        meter, floor = (Meter(columns, self.distributed.device) for _ in range(2))
        losses, norms, balance = [], [], Running()
        for number in range(self.settings.updates * (columns if self.algorithm.apart else 1)):
            picks = self._picks(credited, part == number)
            if picks is None:
                continue
            fresh = number == 0 and live  # the parameters are those that sampled
            batches = self._batches(credited, picks, fresh)
            objective = self.algorithm.objective
            if isinstance(objective, Coupled):
                taking = (part == number).to(credited.weight)
                mine = credited.weight * taking.reshape(*taking.shape, *[1] * (credited.weight.ndim - 2))
                objective = objective.look(self.policy, batches, credited.values, mine, peers)
            meters = [meter, floor] if fresh else [meter]
            loss, found = self._gradient(objective, batches, meters, credited, part == number)
            balance.add(found)
            if fresh and not self._floor_known:
                self._check_floor(floor.read(self.distributed.gather).get("log_ratio"))
            norm = self.distributed.clip(self.parameters, self.settings.grad_clip)
            losses.append(float(loss))
            if self._step(losses[-1], float(norm), meter):
                norms.append(float(norm))
        metrics = named(meter.read(self.distributed.gather), plan.sde_steps)
        if (reading := floor.read(self.distributed.gather).get("log_ratio")) is not None:
            metrics |= {"noise_floor/mean": reading.size, "noise_floor/max": reading.most}
        metrics |= balance.means()
        if losses:
            total = self.distributed.gather(torch.tensor([losses], dtype=torch.float64)).sum(0)
            metrics["loss"] = total.mean().item()
        if norms:
            metrics |= {"grad_norm": sum(norms) / len(norms), "grad_norm_max": max(norms)}
        return metrics | {"learning_rate": self._learning_rate()}

    def _picks(self, credited: Credited, taking: Tensor) -> list[Pick | None] | None:
        """The forwards of an update on this rank; None stands for a repeat that only keeps ranks in step.

        taking: [B, S], the actions of this update. No list at all where no rank has anything to learn from.
        An action without weight is left out rather than multiplied by 0: what kept it from a verdict may be
        NaN.
        """
        taking = taking & credited.trajectory.mask.cpu() & _anywhere(credited.weight > 0)
        if self.settings.skip_idle and self.algorithm.objective.idle_at_zero:
            busy = taking & _anywhere((credited.values != 0).any(0))
            if not busy.any():  # a gradient of 0 still moves by momentum and decay
                busy[taking.any(1).nonzero()[:1, 0]] = taking[taking.any(1)][:1]
            taking = busy
        picks: list[Pick | None] = []
        rows = taking.any(1).nonzero().flatten()
        if len(rows):
            trajectory = replace(credited.trajectory, mask=taking.to(credited.trajectory.mask.device))
            picks += self.policy.picks(trajectory, rows, self.settings.batch)
        most = int(self.distributed.gather(torch.tensor([len(picks)])).max())
        return picks + [None] * (most - len(picks)) if most else None

    def _batches(self, credited: Credited, picks: list[Pick | None], fresh: bool) -> list[Minibatch]:
        return [
            credited.minibatch(pick, fresh) if pick else credited.silent(self._spare(credited, picks), fresh)
            for pick in picks
        ]

    def _gradient(
        self,
        objective: Objective,
        batches: list[Minibatch],
        meters: list[Meter],
        credited: Credited,
        taking: Tensor,
    ) -> tuple[Tensor, Mapping[str, float]]:
        """Make the gradient of one update; gives this rank's share of the loss, and metrics.

        taking: [B, S], the actions of the update.
        """
        update, names = self.algorithm.update, credited.names
        speaks = torch.ones(1, len(names), dtype=torch.bool)
        if len(names) > 1:
            speaks = self.distributed.gather(credited.speaks(taking)[None])
        exchange = update.begin(names, speaks.any(0).tolist())
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        # `backward` multiplies by the number of ranks; divided by it, any number of them computes the same.
        factor = 1.0 if self.scale is None else self.scale.value / self.distributed.world
        loss = torch.zeros((), device=self.distributed.device)
        for i, batch in enumerate(batches):
            with self.distributed.minibatch(self.policy.module, i == len(batches) - 1, exchange):
                losses, measures = objective(self.policy, batch)
                update.add(losses * factor, self.parameters, self.distributed.backward)
            loss += losses.detach().sum()
            for meter in meters:
                meter.add(measures, batch.weight > 0, batch.pick.columns)
        found = update.finish(self.parameters, self.distributed.total)
        if self.scale is not None:
            unscale(self.parameters, factor)
        return loss, found

    def _spare(self, credited: Credited, picks: list[Pick | None]) -> Pick:
        """A forward to repeat: one of this update's, else the smallest that there is."""
        return picks[0] or next(iter(self.policy.picks(credited.trajectory, torch.tensor([0]), 1)))

    def _step(self, loss: float, norm: float, meter: Meter) -> bool:
        """One step of the optimizer, unless loss or gradient is not finite on any rank.

        Gives False where only the scale of the loss was too high, so that `norm` is that of no gradient.
        """
        found = torch.tensor([[not math.isfinite(loss), not math.isfinite(norm)]])
        lost, wild = self.distributed.gather(found).any(0).tolist()
        if wild and not lost and self.scale is not None and self.scale.fall():
            self.optimizer.zero_grad(set_to_none=True)
            return False
        if lost or wild:
            self._skip(loss, norm, meter)
            return True
        self.bad_in_a_row = 0
        self.optimizer.step()
        if self.scale is not None:
            self.scale.rise()
        self.updates += 1
        if self.settings.ema_decay and self.updates % self.settings.ema_every == 0:
            # Warm-up: an average of few updates must not hang on to where it began.
            moves = self.updates // self.settings.ema_every
            self.policy.copies.follow(AVERAGE, min(self.settings.ema_decay, (1 + moves) / (10 + moves)))
        return True

    def _skip(self, loss: float, norm: float, meter: Meter) -> None:
        self.bad += 1
        self.bad_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.bad_in_a_row < self.settings.max_bad_steps:
            return
        readings = meter.read(self.distributed.gather)
        seen = ", ".join(f"{name} mean {r.mean:.3g} max {r.most:.3g}" for name, r in readings.items())
        raise TrainingError(
            f"{self.bad_in_a_row} updates in a row gave a loss or gradient that is not finite "
            f"(training.max_bad_steps={self.settings.max_bad_steps}), so training stops; none of them "
            f"touched the weights. The last: loss {loss:.4g}, gradient norm {norm:.4g}, {seen}. Usual "
            f"causes: weights that blew up before (lower training.learning_rate), or half precision that "
            f"overflows (policy.precision=bf16 or fp32)."
        )

    def counts(self) -> dict[str, float]:
        """How many updates were made so far, how many were left out and why, and the scale of the loss."""
        found = {"updates": float(self.updates), "updates/bad": float(self.bad)}
        if self.scale is not None:
            found |= {"updates/overflowed": float(self.scale.overflows), "loss_scale": self.scale.value}
        return found

    def _check_floor(self, reading: Reading | None) -> None:
        """Refuse a clip range that rounding alone would fill: before any step the log-ratio should be 0."""
        self._floor_known = True
        clip = self.algorithm.objective.clip_range
        if clip is None or reading is None or not clip < 3 * reading.size:
            return
        message = (
            f"with unchanged weights the log-ratio is already {reading.size:.2g} in the mean and "
            f"{reading.most:.2g} at most, and the clip range is only {clip:.2g}: less than three times this "
            f"noise floor. Raise the clip to {3 * reading.size:.2g} or more, or compute in higher precision "
            f"(policy.precision=fp32)"
        )
        if self.settings.noise_floor == "error":
            raise TrainingError(f"{message}; training.noise_floor=warn trains all the same")
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _learning_rate(self) -> float:
        settings = self.settings
        rise = (self.updates + 1) / max(1, settings.warmup)
        fall = (1 - self.iteration / settings.iterations) / settings.decay if settings.decay else 1.0
        return settings.learning_rate * min(1.0, rise, fall)


def _scale_of(policy: Policy, distributed: Distributed) -> LossScale | None:
    """The scale of the losses of a policy that computes in fp16."""
    if not isinstance(policy, TellsPrecision) or policy.precision != "fp16":
        return None
    if distributed.kind == "deepspeed":
        raise ValueError(
            "policy.precision=fp16 scales losses, and DeepSpeed makes its step before their gradient can be "
            "looked at: set policy.precision=bf16, or launch with assets/accelerate/fsdp2.yaml"
        )
    return LossScale()
