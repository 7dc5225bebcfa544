"""On-policy distillation of tuned teachers into one student (Flow-OPD, arXiv:2605.08063).

The student samples with noise; at every state that it visits, its step is pulled to the step that the teacher
of the prompt would take. Both are Gaussians of one std, so their divergence is exact and speaks of nothing
but the velocities:

    KL = |mean - mean_k|^2 / (2 std^2) = (d / 2) [(g (1 - t) / (2 t)) + 1 / g]^2 |v - v_k|^2

(d the length of the step, g^2 d = std^2, for Flow-SDE and Dance-SDE), and its gradient goes through v. No
reward is needed; those that are named are only watched, for all that the loop asks for one.

Teachers are folders that runs have written: a run's own, of which the latest checkpoint is taken, or one with
LoRA weights. They are kept as copies of the adapter, so that memory does not grow by networks. A prompt names
its teacher as `teacher` in its line of the prompt file; where there is one teacher it teaches all. Without
teachers the base model teaches, which with a `guidance` distills that guidance into the student.

N samples of T steps cost N T forwards to sample, N (T - 1) to train and N (T - 1) of teachers, however many
they are; twice with guidance.

Differs from the public code in its loss: there the default is a policy gradient with minus the KL as the
advantage, which has the same optimum and a higher variance. Students start from the base model and not from
merged adapters, whose sum would have the ranks of all teachers together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmalign.contracts import Policy
from mmalign.credit import Credit, center
from mmalign.objectives import REFERENCE, Measures, divergence, frozen, velocity_of
from mmalign.plans import every_step
from mmalign.records import Evaluation, Minibatch
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class Distill:
    """Teaches the student, at the states that it visits itself, the velocities of tuned teachers."""

    steps: int = 10  # denoising steps in training
    # folders of teachers by name: runs, or folders with LoRA weights; none: the base model teaches
    teachers: Mapping[str, str] = field(default_factory=dict)
    guidance: float | None = None  # of the teachers; null: the policy's own
    form: Literal["gaussian", "velocity"] = "gaussian"  # gaussian: the KL of steps; velocity: |v - v_k|^2
    noise: Noise = field(default_factory=lambda: Noise("flow", 0.7))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("Distill needs noise: noise.level must be above 0 (usual: 0.7)")
        if REFERENCE in self.teachers:
            raise ValueError(f"a teacher cannot be called {REFERENCE!r}, which is the base model")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        return Algorithm(
            plans=every_step(self.steps),
            credit=Credit(weights, center, "total_first", "whole"),
            objective=Taught(tuple(self.teachers) or (REFERENCE,), self.guidance, self.form),
            noise=self.noise,
            copies={} if self.teachers else {REFERENCE: 1.0},
            loaded={name: Path(folder) for name, folder in self.teachers.items()},
        )


@dataclass(frozen=True)
class Taught:
    """The divergence of each step from that of the prompt's teacher."""

    teachers: tuple[str, ...]
    guidance: float | None = None
    form: Literal["gaussian", "velocity"] = "gaussian"
    clip_range: float | None = None
    idle_at_zero: bool = False

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        taught = self.lesson(policy, batch)
        gap = divergence(policy.evaluate(batch.trajectory, batch.pick), taught, self.form)
        loss = (gap * batch.weight).sum() / len(batch.advantage)
        return loss.expand(len(batch.advantage)), {"kl": gap.detach().expand_as(batch.weight)}

    def lesson(self, policy: Policy, batch: Minibatch) -> Evaluation:
        """What the teacher of each action's prompt would do there."""
        who = torch.tensor([self.teacher(batch, row) for row in batch.pick.rows.tolist()])
        places = [(who == number).nonzero().flatten() for number in range(len(self.teachers))]
        found = [
            frozen(policy, replace(batch, pick=batch.pick.take(mine)), name, self.guidance)
            for name, mine in zip(self.teachers, places, strict=True)
            if len(mine)
        ]
        order = torch.cat(places).argsort()
        log_prob = torch.cat([part.log_prob for part in found])
        mean, velocity = (torch.cat(parts) for parts in zip(*map(_gaussian, found), strict=True))
        order = order.to(velocity.device)
        return Evaluation(log_prob[order], mean[order], velocity=velocity[order])

    def teacher(self, batch: Minibatch, row: int) -> int:
        """The place of a sample's teacher among them."""
        if len(self.teachers) == 1:
            return 0
        prompts = batch.trajectory.outcome.prompts
        name = prompts.extra[row].get("teacher")
        if name not in self.teachers:
            raise ValueError(
                f"prompt {prompts.text[row]!r} names {name!r} as its teacher; with several teachers each "
                f'line of the prompt file needs "teacher", one of {", ".join(self.teachers)}'
            )
        return self.teachers.index(str(name))


def _gaussian(found: Evaluation) -> tuple[Tensor, Tensor]:
    if found.mean is None:
        raise TypeError("distillation needs a policy whose actions are Gaussian")
    return found.mean, velocity_of(found)
