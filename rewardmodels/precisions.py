"""At which precision the networks of rewards compute; their scores are fp32 whatever it is."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(name: str, precision: str) -> torch.dtype:
    """The dtype of a precision; ValueError, in the name of the reward, where there is no such one."""
    if precision not in DTYPES:
        raise ValueError(f"{name}: precision must be one of {', '.join(DTYPES)}, got {precision!r}")
    return DTYPES[precision]
