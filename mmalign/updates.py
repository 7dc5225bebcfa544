"""From a loss per objective to the gradient of the parameters: added up, or balanced as in MARBLE.

MARBLE (arXiv:2605.06507) keeps one gradient g_k per reward, all of the same batch, and goes in the direction
of the shortest vector between their unit vectors,

    u_k = g_k / |g_k|        a = argmin |sum_k a_k u_k|^2 over a >= 0, sum_k a_k = 1        d = sum_k a_k u_k

which worsens no reward: <d, u_k> >= |d|^2 for every k. It is given the mean length of the g_k. Finding it
costs K backward passes, so it is done in every `every`-th update; the others take one, of sum_k b_k loss_k
with b the moving average of a. The K losses share one forward, so this is exact for any objective, whether it
is affine in its advantage (where it equals the loss of sum_k b_k A_k) or clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Backward = Callable[[Tensor], None]  # adds the gradient of a scalar to the parameters
Total = Callable[[Tensor], Tensor]  # a sum over ranks, the same on all of them

TINY = 1e-12  # a gradient shorter than that has no direction


class Update(Protocol):
    """Makes one gradient of the losses of several objectives, one minibatch after another."""

    def begin(self, names: Sequence[str], speaks: Sequence[bool]) -> bool:
        """Start an update; gives whether ranks are to exchange the gradients of its last minibatch.

        names: the objectives. speaks: whether an objective has an advantage other than 0 on any rank.
        """
        ...

    def add(self, losses: Tensor, parameters: Sequence[nn.Parameter], backward: Backward) -> None:
        """Take in a minibatch; losses: [K], or [K + 1] where the last is a pull that is no objective."""
        ...

    def finish(self, parameters: Sequence[nn.Parameter], total: Total) -> Mapping[str, float]:
        """Leave the gradient in the parameters; gives metrics."""
        ...

    def state_dict(self) -> dict[str, object]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Summed:
    """Add the objectives up."""

    def begin(self, names: Sequence[str], speaks: Sequence[bool]) -> bool:
        return True

    def add(self, losses: Tensor, parameters: Sequence[nn.Parameter], backward: Backward) -> None:
        backward(losses.sum())

    def finish(self, parameters: Sequence[nn.Parameter], total: Total) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def min_norm(gram: Tensor) -> Tensor:
    """The a >= 0, sum a = 1, that make a' Q a least; gram: Q = [K, K], float64 on the CPU.

    Q is split into P'P and the least-distance problem solved by non-negative least squares (Lawson and Hanson
    1974, 23.4): with u >= 0 of the least |P u|^2 + (sum u - 1)^2, a = u / sum u. Exact up to rounding.
    """
    from scipy.optimize import nnls

    values, vectors = torch.linalg.eigh(gram)
    points = values.clamp(min=0).sqrt()[:, None] * vectors.T
    matrix = torch.cat([points, points.new_ones(1, len(gram))])
    target = np.zeros(len(gram) + 1)
    target[-1] = 1.0
    found = torch.from_numpy(nnls(matrix.numpy(), target)[0])
    return found / found.sum()


@dataclass
class Balanced:
    """One direction that worsens no objective (MARBLE).

    shares: min_norm, as above; equal: the mean of the gradients, whose cosines are measured alike, to compare
    with. Copies of K gradients are held while the shares are found anew, and parameters must not be sharded.
    """

    every: int = 10  # updates between two looks at the gradients apart; 1 costs K backward passes each time
    keep: float = 0.7  # of the shares at each look; 0 takes the newest alone
    shares: Literal["min_norm", "equal"] = "min_norm"
    held: dict[str, float] = field(default_factory=dict)  # the shares by objective, smoothed
    count: int = 0  # updates so far

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep must lie in [0, 1), got {self.keep}")
        self._names: tuple[str, ...] = ()
        self._speaks: list[bool] = []
        self._apart: Tensor | None = None  # [K or K + 1, parameters], where it looks

    @property
    def looking(self) -> bool:
        """Whether this update finds the shares anew."""
        return len(self._names) > 1 and self.count % self.every == 0

    def begin(self, names: Sequence[str], speaks: Sequence[bool]) -> bool:
        self._names, self._speaks, self._apart = tuple(names), list(speaks), None
        if set(self.held) != set(names):
            self.held = {name: 1 / len(names) for name in names}
        return not self.looking

    def add(self, losses: Tensor, parameters: Sequence[nn.Parameter], backward: Backward) -> None:
        if self.looking:
            last = len(losses) - 1
            found = torch.stack([_flat(loss, parameters, i < last) for i, loss in enumerate(losses)])
            self._apart = found if self._apart is None else self._apart + found
            return
        shares = losses.new_tensor([self.held[name] for name in self._names])
        backward((losses[: len(shares)] * shares).sum() + losses[len(shares) :].sum())

    def finish(self, parameters: Sequence[nn.Parameter], total: Total) -> Mapping[str, float]:
        metrics = {} if self._apart is None else self._look(total(self._apart), parameters)
        self.count += 1
        self._apart = None
        return metrics | {f"balance/share/{name}": self.held[name] for name in self._names}

    def _look(self, apart: Tensor, parameters: Sequence[nn.Parameter]) -> dict[str, float]:
        """Put the balanced gradient of those apart [K or K + 1, P] into the parameters."""
        count = len(self._names)
        gram = (apart[:count] @ apart[:count].T).double().cpu()
        length = gram.diagonal().clamp(min=0).sqrt()
        # Where one is not finite none is, for they share a graph; the sum says so, and the step is skipped.
        finite = bool(torch.isfinite(length).all())
        rows = (torch.tensor(self._speaks) & (length > TINY) & finite).nonzero().flatten()
        share, scale = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        metrics: dict[str, float] = {}
        if len(rows):
            cosine = gram[rows][:, rows] / (length[rows, None] * length[rows])
            if self.shares == "min_norm":
                share[rows] = min_norm(cosine)
                scale[rows] = share[rows] / length[rows] * length[rows].mean()
                for name, new in zip(self._names, share.tolist(), strict=True):
                    self.held[name] = self.keep * self.held[name] + (1 - self.keep) * new
            else:
                scale[rows] = 1 / count
            metrics = _cosines(cosine, (scale * length)[rows], [self._names[i] for i in rows.tolist()])
        flat = torch.cat([scale, scale.new_ones(len(apart) - count)]).to(apart) @ apart
        parts = torch.split(flat, [p.numel() for p in parameters])  # type: ignore[no-untyped-call]
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.reshape(parameter.shape).to(parameter.dtype)
        return metrics

    def state_dict(self) -> dict[str, object]:
        return {"held": dict(self.held), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held, self.count = dict(state["held"]), int(state["count"])


def _cosines(cosine: Tensor, weight: Tensor, names: Sequence[str]) -> dict[str, float]:
    """The cosine of each unit gradient to the direction that they make with `weight` [K]; the least ones."""
    inner = cosine @ weight
    size = (weight @ inner).clamp(min=0).sqrt()
    towards = inner / size if size > TINY else torch.zeros_like(inner)
    metrics = {f"balance/cosine/{name}": c for name, c in zip(names, towards.tolist(), strict=True)}
    metrics["balance/cosine_worst"] = float(towards.min())
    metrics["balance/conflict"] = float(cosine.min())  # the least cosine between two objectives
    return metrics


def _flat(loss: Tensor, parameters: Sequence[nn.Parameter], again: bool) -> Tensor:
    """The gradient of a loss by all parameters in one row, [P]; again: its graph is asked once more."""
    found = torch.autograd.grad(loss, parameters, retain_graph=again, allow_unused=True)
    rows = [
        torch.zeros(p.numel(), device=p.device) if g is None else g.float().flatten()
        for p, g in zip(parameters, found, strict=True)
    ]
    return torch.cat(rows)
