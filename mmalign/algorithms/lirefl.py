"""LIReFL: latent identity reward feedback learning (DreamVideo-Omni, 2026, arXiv:2603.12257).

A sample is drawn without gradients to a uniformly drawn step m of all, moved on by one step with gradients,
and judged right there, as a noisy latent, by a frozen reward that reads latents. Beside it the model goes on
with supervised learning on real videos, which holds its motion:

    z_m    without gradient,  m ~ Uniform{0, ..., T - 1}
    z      = z_m + (sigma_{m+1} - sigma_m) v(z_m, sigma_m)
    L      = mean w |v(x_t, t) - (e - x_0)|^2  -  lambda_2 R(z, sigma_{m+1})
    w      = lambda_1 where a box of a subject lies, 1 elsewhere

Nothing is decoded in training, so that what the reward is fooled by shows in evaluations alone: watch a
reward of pixels there, by weight 0. lambda_2 = 1 made the paper's model copy the subject and stand still.
With lambda_2 = 0 it is supervised learning, and nothing is drawn.

Each prompt brings its sample, a `video` (a folder of frames; `image` for a model of pictures), and may bring
`boxes`: for each frame null, a box [left, top, right, bottom] in shares of the frame, or a list of them. N
samples of T steps cost N (T - 1) / 2 forwards to sample in the mean, and 2 N to train, twice that with
guidance but for the supervised half.

Differs from the paper in that m is drawn once an iteration, for all samples, as PRFL does
(arXiv:2511.21541), and in that the supervised half has the prompts of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmalign.contracts import Policy
from mmalign.credit import Taught, per_action
from mmalign.forward_process import Matching, renoised
from mmalign.gradients import OnLatents, drawing_on
from mmalign.objectives import Measures
from mmalign.randomness import generator
from mmalign.records import Minibatch, Plan, Renoise
from mmalign.sde import Noise, euler
from mmalign.trainer import Algorithm


@dataclass(frozen=True)
class LIReFL:
    """Learns from real videos, and from a reward that reads latents in the middle of sampling."""

    alone: ClassVar[bool] = True  # nothing is compared, so that prompts.group may be 1

    steps: int = 40  # denoising steps in training
    reward_weight: float = (
        0.1  # lambda_2; raise it until the pixel reward you watch falls; 0: supervised alone
    )
    box_weight: float = 2.0  # lambda_1, of places inside a subject's box; 1 weighs all places alike

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.reward_weight < 0:
            raise ValueError(f"reward_weight must not be negative, got {self.reward_weight}")
        if not self.box_weight > 0:
            raise ValueError(f"box_weight must be positive, got {self.box_weight}")

    def build(self, weights: Mapping[str, float]) -> Algorithm:
        through = OnLatents(weights, cost=lambda plan: 2 if plan.halt else 1)
        return Algorithm(
            plans=self._plans,
            credit=Taught(weights, weigh=per_action),
            objective=Feedback(through, self.reward_weight, self.box_weight),
            noise=Noise(level=0.0),
            through=through,
            alone=True,
        )

    def _plans(self, iteration: int, seed: int) -> list[Plan]:
        step = int(torch.randint(self.steps, (), generator=generator(seed, "halt", iteration)))
        halt = self.steps - step if self.reward_weight else 0
        return [Plan(self.steps, given=True, renoise=Renoise(1), halt=halt)]


@dataclass(frozen=True)
class Feedback:
    """Fit the given samples, and raise the reward of the latent one step behind the halt."""

    reward: OnLatents
    reward_weight: float = 0.1
    box_weight: float = 2.0
    clip_range: float | None = None
    idle_at_zero: bool = False

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        loss = self.supervised(policy, batch)
        measures: Measures = {"supervised_loss": loss.detach()}
        if self.reward_weight:
            model = drawing_on(policy)
            at = model.halted(batch.trajectory, batch.pick)
            sigma, after = at.path[:2]
            z = euler(at.x, model.velocity(batch.trajectory, batch.pick, at.x, sigma), sigma, after)
            reward = self.reward(batch, z, after)
            loss = loss - self.reward_weight * reward
            measures["latent_reward"] = reward.detach()
        return (loss * batch.weight).sum(0, keepdim=True), measures

    def supervised(self, policy: Policy, batch: Minibatch) -> Tensor:
        """The loss of flow matching on the given samples [n], subjects weighted; never with guidance."""
        state, velocity = renoised(policy.evaluate(batch.trajectory, batch.pick, guidance=1.0))
        error = Matching()(state, velocity, sites=velocity.ndim - 2)
        extras = [batch.trajectory.outcome.prompts.extra[row] for row in batch.pick.rows.tolist()]
        inside = torch.stack([covered(extra.get("boxes"), error.shape[1:]) for extra in extras])
        weight = 1 + (self.box_weight - 1) * inside.to(error.device)
        return (weight * error).flatten(1).mean(1)


def covered(boxes: object, place: Sequence[int]) -> Tensor:
    """How much of each place of a latent lies inside a box, [*place] in [0, 1]; 0 where there are none.

    boxes: for each frame None, one box or several, as a prompt has them. place: [f, h, w], or [h, w] of a
    picture. The first frame of a latent stands for one frame, each further one for equally many. Where boxes
    overlap, the one that covers more counts.
    """
    frames, high, wide = (1, *place)[-3:]
    if boxes is None:
        return torch.zeros(*place)
    if not isinstance(boxes, list) or not boxes or (len(boxes) - 1) % max(1, frames - 1):
        raise ValueError(
            f'"boxes" must have an entry for each frame, 1 more than a multiple of {max(1, frames - 1)} for '
            f"{frames} frames of a latent, got {boxes!r:.80}"
        )
    shown = torch.stack(
        [torch.stack([_share(box, high, wide) for box in _listed(row)]).amax(0) for row in boxes]
    )
    if frames == 1:
        return shown.mean(0).reshape(*place)
    later = shown[1:].reshape(frames - 1, -1, high, wide).mean(1)
    return torch.cat([shown[:1], later]).reshape(*place)


def _listed(row: object) -> list[object]:
    """The boxes of one frame; an empty one where there is none."""
    if row is None or row == []:
        return [[0.0, 0.0, 0.0, 0.0]]
    return row if isinstance(row, list) and isinstance(row[0], list) else [row]


def _share(box: object, high: int, wide: int) -> Tensor:
    """The share of each of high x wide places that a box covers."""
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
        raise ValueError(f"a box is [left, top, right, bottom] in shares of the frame, got {box!r}")
    left, top, right, bottom = (float(v) for v in box)
    if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
        raise ValueError(f"a box is [left, top, right, bottom] in shares of the frame, got {box}")

    def along(low: float, up: float, places: int) -> Tensor:
        start = torch.arange(places, dtype=torch.float32)
        return (torch.clamp(start + 1, max=up * places) - torch.clamp(start, min=low * places)).clamp(min=0)

    return along(top, bottom, high)[:, None] * along(left, right, wide)[None]
