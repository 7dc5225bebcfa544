"""Samples drawn in parts, each judged while the next one is drawn.

The noise of a sample is keyed by its name and a reward sees one outcome at a time, so parts change no result
(but for the rounding of kernels that depends on the batch). Judges of pairs speak when all parts are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from mmalign.contracts import Key, Policy
from mmalign.credit import Gather
from mmalign.health import Clock
from mmalign.records import Outcome, Plan, Prompts, Trajectory
from mmalign.scoring import Scorer, Scores


def parts_of(prompts: Prompts, count: int) -> list[Tensor]:
    """The rows of at most `count` parts of about equal size, none of which parts a group, in order."""
    new = torch.ones(len(prompts), dtype=torch.long)
    new[1:] = (prompts.group.diff() != 0).long()
    group = new.cumsum(0) - 1
    groups = int(group[-1]) + 1
    part = group * min(count, groups) // groups
    return [(part == number).nonzero().flatten() for number in range(min(count, groups))]


def sample_and_judge(
    policy: Policy,
    scorer: Scorer,
    prompts: Prompts,
    plan: Plan,
    key: Key,
    parts: int,
    clock: Clock,
    gather: Gather,
) -> tuple[Trajectory, Scores]:
    """One batch and its verdicts; the clock's phase "reward" is how long they are waited for."""
    with ThreadPoolExecutor(1, "judge") as judge:
        drawn, judged = [], []
        try:
            for some in parts_of(prompts, parts):
                with clock("sample"):
                    drawn.append(policy.sample(prompts.take(some), plan, key))
                judged.append(judge.submit(scorer.singles, drawn[-1].outcome))
            with clock("reward"):
                found = [future.result() for future in judged]
        except BaseException:
            for future in judged:
                future.cancel()
            raise
    trajectory = joined(drawn)
    with clock("reward"):
        return trajectory, scorer.conclude(trajectory.outcome, found, gather)


def joined(parts: Sequence[Trajectory]) -> Trajectory:
    """Trajectories under one plan as one; TypeError where their shapes do not fit together."""
    if len(parts) == 1:
        return parts[0]
    shapes = [[x.shape[1:] for x in _tensors(part)] for part in parts]
    if any(shape != shapes[0] for shape in shapes):
        raise TypeError(
            "this policy's samples have different lengths in different parts, so that they cannot be drawn "
            "in parts: set training.overlap=1"
        )
    first, prompts = parts[0], [part.outcome.prompts for part in parts]
    media = [part.outcome.media for part in parts]
    tensors = [one for one in media if isinstance(one, Tensor)]
    together = Prompts(
        [text for one in prompts for text in one.text],
        torch.cat([one.group for one in prompts]),
        torch.cat([one.member for one in prompts]),
        [extra for one in prompts for extra in one.extra],
    )
    outcome = Outcome(
        together,
        torch.cat(tensors) if tensors else [text for one in media for text in one],
        first.outcome.views,
    )
    return replace(
        first,
        outcome=outcome,
        log_prob=torch.cat([part.log_prob for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        replay={name: torch.cat([part.replay[name] for part in parts]) for name in first.replay},
        behavior=first.behavior
        and replace(
            first.behavior, log_prob=torch.cat([p.behavior.log_prob for p in parts if p.behavior is not None])
        ),
    )


def _tensors(trajectory: Trajectory) -> Iterator[Tensor]:
    yield from (trajectory.log_prob, trajectory.mask, *trajectory.replay.values())
    if isinstance(trajectory.outcome.media, Tensor):
        yield trajectory.outcome.media
