"""GARDO: a pull to the reference for suspicious samples alone (arXiv:2512.24138), on Flow-GRPO.

    U_i = w(R_i) - mean over the watched rewards of w(R_i^n),   w = share of the batch that scores lower
    KL only for the samples of the highest U, a share of all that grows or shrinks by a tenth when the mean of
    the U that are not negative exceeds or falls below all of the last 20 such means, within 0.02 and 0.2
    reference <- policy   when the mean KL exceeds reset_kl, or after reset_every iterations
    A_i <- A_i d_i        if A_i > 0,   d_i = min over the others of the group of 1 - cos(f_i, f_j)
    A_i  = R_i - mean of the group, not divided by a standard deviation

Watched rewards are those of weight 0. f are features of the pictures: pixels pooled to 16 x 16, or the units
of a watched reward that is named by `features` (the paper: DINOv3).

Costs what Flow-GRPO with kl > 0 costs: N samples of T steps N T forwards to sample, N (T - 1) to train and as
many of the reference, which runs for all samples because the resets go by the KL of all; twice with guidance.
A reset keeps the moments of the optimizer.

The mean of all U is 0 by construction, so that of those that are not negative is followed, as in the public
code. Differs from it in that ranks are taken as defined, where there a low reward ranks high; that the KL of
the gated samples is divided by the number of all, so that a share of 1 is the ordinary KL; and that the loss
is not weighed by the std of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from mmalign.credit import Credit, Locate, Peers, center
from mmalign.objectives import REFERENCE, ClippedRatio, KLForm
from mmalign.plans import every_step
from mmalign.records import Advantage, Outcome, RewardSignal, Trajectory
from mmalign.sde import Noise
from mmalign.trainer import Algorithm

PIXELS, POOLED = "pixels", 16
LEAST, MOST, CHANGE, LOOK_BACK = 0.02, 0.2, 0.1, 20  # of the share that is pulled, as in the paper


@dataclass(frozen=True)
class GARDO:
    """Holds back only what the reward may be wrong about, and rewards variety among the good."""

    steps: int = 10  # denoising steps in training
    clip: float = 1e-4  # trust region of the ratio; made for log-probabilities that are means over the latent
    kl: float = 0.04  # pull of the suspicious samples towards the reference
    kl_form: KLForm = "gaussian"  # gaussian, per_step (Flow-GRPO's early code) or velocity
    share: float = 0.1  # of the samples that are pulled at first; it then adapts within 0.02 and 0.2
    reset_kl: float = (
        3e-4  # mean KL above which the reference moves to the policy; lower it to move on sooner
    )
    reset_every: int = 15  # iterations after which it moves in any case; too often means no pull at all
    features: str = PIXELS  # what variety is seen by: pixels, or a watched reward that speaks in many units
    relative: bool = True  # divide distances by their mean in the group, as the public code does
    advantage_clip: float = 5.0  # bound on the advantage, before variety scales it
    noise: Noise = field(default_factory=lambda: Noise("flow", 0.7))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("GARDO needs noise to learn from: noise.level must be above 0 (usual: 0.7)")
        if not (self.kl > 0 and self.reset_kl > 0):
            raise ValueError(f"kl and reset_kl must be positive, got {self.kl} and {self.reset_kl}")
        if not LEAST <= self.share <= MOST:
            raise ValueError(f"share must lie in {LEAST}..{MOST}, got {self.share}")
        if self.reset_every < 1:
            raise ValueError(f"reset_every must be at least 1, got {self.reset_every}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        watched = [name for name, weight in weights.items() if weight == 0 and name != self.features]
        if not watched:
            raise ValueError(
                "GARDO compares the reward with others that are not trained on: give at least one reward the "
                f"weight 0, got {dict(weights)}"
            )
        if self.features != PIXELS and weights.get(self.features) != 0:
            raise ValueError(f"features must be {PIXELS} or a reward of weight 0, got {self.features!r}")
        memory = Gate(self.share, self.reset_kl, self.reset_every)
        return Algorithm(
            plans=every_step(self.steps),
            credit=GatedCredit(
                weights,
                center,
                "total_first",
                "whole",
                clip=self.advantage_clip,
                gate=memory,
                features=self.features,
                relative=self.relative,
            ),
            objective=ClippedRatio(self.clip, self.clip, self.kl, self.kl_form),
            noise=self.noise,
            copies={REFERENCE: memory.keep},
            memory=memory,
        )


class Gate:
    """How large a share of the samples is pulled, and when the reference moves."""

    def __init__(self, share: float, reset_kl: float, reset_every: int) -> None:
        self.share, self.reset_kl, self.reset_every = share, reset_kl, reset_every
        self.past: list[float] = []
        self.since = 0  # iterations since the reference moved
        self.reset = False

    def look(self, uncertainty: float) -> None:
        """Adapt the share to what was seen in an iteration."""
        self.share = next_share(self.share, uncertainty, self.past)
        self.past = [*self.past, uncertainty][-LOOK_BACK:]

    def observe(
        self, signals: Sequence[RewardSignal], trajectory: Trajectory, peers: Peers
    ) -> dict[str, float]:
        return {}  # the credit has looked

    def note(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        self.since += 1
        self.reset = metrics.get("kl", 0.0) > self.reset_kl or self.since >= self.reset_every
        self.since = 0 if self.reset else self.since
        seen = {"gate/uncertainty": self.past[-1]} if self.past else {}
        return seen | {"gate/share": self.share, "gate/reset": float(self.reset)}

    def keep(self, iteration: int) -> float:
        """How much of itself the reference keeps after an iteration."""
        return 0.0 if self.reset else 1.0

    def state_dict(self) -> dict[str, object]:
        return {"share": self.share, "past": list(self.past), "since": self.since}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.share, self.since = cast(float, state["share"]), cast(int, state["since"])
        self.past = list(cast("list[float]", state["past"]))


def next_share(share: float, uncertainty: float, past: Sequence[float]) -> float:
    """The share after an iteration of this uncertainty, given those before."""
    if past and uncertainty > max(past):
        share *= 1 + CHANGE
    elif past and uncertainty < min(past):
        share *= 1 - CHANGE
    return min(max(share, LEAST), MOST)


def win_rate(values: Tensor, valid: Tensor) -> Tensor:
    """Share of the valid samples that score lower than each, [N]; values, valid: [N]."""
    lower = (values[None, :] < values[:, None]) & valid[None, :]
    return lower.double().sum(1) / valid.sum().clamp(min=1)


def uncertainty(proxy: Tensor, watched: Tensor) -> Tensor:
    """How much better a sample fares with the reward than with those that watch, [N].

    proxy: [N], watched: [N, n]; NaN is no verdict. NaN where the proxy, or all that watch, have none.
    """
    rates = torch.stack([win_rate(v, ~v.isnan()) for v in watched.unbind(1)], 1)
    rates = torch.where(watched.isnan(), torch.nan, rates)
    own = torch.where(proxy.isnan(), torch.nan, win_rate(proxy, ~proxy.isnan()))
    return own - rates.nanmean(1)


def gated(doubt: Tensor, share: float) -> Tensor:
    """The share of the samples with the highest uncertainty, [N]; of equal ones the first, and never NaN."""
    known = ~doubt.isnan()
    order = torch.argsort(torch.where(known, doubt, -torch.inf), descending=True, stable=True)
    chosen = torch.zeros_like(known)
    chosen[order[: round(share * int(known.sum()))]] = True
    return chosen


def distances(features: Tensor, group: Tensor, relative: bool) -> Tensor:
    """1 - cosine to the nearest other member of the group, [N]; features: [N, n].

    relative: divided by the mean over the group. A member without others has 1.
    """
    out = torch.ones(len(group), dtype=torch.float64)
    for one in torch.unique(group):
        rows = (group == one).nonzero().flatten()
        if len(rows) < 2:
            continue
        unit = normalize(features[rows].double(), dim=1)
        apart = (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(torch.inf)
        nearest = apart.amin(1)
        nearest = torch.where(
            nearest < 1e-12, 0.0, nearest
        )  # what is left between equal pictures is rounding
        out[rows] = nearest / nearest.mean() if relative and nearest.sum() > 0 else nearest
    return out


def pixels(outcome: Outcome) -> Tensor:
    """Pooled pixels about gray, [B, n]."""
    assert isinstance(outcome.media, Tensor)
    return adaptive_avg_pool2d(outcome.media.float(), POOLED).flatten(1) - 0.5


@dataclass(frozen=True)
class GatedCredit(Credit):
    """Credit that also scales good samples by their variety, and says which ones are pulled."""

    gate: Gate = field(default_factory=lambda: Gate(0.1, 3e-4, 15))
    features: str = PIXELS
    relative: bool = True

    def __call__(
        self,
        signals: Sequence[RewardSignal],
        trajectory: Trajectory,
        locate: Locate,
        peers: Peers | None = None,
        part: Tensor | None = None,
    ) -> Advantage:
        peers = peers or Peers(trajectory.outcome.prompts)
        found = super().__call__(signals, trajectory, locate, peers, part)
        by_name = {signal.name: signal for signal in signals}
        trained = [weight * by_name[name].mean.cpu() for name, weight in self.weights.items() if weight]
        proxy = torch.stack(trained).sum(0)
        watching = [name for name, weight in self.weights.items() if not weight and name != self.features]
        watched = torch.stack([by_name[name].mean.cpu() for name in watching], 1)
        doubt = uncertainty(peers.all(proxy), peers.all(watched))
        self.gate.look(float(doubt[doubt >= 0].mean()) if (doubt >= 0).any() else 0.0)
        pull = gated(doubt, self.gate.share)[peers.mine]
        seen = (
            pixels(trajectory.outcome) if self.features == PIXELS else by_name[self.features].values.float()
        )
        variety = distances(peers.all(seen), peers.group, self.relative)[peers.mine]
        values, shape = found.values, (-1, *[1] * (found.weight.ndim - 1))
        device = values.device
        scaled = values * variety.float().to(device).reshape(shape)
        return replace(
            found,
            values=torch.where(values > 0, scaled, values),
            pull=pull.float().to(device).reshape(shape),
        )
