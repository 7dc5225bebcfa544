"""Losses that compare actions with each other: members of a group, draws of a sample, wherever they are.

Such a loss L(q) is a function of one number q per action of the whole update. Its gradient is a sum over
actions of dL/dq times the gradient of q. So one look at all actions without gradient, on all ranks, gives
every q and with it every dL/dq; after that each minibatch adds its own part. This is exact for any cut into
minibatches and any deal of samples to ranks, and costs one forward more for each action; but where an update
is a single minibatch, the look is its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmalign.contracts import Policy
from mmalign.credit import Peers
from mmalign.objectives import LAST, Anchor, Measures, frozen, pulled, velocity_of
from mmalign.records import Evaluation, Minibatch


@dataclass(frozen=True)
class Population:
    """All actions of one update on all ranks, N samples in the order of their names, in float64 on the CPU.

    now: the live policy's number for each action, with gradient, and frozen: those of copies, by name, [N, S]
    each. advantage: [K, N, S]. weight: [N, S], 0 for what takes no part in this update; group: [N].
    """

    now: Tensor
    frozen: dict[str, Tensor]
    advantage: Tensor
    weight: Tensor
    group: Tensor
    _row: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_row", torch.unique(self.group, return_inverse=True)[1])

    def total(self, x: Tensor) -> Tensor:
        """Sum over the members of each group that count, given back to each of them; x: [..., N, S]."""
        counted = torch.where(self.weight > 0, x, 0.0)
        sums = counted.new_zeros(*x.shape[:-2], int(self._row.max()) + 1, x.shape[-1])
        return sums.index_add(-2, self._row, counted)[..., self._row, :]


Number = Callable[[Evaluation], Tensor]  # of each action, [n], differentiable
Loss = Callable[[Population], tuple[Tensor, Measures]]  # ([K], measures [N, S])


@dataclass(frozen=True)
class Coupled:
    """An objective given by a number for each action and a loss of all these numbers.

    against: copies whose numbers the loss needs too. anchors: pulls that each action feels by itself.
    """

    number: Number
    loss: Loss
    against: tuple[str, ...] = ()
    anchors: tuple[Anchor, ...] = ()
    clip_range: float | None = None
    idle_at_zero: bool = False

    def look(
        self,
        policy: Policy,
        batches: Sequence[Minibatch],
        advantage: Tensor,
        weight: Tensor,
        peers: Peers,
    ) -> Slopes:
        """Ask the live policy and all copies about every action, and differentiate the loss.

        batches: the minibatches of this update, of which every rank has equally many. advantage: [K, B, S];
        weight: [B, S], 0 outside of this update.
        """
        if weight.ndim > 2:
            raise TypeError("this method needs one number an action, but the policy splits it into places")
        numbers = {name: torch.zeros_like(weight) for name in ("", *self.against)}
        held = [torch.empty(0, device=weight.device)] * len(self.anchors)
        for batch in batches:
            at = (batch.pick.rows, batch.pick.columns)
            asked = {
                name: frozen(policy, batch, name)
                for name in self.against
                if not (batch.fresh and name == LAST)  # the live parameters are these
            }
            for name, found in asked.items():
                numbers[name][at] = self.number(found)
            for i, anchor in enumerate(self.anchors):
                known = asked.get(anchor.copy) if anchor.guidance is None else None
                velocity = velocity_of(known) if known else anchor.velocity(policy, batch)
                if not len(held[i]):
                    held[i] = velocity.new_zeros(*weight.shape, *velocity.shape[1:])
                held[i][at] = velocity
            with torch.set_grad_enabled(len(batches) == 1):
                now = policy.evaluate(batch.trajectory, batch.pick)
            numbers[""][at] = self.number(now).detach()
        if LAST in numbers and all(batch.fresh for batch in batches):
            numbers[LAST] = numbers[""]
        every = {name: peers.all(rows).double() for name, rows in numbers.items()}
        live = every.pop("").requires_grad_()
        advantages = torch.stack([peers.all(rows).double() for rows in advantage])
        everyone = Population(live, every, advantages, peers.all(weight.double()), peers.group)
        losses, measures = self.loss(everyone)
        slopes = torch.stack([torch.autograd.grad(one, live, retain_graph=True)[0] for one in losses])
        place = weight.device
        return Slopes(
            self,
            slopes[:, peers.mine].float().to(place),
            (losses.detach() / everyone.weight.sum().clamp(min=1e-12)).float().to(place),
            {name: x.detach()[peers.mine].to(place) for name, x in measures.items()},
            held,
            now if len(batches) == 1 else None,
        )


@dataclass(frozen=True)
class Slopes:
    """A coupled loss made into one of each action by itself: its slope [K, B, S] times its number.

    losses: [K], per unit of weight. held: the velocities of the anchors, [B, S, *latent]. now: what the live
    policy found, with its graph, where there is but one minibatch.
    """

    objective: Coupled
    slope: Tensor
    losses: Tensor
    measures: Measures
    held: Sequence[Tensor]
    now: Evaluation | None

    @property
    def clip_range(self) -> float | None:
        return self.objective.clip_range

    @property
    def idle_at_zero(self) -> bool:
        return self.objective.idle_at_zero

    def __call__(self, policy: Policy, batch: Minibatch) -> tuple[Tensor, Measures]:
        rows, columns = batch.pick.rows, batch.pick.columns
        now = self.now or policy.evaluate(batch.trajectory, batch.pick)
        share = (self.slope[:, rows, columns] * self.objective.number(now) * (batch.weight > 0)).sum(1)
        # The gradient is that of `share`, the value this minibatch's part of the true loss.
        losses = share - share.detach() + self.losses * batch.weight.sum()
        measures = {name: x[rows, columns] for name, x in self.measures.items()}
        if self.held:
            there = [velocity[rows, columns] for velocity in self.held]
            penalty, pulls = pulled(self.objective.anchors, there, velocity_of(now), batch.advantage)
            measures |= pulls
            pull = torch.as_tensor(penalty * batch.weight).sum()
            losses = losses + pull if len(losses) == 1 else torch.cat([losses, pull[None]])
        return losses, measures
