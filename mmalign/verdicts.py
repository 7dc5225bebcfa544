"""Verdicts in parts: of samples judged one by one, in requests, or while others are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmalign.contracts import RewardError
from mmalign.records import RewardSignal


def joined(name: str, signals: Sequence[RewardSignal]) -> RewardSignal:
    """Verdicts on parts of a batch as one; samples with fewer units are padded with missing ones."""
    spoke = [bool(valid_of(signal).any()) for signal in signals]
    model = next((signal for signal, some in zip(signals, spoke, strict=True) if some), signals[0])
    if any(some and type(s.where) is not type(model.where) for s, some in zip(signals, spoke, strict=True)):
        raise RewardError(f"reward {name!r} places its units in different ways from sample to sample")
    units = max(signal.values.shape[1] for signal in signals)

    def places(key: str, like: Tensor) -> Tensor:
        def blank(rows: int) -> Tensor:
            return like.new_zeros(rows, units, *like.shape[2:])

        found = zip(signals, spoke, strict=True)
        return torch.cat(
            [_padded(getattr(s.where, key), units) if some else blank(len(s.values)) for s, some in found]
        )

    fields = {key: places(key, value) for key, value in vars(model.where).items()}
    details = None
    if any(signal.details is not None for signal in signals):
        details = [
            row for s in signals for row in (s.details if s.details is not None else [{}] * len(s.values))
        ]
    return RewardSignal(
        name,
        torch.cat([_padded(s.values, units) for s in signals]),
        model.unit,
        torch.cat([_padded(valid_of(s), units) for s in signals]),
        type(model.where)(**fields),
        details,
    )


def rows_of(signal: RewardSignal, first: int, count: int) -> RewardSignal:
    """The verdict on `count` outcomes from `first` on."""
    at = slice(first, first + count)
    return RewardSignal(
        signal.name,
        signal.values[at],
        signal.unit,
        valid_of(signal)[at],
        type(signal.where)(**{key: value[at] for key, value in vars(signal.where).items()}),
        None if signal.details is None else signal.details[at],
    )


def valid_of(signal: RewardSignal) -> Tensor:
    assert signal.valid is not None  # filled in by RewardSignal
    return signal.valid


def _padded(rows: Tensor, units: int) -> Tensor:
    filler = rows.new_zeros(len(rows), units - rows.shape[1], *rows.shape[2:])
    return torch.cat([rows, filler], 1)
