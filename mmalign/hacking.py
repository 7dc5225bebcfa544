"""Where the reward that is trained on and rewards that only watch part: the sign of a reward that is hacked.

Evaluations during training score the same prompts from the same noise. A watching reward and a trained one
part at the step at which the watching one was best, if from there to the end it fell and the trained one
rose, each with a 95 % bootstrap interval over prompts on one side of 0. The best step is picked on one half
of the prompts and the fall measured on the other, or the best of many noisy steps would always seem to be
followed by a fall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from mmalign.evaluation import Evaluated, Score, score


@dataclass(frozen=True)
class Parting:
    """What a trained and a watching reward did from the step at which the watching one was best.

    rise, fall: gain of each from there to the end. parted: both intervals lie on their side of 0.
    """

    trained: str
    watching: str
    step: int
    rise: Score
    fall: Score

    @property
    def parted(self) -> bool:
        return self.rise.low > 0 > self.fall.high


def partings(
    steps: Sequence[int], evaluated: Sequence[Evaluated], trained: Sequence[str], watching: Sequence[str]
) -> list[Parting]:
    """Every trained reward against every watching one, over evaluations at rising steps."""
    if len(steps) != len(evaluated) or list(steps) != sorted(set(steps)):
        raise ValueError(
            f"evaluations must be at rising steps, got {list(steps)} for {len(evaluated)} of them"
        )
    curves = {name: curve(evaluated, name) for name in (*trained, *watching)}
    found = []
    for one, other in product(trained, watching):
        rises, falls = curves[one], curves[other]
        if rises is None or falls is None or len(steps) < 3:
            continue
        best = int(falls[:, ::2].nanmean(1).argmax())
        rise, fall = (measured(x[-1] - x[best], half) for x, half in ((rises, 0), (falls, 1)))
        found.append(Parting(one, other, steps[best], rise, fall))
    return found


def curve(evaluated: Sequence[Evaluated], name: str) -> Tensor | None:
    """A score by evaluation and prompt, [T, N]; None where an evaluation lacks it."""
    rows = [e.by_prompt.get(name) for e in evaluated]
    if any(row is None for row in rows) or len({len(row) for row in rows if row is not None}) != 1:
        return None
    return torch.tensor([row for row in rows if row is not None], dtype=torch.float64)


def measured(gain: Tensor, half: int) -> Score:
    """A gain over prompts [N] with its interval; half: 1 takes every second prompt, from the second on."""
    gain = gain[1::2] if half else gain
    return score(gain, torch.arange(len(gain)))


def trained_on(config: Mapping[str, object]) -> list[str]:
    """The rewards with a weight, of a run's settings as its config.yaml has them."""
    rewards = config.get("rewards")
    found = []
    for name, given in rewards.items() if isinstance(rewards, Mapping) else ():
        weight = given.get("weight", 1.0) if isinstance(given, Mapping) else given
        weights = weight.values() if isinstance(weight, Mapping) else [weight]
        if any(weights):
            served = given.get("reward") if isinstance(given, Mapping) else None
            found.append(str(served if name.startswith("remote") and served else name))
    return found
