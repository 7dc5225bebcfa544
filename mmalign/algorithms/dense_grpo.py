"""DenseGRPO: every step is rewarded for what it gains (arXiv:2601.20218).

The ODE takes any latent to an image, so the reward of that image is the value of the latent, and no critic is
needed. A step's reward is what its noise added to the value:

    R_t  = R(ODE(x_t))                         of every state of the trajectory, R_0 before the first action
    dR_t = R_{t+1} - R_t                       they add up to R(x) - R(ODE of the initial noise)
    A_t  = (dR_t - mean_i) / std_i             over the group, for each step; then as Flow-GRPO

Exploration calibration: each step has a noise level psi_t of its own. While gains and losses at the step
balance, it is raised, and lowered once losses prevail: too much noise makes nearly every gain negative.

N samples of T steps cost N T (T + 1) / 2 forwards to sample, because the ODE from x_t begins with the
velocity that its action needs as well, and N (T - 1) to train, as much again of the reference where kl > 0;
twice with guidance. N T pictures are decoded and judged.

Neither the rate nor the tolerance of the calibration is stated in the paper, and no code is public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from mmalign.credit import Credit, Peers, zscore
from mmalign.objectives import REFERENCE, ClippedRatio, KLForm
from mmalign.records import Plan, RewardSignal, Steps, Trajectory, Unit
from mmalign.sde import Noise
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class DenseGRPO:
    """A reward for every denoising step, at the price of an image for every denoising step."""

    steps: int = 10  # denoising steps in training; the cost grows with their square
    calibrate: float = 0.02  # share by which a step's noise level moves an iteration; 0: all stay as they are
    tolerance: float = 0.1  # of the share of positive gains below one half, before a level is lowered
    clip: float = 1e-4  # trust region of the ratio; made for log-probabilities that are means over the latent
    kl: float = 0.04  # pull towards the base model; raise it to keep quality and diversity, 0 saves a forward
    kl_form: KLForm = "gaussian"  # gaussian, per_step (Flow-GRPO's early code) or velocity
    advantage_clip: float = 5.0  # bound on the advantage
    noise: Noise = field(default_factory=lambda: Noise("flow", 0.7))  # its level is where calibration begins

    def __post_init__(self) -> None:
        if self.noise.level == 0:
            raise ValueError("DenseGRPO needs noise to learn from: noise.level must be above 0 (usual: 0.7)")
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, the last draws no noise; got {self.steps}")
        if not (0 <= self.calibrate < 1 and 0 <= self.tolerance < 0.5):
            raise ValueError(
                f"calibrate must lie in [0, 1) and tolerance in [0, 0.5), got {self.calibrate}, "
                f"{self.tolerance}"
            )

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        credit = Credit(weights, zscore, "total_first", clip=self.advantage_clip, read=gains)
        calibration = Calibration(credit, self.steps - 1, self.noise, self.calibrate, self.tolerance)
        return Algorithm(
            plans=partial(plans, self.steps, calibration),
            credit=credit,
            objective=ClippedRatio(self.clip, self.clip, self.kl, self.kl_form),
            noise=self.noise,
            copies={REFERENCE: 1.0} if self.kl else {},
            memory=calibration,
        )


def gains(signal: RewardSignal, trajectory: Trajectory, peers: Peers) -> RewardSignal:
    """What each action added to the value: from values of states [B, S + 1] to [B, S]."""
    values, valid = signal.values, signal.valid
    assert valid is not None  # filled in by RewardSignal
    index = torch.arange(values.shape[1] - 1).expand(len(values), -1)
    return replace(
        signal,
        values=values[:, 1:] - values[:, :-1],
        valid=valid[:, 1:] & valid[:, :-1],
        unit=Unit.STEP,
        where=Steps(index),
        details=None,
    )


class Calibration:
    """The noise level psi of each step, moved to where gains and losses still balance."""

    def __init__(self, credit: Credit, actions: int, noise: Noise, rate: float, tolerance: float) -> None:
        self.levels = (noise.level,) * actions
        self._credit, self._rate, self._tolerance = credit, rate, tolerance
        self._most = 1.0 if noise.kind == "cps" else math.inf

    def observe(
        self, signals: Sequence[RewardSignal], trajectory: Trajectory, peers: Peers
    ) -> dict[str, float]:
        ((_, gain),) = self._credit.units(signals, trajectory, peers)
        # A gain without a verdict is 0, and so on neither side.
        up, down = (peers.all((side * gain.values > 0).long()).sum(0) for side in (1, -1))
        share = [u / (u + d) if u + d else None for u, d in zip(up.tolist(), down.tolist(), strict=True)]
        self.levels = tuple(
            psi if positive is None else self.moved(psi, positive)
            for psi, positive in zip(self.levels, share, strict=True)
        )
        metrics = {f"psi/{step}": psi for step, psi in enumerate(self.levels)}
        return metrics | {f"gains/positive/{i}": s for i, s in enumerate(share) if s is not None}

    def note(self, iteration: int, metrics: Mapping[str, float]) -> dict[str, float]:
        return {}  # all that counts was in the batch

    def moved(self, psi: float, positive: float) -> float:
        """A level after `positive` of the gains at its step were positive."""
        raise_it = positive >= 0.5 - self._tolerance
        return min(psi * (1 + self._rate if raise_it else 1 - self._rate), self._most)

    def state_dict(self) -> dict[str, object]:
        return {"levels": list(self.levels)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.levels = tuple(state["levels"])


def plans(steps: int, calibration: Calibration, iteration: int, seed: int) -> list[Plan]:
    """Every step but the last, at its level, and the value of every state."""
    return [Plan(steps, tuple(range(steps - 1)), values=True, levels=calibration.levels)]
