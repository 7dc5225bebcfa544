"""DPOK: a policy gradient with a learned baseline of the value, held near the base model (Fan et al. 2023,
arXiv:2305.16381).

    max  E sum_s (R(x_0, c) - V(x_s, s, c)) log p(x_(s-1) | x_s, c) - kl KL(step | step of the base model)
    min  E sum_s (R(x_0, c) - V(x_s, s, c))^2                              over V, on the same samples

V is a small network of what an action was taken in: the latent, its time and the prompt. A baseline that
does not know the action leaves the expected gradient as it is, whatever V says, and the better V foretells
the reward the less the gradient varies. So V is asked before it is fitted on an iteration's samples: for them
it is a constant, learned from those before. V begins at 0, which is no baseline of its own.

R is the reward in standard deviations about the mean of the batch, one shift and one scale for all samples,
so that V has the same to learn whatever reward there is, and prompts.group may be 1. With compare: group the
shift and scale are those of the prompt's own samples: what a prompt is worth need not be learned then, and V
tells what a state is worth beyond it.

V has three hidden layers whose outputs are scaled by the time, like the public code's, on latents that are
averaged down to `places` along a side and on the pooled text that the policy itself conditions on. Every rank
fits it on the samples of all, in the order of their names, so that it is the same everywhere. Costs as DDPO
with kl: N T forwards to sample, N (T - 1) to train and as many of the reference.

Differs from the public code in that
    the reward is standardized;
    V is asked before it is fitted, and fitted on every action of an iteration once, where the code takes one
    step on five random batches of the newest thousand transitions;
    V sees pooled latents of any size, the policy's own text and a function of the time, where the code's sees
    whole latents of one size, CLIP's text and a factor for each step;
    ratios are bounded on the side to which the advantage pushes, as in PPO, where the code clamps both;
    the last step draws no noise and is no action.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.contracts import Policy, TellsStates
from mmalign.credit import Credit, Peers, zscore
from mmalign.objectives import REFERENCE, ClippedRatio
from mmalign.plans import every_step
from mmalign.randomness import generator, seed_of
from mmalign.records import Advantage, Pick, RewardSignal, Trajectory
from mmalign.sde import Noise
from mmalign.trainer import Algorithm

HARMONICS = 8  # of the time, that scale the layers
GRAD_CLIP = 1.0  # largest norm of the gradient of V


@dataclass(frozen=True)
class ValueSettings:
    """The network of the value, and how it is fitted."""

    learning_rate: float = 1e-3  # of AdamW; raise it where value/explained stays low; 0: V stays at 0
    epochs: int = 1  # passes over the actions of an iteration; more fit it faster, and sooner by heart
    batch: int = 256  # actions of a step of the optimizer
    width: int = 256  # of its hidden layers
    places: int = 8  # of a latent along each side, to which it is averaged; raise it for small objects

    def __post_init__(self) -> None:
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"value.learning_rate must be 0 or more, got {self.learning_rate}")
        for name in ("epochs", "batch", "width", "places"):
            if getattr(self, name) < 1:
                raise ValueError(f"value.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class DPOK:
    """Every step but the last is an action; its reward is compared with what its state led one to expect."""

    steps: int = 50  # denoising steps in training; fewer are faster
    clip: float | None = 1e-4  # trust region of the ratio; null: none, which is REINFORCE in one update
    kl: float = 0.01  # pull towards the base model (published: 0.01 to 0.1); raise it to keep quality
    advantage_clip: float = 5.0  # bound on the advantage
    # batch: rewards count in standard deviations of the whole batch, and groups may have one member. group:
    # in those of the prompt's own samples, which is better where there are several of each.
    compare: Literal["batch", "group"] = "batch"
    value: ValueSettings = field(default_factory=ValueSettings)
    noise: Noise = field(default_factory=lambda: Noise("ddim", 1.0))

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("DPOK needs noise to learn from: noise.level must be above 0 (usual: 1.0)")
        if self.compare not in ("batch", "group"):
            raise ValueError(f"compare must be batch or group, got {self.compare!r}")
        if not self.advantage_clip > 0:
            raise ValueError(f"advantage_clip must be positive, got {self.advantage_clip}")

    @property
    def alone(self) -> bool:
        """Whether prompts.group may be 1."""
        return self.compare == "batch"

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        clip = math.inf if self.clip is None else self.clip
        value = Value(self.value, self.advantage_clip)
        compared = zscore if self.compare == "group" else over_the_batch
        return Algorithm(
            plans=every_step(self.steps),
            credit=OneReturn(weights, compared, "total_first", "whole", clip=math.inf),
            objective=ClippedRatio(clip, clip, self.kl),
            noise=self.noise,
            copies={REFERENCE: 1.0} if self.kl else {},
            alone=self.alone,
            memory=value,
            refine=value.refine,
        )


def over_the_batch(values: Tensor, valid: Tensor, group: Tensor, aligned: bool) -> Tensor:
    """Distance of each unit [N, U] to the mean of all, in their standard deviations."""
    return zscore(values, valid, torch.zeros_like(group), aligned)


@dataclass(frozen=True)
class OneReturn(Credit):
    """What each sample earned, before the baseline and its bound."""

    def __post_init__(self) -> None:
        if self.combine == "apart":
            raise ValueError(
                "DPOK learns the value of one reward a sample, so that rewards cannot be kept apart: take a "
                "composition that adds them up"
            )


class ValueNet(nn.Module):
    """V of features [n, D] at sigma [n]: layers whose outputs are scaled by the time; at first it is 0."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        sizes = (features, width, width)
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.scales = nn.ModuleList(nn.Linear(2 * HARMONICS, width) for _ in sizes)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor, sigma: Tensor) -> Tensor:
        angle = sigma[:, None] * math.pi * torch.arange(1, HARMONICS + 1)
        time, hidden = torch.cat([angle.sin(), angle.cos()], 1), features
        for layer, scale in zip(self.layers, self.scales, strict=True):
            hidden = F.relu(layer(hidden) * (1 + scale(time)))
        value: Tensor = self.head(hidden)[:, 0]
        return value


class Value:
    """The baseline of a run: what it takes off the returns, and what it learns from them.

    The network is made when the first samples tell their sizes. It lives on the CPU, in fp32.
    """

    def __init__(self, settings: ValueSettings, advantage_clip: float) -> None:
        self.settings, self.advantage_clip = settings, advantage_clip
        self.net: ValueNet | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.fits = 0
        self._seen: dict[str, float] = {}

    def refine(self, policy: Policy, trajectory: Trajectory, advantage: Advantage, peers: Peers) -> Advantage:
        """The advantage of every action, of returns [1, B, 1, *1] that stand in its place; then V learns."""
        x, text, sigma = state_features(policy, trajectory, self.settings.places)
        net, optimizer = self._network(x.shape[2] + text.shape[1])
        counted = (advantage.weight.reshape(sigma.shape) > 0).cpu()
        returns = advantage.values[0].flatten(1)[:, :1].cpu()  # [B, 1]
        with torch.no_grad():
            each = zip(x, text, sigma, strict=True)  # a sample at a time: the same in any batch
            value = torch.stack([net(beside(latents, own), time) for latents, own, time in each])
        left = torch.where(counted, returns - value, 0.0)
        rows = [peers.all(rows) for rows in (x, text, sigma, returns, counted.long(), left)]
        self._seen = self._fit(net, optimizer, *rows)
        values = left.clamp(-self.advantage_clip, self.advantage_clip).to(advantage.values)
        sites = [1] * (advantage.values.ndim - 3)
        return replace(advantage, values=values.reshape(1, *values.shape, *sites))

    def _network(self, features: int) -> tuple[ValueNet, torch.optim.Optimizer]:
        if self.net is None or self.optimizer is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of("dpok", "value"))
                self.net = ValueNet(features, self.settings.width)
            self.optimizer = torch.optim.AdamW(self.net.parameters(), self.settings.learning_rate)
        known = self.net.layers[0].in_features
        if known != features:
            raise ValueError(
                f"the value was fitted on states of {known} numbers, and these have {features}: leave "
                "algorithm.value.places, the size of pictures and the model as they were"
            )
        return self.net, self.optimizer

    def _fit(
        self,
        net: ValueNet,
        optimizer: torch.optim.Optimizer,
        x: Tensor,
        text: Tensor,
        sigma: Tensor,
        returns: Tensor,
        counted: Tensor,
        left: Tensor,
    ) -> dict[str, float]:
        """Regress V on the returns of all ranks' actions; gives metrics of how good it was before.

        x: [N, S, P]; text: [N, D]; sigma, counted, left: [N, S]; returns: [N, 1].
        """
        finite = x.isfinite().all(2) & text.isfinite().all(1)[:, None]
        row, column = (counted.bool() & finite).nonzero(as_tuple=True)
        if not len(row):
            return {}
        target, before = returns[row, 0], left[row, column]
        variance = float(target.double().var(correction=0))
        with torch.enable_grad():
            for epoch in range(self.settings.epochs):
                order = torch.randperm(len(row), generator=generator("dpok", "fit", self.fits, epoch))
                for part in torch.split(order, self.settings.batch):
                    at = (row[part], column[part])
                    loss = F.mse_loss(net(beside(x[at], text[row[part]]), sigma[at]), target[part])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    nn.utils.clip_grad_norm_(net.parameters(), GRAD_CLIP)
                    optimizer.step()
        self.fits += 1
        explained = 1 - float(before.double().var(correction=0)) / variance if variance else 0.0
        return {"value/loss": float(before.square().mean()), "value/explained": explained}

    def observe(
        self, signals: Sequence[RewardSignal], trajectory: Trajectory, peers: Peers
    ) -> dict[str, float]:
        return self._seen

    def note(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, object]:
        if self.net is None or self.optimizer is None:
            return {"fits": self.fits, "net": None, "optimizer": None}
        return {
            "fits": self.fits,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fits = state["fits"]
        if state["net"] is None:
            return
        width, features = state["net"]["layers.0.weight"].shape
        if width != self.settings.width:
            raise ValueError(
                f"algorithm.value.width is {self.settings.width}, and the checkpoint's is {width}; go on "
                "with that, or start a fresh run"
            )
        net, optimizer = self._network(features)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = self.settings.learning_rate


def state_features(policy: Policy, trajectory: Trajectory, places: int) -> tuple[Tensor, Tensor, Tensor]:
    """What V sees: latents [B, S, P] and times [B, S] of actions, texts [B, D] of samples; on the CPU."""
    if not isinstance(policy, TellsStates):
        raise TypeError("DPOK needs a policy that tells the states its actions were taken in (`states`)")
    samples, actions = trajectory.mask.shape
    columns, seen = torch.arange(actions), []
    for row in range(samples):  # one prompt at a time, so that none is encoded twice
        state = policy.states(trajectory, Pick(torch.full_like(columns, row), columns))
        seen.append((averaged(state.x, places).flatten(1), state.text[0], state.sigma))
    x, text, sigma = (torch.stack([one.float().cpu() for one in part]) for part in zip(*seen, strict=True))
    return x, text, sigma


def beside(x: Tensor, text: Tensor) -> Tensor:
    """Latents [n, P] and the texts of their prompts, [n, D] or one [D], in one row each."""
    return torch.cat([x, text.expand(len(x), -1)], 1)


def averaged(x: Tensor, places: int) -> Tensor:
    """Latents [n, C, *place] averaged down to at most so many places along each side."""
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[x.ndim - 3]
    pooled: Tensor = pool(x, tuple(min(side, places) for side in x.shape[2:]))
    return pooled
