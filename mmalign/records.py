"""The values that flow through training, in the order in which they appear.

Shapes use these letters everywhere:
    B samples, S actions per sample, U reward units per sample, K objectives kept apart, n actions picked for
    one forward. `*site` is what one action can be split into: nothing for a token or a whole denoising step,
    (F,) for frames, (H, W) or (F, H, W) for places in a latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """How to sample once.

    steps: denoising steps of the schedule. sde_steps: the steps at which noise is drawn and recorded (the
    actions); every other step follows the ODE. share_noise: members of a group start from one initial noise,
    so that they are one and the same sample up to their first action. strides: after the last action the
    schedule is finished once per stride, taking every stride-th step; each gives one completion (a view) of
    the same actions. renoise: for methods of the forward process, which take no action while sampling: every
    finished sample is noised again at so many times, and each of these noised states is an action. noisy:
    further steps that draw noise; they are no actions, and nothing of them is recorded. tail: after the last
    noise, so many steps of DPM-Solver++ over a wider grid in place of the schedule's Euler steps; 0: none.
    """

    steps: int
    sde_steps: tuple[int, ...] = ()
    share_noise: bool = False
    strides: tuple[int, ...] = (1,)
    renoise: int = 0
    noisy: tuple[int, ...] = ()
    tail: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a plan needs at least one step, got steps={self.steps}")
        for name, found in (("sde_steps", self.sde_steps), ("noisy", self.noisy)):
            if list(found) != sorted(set(found)):
                raise ValueError(f"{name} must rise without repeats, got {found}")
            if found and not 0 <= found[0] <= found[-1] < self.steps - 1:
                raise ValueError(
                    f"{name} must lie in 0..{self.steps - 2} (the last of {self.steps} steps draws no "
                    f"noise), got {found}"
                )
        if both := sorted(set(self.sde_steps) & set(self.noisy)):
            raise ValueError(f"a step is in sde_steps or in noisy, but {both} are in both")
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides must be positive and at least one, got {self.strides}")
        left = self.steps - 1 - max(self.stochastic, default=-1)
        if not 0 <= self.tail <= left or (self.tail and self.strides != (1,)):
            raise ValueError(
                f"tail takes the place of the last {left} steps of one completion, so it must lie in "
                f"0..{left} with strides (1,), got tail={self.tail}, strides={self.strides}"
            )
        if self.renoise < 0 or (self.renoise and (self.stochastic or self.strides != (1,))):
            raise ValueError(
                f"renoise must not be negative and goes with ODE sampling alone, got renoise={self.renoise}, "
                f"sde_steps={self.sde_steps}, noisy={self.noisy}, strides={self.strides}"
            )

    @property
    def stochastic(self) -> tuple[int, ...]:
        """All steps that draw noise, in order."""
        return tuple(sorted(self.sde_steps + self.noisy))


@dataclass(frozen=True)
class Prompts:
    """What the policy is asked for; samples with the same group number are compared with each other.

    group, member: [B] int64, given by the sampler and never guessed from the text. (group, member) names a
    sample for good: its randomness is keyed by it, whatever rank or batch it lands in. extra: one mapping a
    sample (reference, expected answer, image path: whatever a reward needs).
    """

    text: list[str]
    group: Tensor
    member: Tensor
    extra: list[Mapping[str, object]]

    def __post_init__(self) -> None:
        sizes = {len(self.text), len(self.group), len(self.member), len(self.extra)}
        if len(sizes) > 1:
            raise ValueError(
                f"text, group, member and extra must be equally long, got lengths {sorted(sizes)}"
            )

    def __len__(self) -> int:
        return len(self.text)

    def take(self, rows: Tensor) -> Prompts:
        """The samples at `rows` [b] (int64)."""
        picked = rows.tolist()
        return Prompts(
            [self.text[i] for i in picked],
            self.group[rows],
            self.member[rows],
            [self.extra[i] for i in picked],
        )


@dataclass(frozen=True)
class Outcome:
    """All that a reward may see: the prompts and what came out, nothing of how it was made.

    media: images [B * views, C, H, W] or video [B * views, F, C, H, W] with values in [0, 1], or B * views
    strings. views: completions made from the same actions; row b * views + i is completion i of sample b.
    """

    prompts: Prompts
    media: Tensor | list[str]
    views: int = 1


@dataclass(frozen=True)
class Trajectory:
    """A batch of samples: the outcome, the actions that led to it, and what replays them.

    log_prob: [B, S, *site] under the policy that sampled; S = 0 where nothing was drawn. mask: [B, S] bool,
    False on padding. replay: read only by the policy that wrote it; every tensor in it starts with B.
    """

    outcome: Outcome
    log_prob: Tensor
    mask: Tensor
    replay: Mapping[str, Tensor]

    @property
    def group(self) -> Tensor:
        return self.outcome.prompts.group

    def __len__(self) -> int:
        return len(self.group)


class Unit(Enum):
    """The grain a reward speaks in. Aligned units mean the same thing in every sample of a group."""

    SAMPLE = "sample", True
    STEP = "step", True
    FRAME = "frame", True
    CRITERION = "criterion", True
    COMPLETION = "completion", True
    TOKEN = "token", False
    CLAIM = "claim", False
    REGION = "region", False

    def __init__(self, label: str, aligned: bool) -> None:
        self.label, self.aligned = label, aligned


@dataclass(frozen=True)
class Whole:
    """The unit speaks about the whole outcome."""


@dataclass(frozen=True)
class Spans:
    """The unit speaks about characters [start, end) of the text; start, end: [B, U] int64."""

    start: Tensor
    end: Tensor


@dataclass(frozen=True)
class Masks:
    """The unit speaks about these places; mask: [B, U, F, H, W] in [0, 1], an image has F = 1."""

    mask: Tensor


@dataclass(frozen=True)
class Steps:
    """The unit speaks about one action, by its place in the sequence; index: [B, U] int64."""

    index: Tensor


Where = Whole | Spans | Masks | Steps


@dataclass(frozen=True)
class RewardSignal:
    """One reward model's verdict on a batch, at the grain in which the model speaks.

    values: [B, U] float. valid: [B, U] bool, False where there is no verdict (None: all valid). A value that
    is not finite counts as no verdict. details: one mapping a sample for logs and galleries, or None.
    """

    name: str
    values: Tensor
    unit: Unit = Unit.SAMPLE
    valid: Tensor | None = None
    where: Where = field(default_factory=Whole)
    details: list[Mapping[str, object]] | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise ValueError(f"{self.name}: values must be [samples, units], got {tuple(self.values.shape)}")
        valid = torch.ones_like(self.values, dtype=torch.bool) if self.valid is None else self.valid
        if valid.shape != self.values.shape or valid.dtype != torch.bool:
            raise ValueError(
                f"{self.name}: valid must be bool of the shape of values {tuple(self.values.shape)}, "
                f"got {valid.dtype} {tuple(valid.shape)}"
            )
        valid = valid & torch.isfinite(self.values)
        object.__setattr__(self, "values", torch.where(valid, self.values, torch.zeros_like(self.values)))
        object.__setattr__(self, "valid", valid)


@dataclass(frozen=True)
class Advantage:
    """Credit on the action grid: which way each action should move, and how loudly it speaks.

    values: [K, B, S, *site] or broadcastable to it. weight: [B, S, *site] or broadcastable; sums to 1 over an
    update of all ranks. names: K. pull: as weight, how strongly each action is pulled to the reference, where
    the objective has one (None: all alike, by 1).
    """

    values: Tensor
    weight: Tensor
    names: tuple[str, ...]
    pull: Tensor | None = None


@dataclass(frozen=True)
class Pick:
    """Actions that one forward evaluates: action columns[i] of sample rows[i], both [n] int64."""

    rows: Tensor
    columns: Tensor

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Minibatch:
    """Picked actions with the credit that they got; advantage: [K, n, *site], weight and pull: [n, *site]."""

    trajectory: Trajectory
    pick: Pick
    advantage: Tensor
    weight: Tensor
    pull: Tensor | None = None

    @property
    def log_prob(self) -> Tensor:
        """Recorded log-probability of the picked actions, [n, *site]."""
        return self.trajectory.log_prob[self.pick.rows, self.pick.columns]


@dataclass(frozen=True)
class Noised:
    """Samples noised again: x = (1 - sigma) clean + sigma e. x, clean: [n, *latent], sigma broadcastable."""

    x: Tensor
    clean: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Drawn:
    """Gaussian actions as they were taken: to x_next, around the mean of the policy that sampled.

    mean, x_next: [n, *latent].
    """

    mean: Tensor
    x_next: Tensor


@dataclass(frozen=True)
class Evaluation:
    """How likely the picked actions are now.

    log_prob: [n, *site]. For Gaussian actions also mean [n, *latent], std and step (the time it covers, d >
    0) broadcastable to it, the velocity [n, *latent] that gave the mean, slope (d mean / d velocity = -slope,
    as std) and the action as it was drawn. For samples noised again (`Plan.renoise`) log_prob is 0, and there
    are the velocity and the noised state it was asked at.
    """

    log_prob: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None
    velocity: Tensor | None = None
    step: Tensor | None = None
    noised: Noised | None = None
    slope: Tensor | None = None
    drawn: Drawn | None = None
