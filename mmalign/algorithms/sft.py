"""Supervised fine-tuning on the references of the prompts, the usual warm start of everything else.

    L = - sum_i,t w_i,t log p(y_t | y_<t, picture, prompt)

over the tokens of the references y, cut at `policy.text.max_tokens`. Weights: `token`, every token counts
alike; `text`, every text does. It is a method like the others, because all that differs is where the texts
come from (`Plan.given`) and what an update makes of them: settings, checkpoints, evaluation, ranks and
reports are those of every run. Rewards judge the references, and the model's own texts in the evaluation;
none of them is learned from.

B references cost no row to sample and B in the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mmalign.contracts import Policy
from mmalign.credit import Taught, per_action, per_sample
from mmalign.objectives import Measures
from mmalign.plans import references
from mmalign.records import Minibatch
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class SFT:
    """Learns the references of the prompts: where another method begins (`policy.weights`)."""

    alone: ClassVar[bool] = True  # nothing is compared, so that prompts.group may be 1

    length: Literal["token", "text"] = "token"  # what counts alike: every token, or every text

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        weigh = per_action if self.length == "token" else per_sample
        return Algorithm(
            plans=references(),
            credit=Taught(weights, weigh=weigh),
            objective=Likelihood(),
            noise=Noise(),
            alone=True,
        )


@dataclass(frozen=True)
class Likelihood:
    """Minus the log-likelihood of the actions that were given."""

    @property
    def clip_range(self) -> float | None:
        return None

    @property
    def idle_at_zero(self) -> bool:
        return False

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        surprise = -policy.evaluate(batch.trajectory, batch.pick).log_prob
        return (surprise * batch.weight).sum()[None], {"token_loss": surprise.detach()}
