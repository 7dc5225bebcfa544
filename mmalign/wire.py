"""Outcomes and verdicts as bytes, for rewards that work in another process: msgpack, never pickle.

A tensor is {"dtype", "shape", "data"} with little-endian bytes. What comes in is checked to the last field,
because it may come from anybody: all that can be wrong with it is a `WireError`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.records import Masks, Outcome, Prompts, RewardSignal, Spans, Steps, Unit, Where, Whole

DTYPES: dict[str, tuple[np.dtype[Any], torch.dtype]] = {
    "float32": (np.dtype("<f4"), torch.float32),
    "float64": (np.dtype("<f8"), torch.float64),
    "uint8": (np.dtype("u1"), torch.uint8),
    "int64": (np.dtype("<i8"), torch.int64),
    "bool": (np.dtype("?"), torch.bool),
}
PLACES: dict[str, type[Where]] = {kind.__name__: kind for kind in (Whole, Spans, Masks, Steps)}
UNITS = {unit.label: unit for unit in Unit}
# A list or mapping may say that it is long and not be; so much is set aside for it at most.
LISTED, MAPPED = 2**16, 2**14


class WireError(ValueError):
    """Bytes that are no message; it says what was wrong."""


def pack(value: Any) -> bytes:
    """A nest of mappings, lists, texts, numbers, bytes and tensors as bytes; WireError if it holds more."""
    import msgpack

    try:
        packed: bytes = msgpack.packb(_plain(value), use_bin_type=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"this cannot be sent: {error}") from None
    return packed


def unpack(data: bytes) -> Any:
    """What `pack` made, tensors still as mappings; WireError on anything else."""
    import msgpack

    try:
        return msgpack.unpackb(data, max_array_len=LISTED, max_map_len=MAPPED)
    except Exception as error:  # it has many kinds of its own
        raise WireError(f"not msgpack: {type(error).__name__}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return dump(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def dump(tensor: Tensor) -> dict[str, Any]:
    """A tensor as a mapping; half precision is sent as float32."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        tensor = tensor.float()
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise WireError(f"a tensor of {tensor.dtype} cannot be sent; {', '.join(DTYPES)} can")
    data = tensor.numpy().astype(DTYPES[name][0], copy=False).tobytes()
    return {"dtype": name, "shape": list(tensor.shape), "data": data}


def tensor_of(value: Any, what: str, ndim: tuple[int, ...], kinds: tuple[str, ...]) -> Tensor:
    """The tensor that a mapping holds; what: its name in messages, ndim, kinds: what is expected of it."""
    fields = mapping_of(value, what, ("dtype", "shape", "data"))
    kind, shape, data = fields["dtype"], fields["shape"], fields["data"]
    if kind not in kinds:
        raise WireError(f"{what}: dtype must be {' or '.join(kinds)}, got {kind!r:.80}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise WireError(f"{what}: shape must be a list of sizes, got {shape!r:.80}")
    if len(shape) not in ndim:
        raise WireError(f"{what}: must have {' or '.join(map(str, ndim))} dimensions, got {len(shape)}")
    layout, dtype = DTYPES[kind]
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * layout.itemsize:
        size = len(data) if isinstance(data, bytes) else type(data).__name__
        raise WireError(
            f"{what}: shape {shape} of {kind} needs {math.prod(shape) * layout.itemsize} bytes, got {size}"
        )
    if kind == "bool":
        return torch.from_numpy(np.frombuffer(data, np.uint8) != 0).reshape(shape)
    numbers = np.frombuffer(data, layout).astype(layout.newbyteorder("="))
    return torch.from_numpy(numbers).reshape(shape).to(dtype)


def mapping_of(value: Any, what: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    """The mapping, which must have these keys and no others."""
    if not isinstance(value, dict) or set(value) != set(keys):
        found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise WireError(f"{what} must be a mapping with {', '.join(keys)}, got {found!s:.200}")
    return value


def dump_outcome(outcome: Outcome, pixels: str = "float32") -> dict[str, Any]:
    """An outcome as `outcome_of` reads it; pixels: "uint8" rounds to 256 levels, at a fourth of the size."""
    media: Any = outcome.media
    if isinstance(media, Tensor):
        media = (media.clamp(0, 1) * 255).round().to(torch.uint8) if pixels == "uint8" else media.float()
    prompts = outcome.prompts
    return {
        "text": prompts.text,
        "group": prompts.group,
        "member": prompts.member,
        "extra": [dict(extra) for extra in prompts.extra],
        "media": media,
        "views": outcome.views,
    }


def outcome_of(value: Any, most: int = 2**31) -> Outcome:
    """The outcome that a message holds; most: samples times views."""
    fields = mapping_of(value, "outcome", ("text", "group", "member", "extra", "media", "views"))
    text, extra, views = fields["text"], fields["extra"], fields["views"]
    if not isinstance(text, list) or not text or not all(isinstance(one, str) for one in text):
        raise WireError("outcome.text must be a list of texts")
    if not isinstance(extra, list) or not all(isinstance(one, dict) for one in extra):
        raise WireError("outcome.extra must be a list of mappings")
    if type(views) is not int or not 1 <= views <= most // len(text):
        raise WireError(
            f"outcome: {len(text)} samples x {views!r:.20} views; at most {most} outcomes are judged"
        )
    group, member = (
        tensor_of(fields[key], f"outcome.{key}", (1,), ("int64",)) for key in ("group", "member")
    )
    rows = len(text) * views
    try:
        prompts = Prompts(text, group, member, extra)
    except ValueError as error:
        raise WireError(str(error)) from None
    media = fields["media"]
    if isinstance(media, list):
        if len(media) != rows or not all(isinstance(one, str) for one in media):
            raise WireError(f"outcome.media must be {rows} texts")
        return Outcome(prompts, media, views)
    pictures = tensor_of(media, "outcome.media", (4, 5), ("float32", "uint8"))
    if len(pictures) != rows:
        raise WireError(f"outcome.media must hold {rows} pictures, got {len(pictures)}")
    return Outcome(prompts, pictures / 255 if pictures.dtype == torch.uint8 else pictures, views)


def dump_signal(signal: RewardSignal) -> dict[str, Any]:
    """A verdict as `signal_of` reads it."""
    return {
        "name": signal.name,
        "values": signal.values.float(),
        "valid": signal.valid,
        "unit": signal.unit.label,
        "where": {"kind": type(signal.where).__name__, **vars(signal.where)},
        "details": None if signal.details is None else [dict(row) for row in signal.details],
    }


def signal_of(value: Any, rows: int) -> RewardSignal:
    """The verdict on `rows` outcomes that a message holds."""
    fields = mapping_of(value, "verdict", ("name", "values", "valid", "unit", "where", "details"))
    values = tensor_of(fields["values"], "verdict.values", (2,), ("float32",))
    valid = tensor_of(fields["valid"], "verdict.valid", (2,), ("bool",))
    details, unit = fields["details"], fields["unit"]
    if len(values) != rows:
        raise WireError(f"verdict: {rows} outcomes were asked about, {len(values)} are answered")
    if unit not in UNITS:
        raise WireError(f"verdict.unit must be one of {', '.join(UNITS)}, got {unit!r:.80}")
    if details is not None and (
        not isinstance(details, list) or len(details) != rows or not all(isinstance(d, dict) for d in details)
    ):
        raise WireError(f"verdict.details must be null or {rows} mappings")
    where = _where(fields["where"], tuple(values.shape))
    try:
        return RewardSignal(str(fields["name"]), values, UNITS[unit], valid, where, details)
    except ValueError as error:
        raise WireError(str(error)) from None


def _where(value: Any, units: tuple[int, ...]) -> Where:
    said = value.get("kind") if isinstance(value, dict) else None
    kind = PLACES.get(said) if isinstance(said, str) else None
    if kind is None:
        raise WireError(f"verdict.where must have a kind of {', '.join(PLACES)}")
    names = tuple(kind.__dataclass_fields__)
    fields = mapping_of(value, "verdict.where", ("kind", *names))
    masks = kind is Masks
    ndim, kinds = ((5,), ("float32", "bool")) if masks else ((2,), ("int64",))
    found = {name: tensor_of(fields[name], f"verdict.where.{name}", ndim, kinds) for name in names}
    for name, tensor in found.items():
        if tuple(tensor.shape[:2]) != units:
            raise WireError(f"verdict.where.{name} must begin with {list(units)}, got {list(tensor.shape)}")
    return kind(**found)
