"""Graph models of TensorFlow.js, written small."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Node = tuple[str, str, list[str], dict[str, Any]]  # name, kind, inputs, attributes


def text(value: str) -> str:
    return b64encode(value.encode()).decode()


def waves(*shape: int, start: float = 0.0) -> np.ndarray:
    """Numbers that need no random generator, as float16 keeps them."""
    return np.sin(1.7 * np.arange(np.prod(shape)) + start).reshape(shape).astype(np.float16)


def moves(step: int, padding: str, *after: str) -> dict:
    found = {
        "strides": {"list": {"i": ["1", str(step), str(step), "1"]}},
        "dilations": {"list": {"i": ["1", "1", "1", "1"]}},
        "padding": {"s": text(padding)},
        "data_format": {"s": text("NHWC")},
        "T": {"type": "DT_FLOAT"},
    }
    if after:
        found |= {"fused_ops": {"list": {"s": [text(name) for name in after]}}, "num_args": {"i": "1"}}
        found |= {"epsilon": {"f": 0}}
    return found


def write(folder: Path, name: str, constants: Mapping[str, np.ndarray], nodes: Sequence[Node]) -> Path:
    """NAME.json and NAME.bin, as its converter writes them; constants are float16 or int32."""
    listed = []
    for key, values in constants.items():
        whole = values.dtype == np.int32
        listed.append({"name": key, "shape": list(values.shape), "dtype": "int32" if whole else "float32"})
        if not whole:
            listed[-1]["quantization"] = {"dtype": "float16", "original_dtype": "float32"}
    every = [*((key, "Const", [], {}) for key in constants), *nodes]
    said = {
        "format": "graph-model",
        "modelTopology": {
            "node": [{"name": n, "op": op, "input": given, "attr": attr} for n, op, given, attr in every],
            "versions": {"producer": 1},
        },
        "weightsManifest": [{"paths": [f"{name}.bin"], "weights": listed}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.bin").write_bytes(b"".join(values.tobytes() for values in constants.values()))
    (folder / f"{name}.json").write_text(json.dumps(said))
    return folder / f"{name}.json"
