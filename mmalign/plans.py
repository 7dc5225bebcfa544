"""Which denoising steps are actions.

A plan is a function of (iteration, seed): it keeps no state, so that a resumed run goes on with the plan it
would have had, and every rank draws up the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmalign.randomness import generator
from mmalign.records import Plan, Renoise

PlanAt = Callable[[int, int], list[Plan]]  # (iteration, seed) -> how to sample in that iteration


def every_step(steps: int, share_noise: bool = False) -> PlanAt:
    """Flow-GRPO: an action at every step but the last, which draws no noise."""
    if steps < 2:
        raise ValueError(f"steps must be at least 2, because the last step draws no noise; got {steps}")
    return lambda iteration, seed: [Plan(steps, tuple(range(steps - 1)), share_noise)]


def forward_process(steps: int, renoise: Renoise, given: bool = False, tail: int = 0) -> PlanAt:
    """DiffusionNFT and its kin: samples of the plain ODE, or given ones, noised again; tail: see `Plan`."""
    return lambda iteration, seed: [Plan(steps, renoise=renoise, given=given, tail=tail)]


def texts() -> PlanAt:
    """Captioners: a text is written word by word, and every word is an action."""
    return lambda iteration, seed: [Plan(1)]


def references() -> PlanAt:
    """Captioners: nothing is written, the texts are the references that the prompts bring."""
    return lambda iteration, seed: [Plan(1, given=True)]


def window(steps: int, start: int, width: int, share_noise: bool = False, rate: float = 0.0) -> Plan:
    """`width` actions in a row; rate: see `tail_steps`."""
    tail = tail_steps(steps - start - width, rate)
    return Plan(steps, tuple(range(start, start + width)), share_noise, tail=tail)


def tail_steps(left: int, rate: float) -> int:
    """How many steps of second order take the place of the last `left`, by the share `rate`; 0: none do."""
    return max(math.floor(rate * left + 1e-9), 1) if rate else 0  # 0.29 * 100 is a little below 29


def random_window(steps: int, width: int, starts: range, share_noise: bool, rate: float = 0.0) -> PlanAt:
    """Flow-GRPO-Fast: `width` actions in a row, from a start that each iteration draws for all groups."""
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if not starts or starts[0] < 0 or starts[-1] + width > steps - 1:
        raise ValueError(
            f"a window of {width} must start within 0..{steps - 1 - width} of {steps} steps "
            f"(the last step draws no noise), got {starts}"
        )

    def at(iteration: int, seed: int) -> list[Plan]:
        draw = torch.randint(len(starts), (), generator=generator(seed, "window", iteration))
        return [window(steps, starts[int(draw)], width, share_noise, rate)]

    return at


def sliding_window(
    steps: int,
    width: int,
    stay: Callable[[int], int],
    stride: int = 1,
    share_noise: bool = False,
    rate: float = 0.0,
) -> PlanAt:
    """MixGRPO: a window that begins at the noise and moves on by `stride` steps, until it is at the end.

    stay: for how many iterations, 1 or more, it stays where it starts at this step.
    """
    last = steps - 1 - width
    if width < 1 or last < 0:
        raise ValueError(f"width must lie in 1..{steps - 1} for {steps} steps, got {width}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")

    def at(iteration: int, seed: int) -> list[Plan]:
        start = 0
        while start < last and iteration >= stay(start):
            iteration -= stay(start)
            start = min(start + stride, last)
        return [window(steps, start, width, share_noise, rate)]

    return at


def random_steps(
    steps: int, count: int, among: range, share_noise: bool = False, noise_at_all: bool = False
) -> PlanAt:
    """`count` actions at steps that each iteration draws for all groups.

    noise_at_all: the other steps draw noise as well (DanceGRPO), all but the last; else they follow the ODE.
    """
    if not 1 <= count <= len(among) or among[0] < 0 or among[-1] > steps - 2:
        raise ValueError(
            f"1..{len(among)} actions can be drawn from the steps {among} of {steps} (the last draws no "
            f"noise), got {count}"
        )

    def at(iteration: int, seed: int) -> list[Plan]:
        order = torch.randperm(len(among), generator=generator(seed, "steps", iteration))
        actions = tuple(sorted(among[int(i)] for i in order[:count]))
        others = tuple(i for i in range(steps - 1) if i not in actions) if noise_at_all else ()
        return [Plan(steps, actions, share_noise, noisy=others)]

    return at


def in_turn(among: Sequence[int], count: int, plan: Callable[[tuple[int, ...]], Plan]) -> PlanAt:
    """`count` actions an iteration, in turn from the steps `among`, by the plan that is made of them."""
    if not 1 <= count <= len(among):
        raise ValueError(f"of {len(among)} steps 1..{len(among)} can take a turn at a time, got {count}")

    def at(iteration: int, seed: int) -> list[Plan]:
        turn = [among[(iteration * count + i) % len(among)] for i in range(count)]
        return [plan(tuple(sorted(turn)))]

    return at


def forwards(plan: Plan, group: Tensor, member: Tensor, each: int = 1) -> tuple[int, int]:
    """Network rows, without guidance, that sample these members and that learn once from their actions.

    group, member: [B]. A state that several are in is one row; so are completions as long as they have come
    the same way. each: forwards that learning from an action takes where no action is a step of sampling.
    """

    def states(kin: Tensor) -> int:
        return len(torch.unique(torch.stack([group, kin], 1), dim=0))

    train = 0 if plan.sde_steps else states(member) * plan.actions * each
    before = [states(plan.kin(member, step)) for step in range(plan.lead)]
    if plan.given:
        return sum(before) if plan.halt else 0, train
    leaves = [(step + 1, before[step]) for step in plan.sde_steps if plan.values]
    if plan.singular:
        leaves += [(step + 1, states(member)) for step in plan.sde_steps]
    else:
        leaves.append((plan.lead, states(plan.kin(member, plan.lead))))
    sample = sum(before)
    if plan.tail:
        sample, leaves = sample + plan.tail * leaves[0][1], []
    for start, rows in leaves:
        ways = [plan.way(start, stride) for stride in plan.strides]
        sample += rows * len({way[:end] for way in ways for end in range(1, len(way))})
    learned = plan.sde_steps if plan.learned is None else plan.learned
    return sample, train + sum(before[step] for step in learned)
