"""Which denoising steps are actions.

A plan is a function of (iteration, seed): it keeps no state, so that a resumed run goes on with the plan it
would have had, and every rank draws up the same one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

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
