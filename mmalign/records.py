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
from typing import Literal

import torch
from torch import Tensor

# What an action of a denoiser is split into: nothing, the frames of the latent of a video, or all its places.
Split = Literal["whole", "frames", "places"]


@dataclass(frozen=True)
class Renoise:
    """How finished samples are noised again; each of the noised states is an action."""

    times: int = 4  # noise levels a sample; more lower the variance and cost forwards
    # schedule: one level drawn in each of `times` equal parts of the sampler's schedule, so as dense as it
    # is; grid: the same, at its points; uniform: in equal parts of sigma.
    law: Literal["schedule", "grid", "uniform"] = "schedule"
    span: tuple[float, float] = (0.0, 1.0)  # part that is used, from noise (0) to clean (1)
    shared: bool = False  # noise the members of a group alike: one noise, equal levels

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"times must be at least 1, got {self.times}")
        if self.law not in ("schedule", "grid", "uniform"):
            raise ValueError(f"law must be one of schedule, grid, uniform, got {self.law!r}")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"span must rise within 0..1, got {self.span}")


@dataclass(frozen=True)
class Plan:
    """How to sample once.

    steps: denoising steps of the schedule. sde_steps: the steps at which noise is drawn and recorded (the
    actions); every other step follows the ODE. levels: the noise level of each action, in place of the
    policy's own. learned: the actions that an update may learn from (None: all). noisy: further steps that
    draw noise; they are no actions, and nothing of them is recorded.

    Where members of a group are one and the same, so that work is done once for all of them:
    share_noise: they start from one initial noise and part at the first noise that is drawn. starts: they
    start from so many, member m from number m % starts. splits: they part little by little, into `ways` at
    each of these actions, until each is a leaf of its own. correlation: of the noises that siblings draw at a
    split, each of which is standard normal.

    What is finished by the ODE; every completion is a view of the sample:
    singular: each action leaves the ODE on its own and is finished on its own, where otherwise actions follow
    one another and the last is finished. values: what each action started from is finished as well, before
    the action, in their order. strides: each of these is finished once per stride, by one step of the
    schedule and then every stride-th. tail: after the last noise, so many steps of DPM-Solver++ over a wider
    grid in place of the schedule's Euler steps; 0: none.

    Methods that take no action while sampling:
    renoise: the finished samples are noised again, and each of the noised states is an action. given: nothing
    is drawn either, the samples are the media that the prompts name; of texts, every token is an action.
    halt: the state so many steps before the end of the ODE is kept, and the update goes on from there, with
    gradients (`contracts.DrawsOn`). noises: fresh noises that are drawn for each sample with it; each counts
    as an action. Beside given samples that are noised again, what is halted is never finished nor decoded.
    """

    steps: int
    sde_steps: tuple[int, ...] = ()
    share_noise: bool = False
    strides: tuple[int, ...] = (1,)
    noisy: tuple[int, ...] = ()
    tail: int = 0
    renoise: Renoise | None = None
    given: bool = False
    halt: int = 0
    noises: int = 1
    levels: tuple[float, ...] | None = None
    learned: tuple[int, ...] | None = None
    starts: int = 1
    splits: tuple[int, ...] = ()
    ways: int = 2
    correlation: float = 0.0
    singular: bool = False
    values: bool = False

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
        if (self.renoise or self.given) and (self.stochastic or self.strides != (1,)):
            raise ValueError(
                f"renoise and given go with no noise in sampling and no strides, got "
                f"sde_steps={self.sde_steps}, noisy={self.noisy}, strides={self.strides}"
            )
        if self.given and self.renoise is None and self.steps > 1:
            raise ValueError("given samples have no actions unless they are noised again: set renoise")
        if not 0 <= self.halt <= self.steps or self.noises < 1:
            raise ValueError(
                f"halt must lie in 0..{self.steps} and noises be at least 1, got {self.halt}, {self.noises}"
            )
        if self.halt and (
            self.stochastic
            or self.strides != (1,)
            or self.tail
            or self.share_noise
            or (self.renoise and not self.given)
        ):
            raise ValueError(
                "a plan with a halt follows the plain ODE, and its samples share nothing and are not noised "
                "again, unless those are given"
            )
        self._check_tree()

    def _check_tree(self) -> None:
        actions = set(self.sde_steps)
        for name, steps in (("splits", self.splits), ("learned", self.learned or ())):
            if list(steps) != sorted(set(steps)) or not actions.issuperset(steps):
                raise ValueError(f"{name} must rise and be among sde_steps={self.sde_steps}, got {steps}")
        if self.learned is not None and actions and not self.learned:
            raise ValueError("learned must name at least one action; None learns from all")
        levels = self.levels or ()
        if self.levels is not None and (len(levels) != len(actions) or not all(v > 0 for v in levels)):
            raise ValueError(f"levels must be positive, one for each of {self.sde_steps}, got {self.levels}")
        if self.starts < 1 or self.ways < 1:
            raise ValueError(f"starts and ways must be at least 1, got {self.starts}, {self.ways}")
        if not self.share_noise and (self.starts > 1 or self.splits):
            raise ValueError("starts and splits are of a group that shares its noise: set share_noise=True")
        if not 0 <= self.correlation < 1:
            raise ValueError(f"correlation must lie in [0, 1), got {self.correlation}")
        if (self.singular or self.values) and not actions:
            raise ValueError("singular and values speak of actions, but sde_steps is empty")
        if self.singular and (self.values or self.splits):
            raise ValueError("singular goes with neither values nor splits: its actions lie side by side")
        if (self.singular or self.values) and (self.noisy or self.tail):
            raise ValueError("singular and values finish every action by the plain ODE: no noisy, no tail")

    @property
    def actions(self) -> int:
        """How many actions each sample takes, S."""
        if self.renoise:
            return self.renoise.times
        return self.noises if self.halt else len(self.sde_steps)

    @property
    def lead(self) -> int:
        """How many steps there are up to the last noise, or to the halt."""
        if self.halt:
            return self.steps - self.halt
        return max(self.stochastic, default=-1) + 1

    @property
    def views(self) -> int:
        """Completions of a sample. View i * len(strides) + j is what was finished i-th, with stride j."""
        actions = len(self.sde_steps)
        return len(self.strides) * (actions if self.singular else actions + 1 if self.values else 1)

    def kin(self, member: Tensor, step: int) -> Tensor:
        """The lowest number among the members that are one with each of `member` [B] before `step`, [B]."""
        if not self.share_noise:
            return member
        parted = 0 if self.singular else sum(s < step for s in self.splits or self.stochastic[:1])
        if parted and not self.splits:
            return member
        return member % (self.starts * int(self.ways**parted))

    def heirs(self, member: Tensor, step: int) -> Tensor:
        """The lowest number among the members that are one with each after the action at `step`, [B]."""
        return member if self.singular else self.kin(member, step + 1)

    def way(self, start: int, stride: int) -> tuple[int, ...]:
        """The places of the schedule that a completion visits: one step, then every stride-th, to the end."""
        return (start, *range(start + 1, self.steps, stride), self.steps) if start < self.steps else (start,)

    def check_group(self, size: int) -> None:
        """Raise ValueError where a group of `size` members does not fill the tree."""
        leaves = self.starts * self.ways ** len(self.splits)
        if self.splits and size != leaves:
            raise ValueError(
                f"prompts.group must be {leaves}: {self.ways} ways at {len(self.splits)} splits"
                + (f" from {self.starts} starts" if self.starts > 1 else "")
                + f", got {size}"
            )
        if size % self.starts:
            raise ValueError(f"prompts.group must be a multiple of its {self.starts} starts, got {size}")

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
    strings. views: completions of one sample (see `Plan`); row b * views + i is completion i of sample b.
    """

    prompts: Prompts
    media: Tensor | list[str]
    views: int = 1


@dataclass(frozen=True)
class Behavior:
    """What drew the actions of a trajectory where it was not the policy itself (`mmalign.mismatch`).

    log_prob: [B, S] there. cap: bound on the importance weight of an action.
    """

    log_prob: Tensor
    cap: float


@dataclass(frozen=True)
class Trajectory:
    """A batch of samples: the outcome, the actions that led to it, and what replays them.

    log_prob: [B, S, *site] under the policy that sampled; S = 0 where nothing was drawn. mask: [B, S] bool,
    False on padding and on what is not learned from. replay: read only by the policy that wrote it; every
    tensor in it starts with B. plan: the one that was followed, and sigmas [steps + 1] the schedule, where
    the policy denoises. behavior: what drew the actions, where another engine did.
    """

    outcome: Outcome
    log_prob: Tensor
    mask: Tensor
    replay: Mapping[str, Tensor]
    plan: Plan | None = None
    sigmas: Tensor | None = None
    behavior: Behavior | None = None

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

    @property
    def mean(self) -> Tensor:
        """Of the valid units of each sample, [B] in float64; NaN where there are none."""
        assert self.valid is not None  # filled in above
        return (self.values.double() * self.valid).sum(1) / self.valid.sum(1)


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

    def take(self, places: Tensor) -> Pick:
        """The actions at `places` [m] (int64)."""
        return Pick(self.rows[places], self.columns[places])


@dataclass(frozen=True)
class Minibatch:
    """Picked actions with the credit that they got; advantage: [K, n, *site], weight and pull: [n, *site].

    fresh: the parameters are still those that sampled.
    """

    trajectory: Trajectory
    pick: Pick
    advantage: Tensor
    weight: Tensor
    fresh: bool = False
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
class Halted:
    """Samples on their way and at their end, for objectives that draw the rest of the way themselves.

    x: [n, *latent], the state at path[0]. path: [halt + 1], the schedule from there to its end. clean, noise:
    [n, *latent], the finished sample and a fresh noise. No gradients.
    """

    x: Tensor
    path: Tensor
    clean: Tensor
    noise: Tensor


@dataclass(frozen=True)
class State:
    """What actions were taken in: x [n, *latent] at sigma [n], for a prompt whose pooled text is [n, D]."""

    x: Tensor
    sigma: Tensor
    text: Tensor


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
