"""Which denoising steps are actions.

A plan is a function of (iteration, seed): it keeps no state, so that a resumed run goes on with the plan it
would have had, and every rank draws up the same one.
"""

from __future__ import annotations

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


def forward_process(steps: int, renoise: Renoise, given: bool = False) -> PlanAt:
    """DiffusionNFT and its kin: samples of the plain ODE, or given ones, noised again."""
    return lambda iteration, seed: [Plan(steps, renoise=renoise, given=given)]


def random_window(steps: int, width: int, starts: range, share_noise: bool) -> PlanAt:
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
        start = starts[int(draw)]
        return [Plan(steps, tuple(range(start, start + width)), share_noise)]

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
    if plan.given:
        return 0, train
    before = [states(plan.kin(member, step)) for step in range(plan.lead)]
    leaves = [(step + 1, before[step]) for step in plan.sde_steps if plan.values]
    if plan.singular:
        leaves += [(step + 1, states(member)) for step in plan.sde_steps]
    else:
        leaves.append((plan.lead, states(plan.kin(member, plan.lead))))
    sample = sum(before)
    for start, rows in leaves:
        ways = [plan.way(start, stride) for stride in plan.strides]
        sample += rows * len({way[:end] for way in ways for end in range(1, len(way))})
    learned = plan.sde_steps if plan.learned is None else plan.learned
    return sample, train + sum(before[step] for step in learned)
