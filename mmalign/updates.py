"""From a loss per objective to the gradient of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn


class Update(Protocol):
    """Makes one gradient of several objectives; called once per minibatch."""

    def __call__(
        self, losses: Tensor, parameters: Sequence[nn.Parameter], backward: Callable[[Tensor], None]
    ) -> None:
        """losses: [K]. backward adds the gradient of a scalar to the parameters; call it exactly once."""
        ...


class Summed:
    """Add the objectives up."""

    def __call__(
        self, losses: Tensor, parameters: Sequence[nn.Parameter], backward: Callable[[Tensor], None]
    ) -> None:
        backward(losses.sum())
