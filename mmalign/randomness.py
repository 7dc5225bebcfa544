"""Random streams that are named, not shared: a key gives the same numbers in any batch, rank or order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from the parts of a key, e.g. `(run seed, "noise", iteration, group, member)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for a key; numbers are drawn there in fp32, so that every device sees the same ones."""
    return torch.Generator().manual_seed(seed_of(*key))


def normals(
    streams: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise, [len(streams), *shape] in fp32, row i from stream i (which moves on)."""
    if not streams:
        return torch.empty(0, *shape, device=device)
    return torch.stack([torch.randn(*shape, generator=stream) for stream in streams]).to(device)
