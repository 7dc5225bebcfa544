"""GRPO for models that write (arXiv:2402.03300), with the choices of its successors named.

    A_i = (R_i - mean R) / std R        over the G texts of a picture; std: none leaves out the division
    r_t = p(y_t) / p_old(y_t)                                                                 ratio: token
    r_t = (p(y) / p_old(y))^(1/|y|)     the same for every token of y                         ratio: sequence
    J   = sum_i,t w_i,t min(r A_i, clip(r, 1 - low, 1 + high) A_i) - kl KL_t

Weights of the tokens: `token`, 1 over the tokens of the update, so that every token counts alike (DAPO,
arXiv:2503.14476); `text`, 1 / (B |y_i|), so that every text does (GRPO), which punishes long wrong texts less
for each token. Dr. GRPO (arXiv:2503.20783) is `std: none, length: token`, up to the mean length of the texts,
by which it does not divide. GSPO (arXiv:2507.18071) is `ratio: sequence, length: text` with a clip of 3e-4
and 4e-4, because the mean over a text hardly moves. The KL is the estimate exp(l) - l - 1 of each token.

B texts cost B rows to sample and B in each update, and B of the reference where kl > 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmalign.contracts import Policy
from mmalign.credit import Credit, center, per_action, per_sample, zscore
from mmalign.objectives import REFERENCE, ClippedRatio, Measures, clipped_gain, penalized, ratio_measures
from mmalign.plans import texts
from mmalign.records import Evaluation, Minibatch
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class GRPO:
    """Writes several texts about each picture and learns from which of them were better."""

    ratio: Literal["token", "sequence"] = "token"  # what is compared with the policy that sampled
    length: Literal["token", "text"] = "token"  # what counts alike: every token, or every text
    std: Literal["group", "none"] = "group"  # whether the advantage is divided by the group's std
    clip: float = 0.2  # how far a probability may fall, as a share of itself
    clip_high: float = 0.28  # how far it may rise; higher keeps rare tokens alive
    kl: float = 0.0  # pull towards the base model; usual are 0.001 to 0.04
    advantage_clip: float = 5.0  # bound on the advantage

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        objective = SequenceRatio if self.ratio == "sequence" else ClippedRatio
        return Algorithm(
            plans=texts(),
            credit=Credit(
                weights,
                zscore if self.std == "group" else center,
                "total_first",
                "whole",
                per_action if self.length == "token" else per_sample,
                self.advantage_clip,
            ),
            objective=objective(self.clip, self.clip_high, self.kl),
            noise=Noise(),
            copies={REFERENCE: 1.0} if self.kl else {},
        )


@dataclass(frozen=True)
class SequenceRatio(ClippedRatio):
    """The clipped ratio of whole texts, length-normalized; a minibatch holds whole texts."""

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        text = torch.unique(batch.pick.rows, return_inverse=True)[1].to(batch.log_prob.device)

        def gain(new: Evaluation) -> tuple[Tensor, Measures]:
            each = new.log_prob - batch.log_prob
            total = each.new_zeros(int(text.max()) + 1).index_add(0, text, each)
            log_ratio = (total / torch.bincount(text))[text]
            gained = clipped_gain(log_ratio, batch.advantage, self.low, self.high)
            return gained, ratio_measures(log_ratio, self.low, self.high)

        return penalized(policy, batch, gain, self.kl, self.kl_form)
