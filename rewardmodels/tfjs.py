"""Networks of convolutions saved for TensorFlow.js (graph models), run by torch; TensorFlow is not needed.

A model is two files: NAME.json, with the nodes of the graph and the list of its weights, and NAME.bin, with
their values (github.com/tensorflow/tfjs, tfjs-core/src/io). Tensors keep the layout of the graph,
[B, H, W, C]; what a node means is that of TensorFlow: where the padding called SAME is uneven, the larger
part lies right and below, and a picture is made larger from the corners of its pixels, not their middles.
What our networks do not need is refused when a graph is read, so that nothing is computed almost right.
"""

from __future__ import annotations

import json
import math
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

STORED: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int32": np.dtype("<i4"),
}
# What may follow a convolution; Prelu takes the slopes below zero, [..., C], as one input more.
ACTIVATIONS: Mapping[str, Callable[..., Tensor]] = {
    "Relu": lambda x: F.relu(x),
    "Relu6": lambda x: F.relu6(x),
    "Prelu": lambda x, slopes: torch.where(x < 0, slopes * x, x),
}


class Graph(nn.Module):
    """What a graph computes of pictures: the values of the nodes that are asked for."""

    given: tuple[int, ...]  # shape of what it was made for, [B, H, W, C]

    def __init__(self, file: Path, outputs: Sequence[str]) -> None:
        """file: NAME.json. outputs: names of nodes; what they do not need is left out.

        ValueError where a file is broken, or a node is not there or not of a kind that is known here.
        """
        super().__init__()
        said = json.loads(file.read_text())
        nodes = {node["name"]: node for node in said["modelTopology"]["node"]}
        constants = weights(file, said["weightsManifest"])
        self._outputs = tuple(outputs)
        self._nodes: list[dict[str, Any]] = []
        self._places: dict[str, str] = {}  # buffers by the names of their nodes, which hold slashes
        self._whole: dict[str, Tensor] = {}  # axes and sizes; read on the CPU wherever the network runs
        for node in needed(file, nodes, outputs):
            name = node["name"]
            if node["op"] == "Const":
                if name not in constants:
                    raise ValueError(f"{file}: the list of weights lacks {name}")
                if constants[name].is_floating_point():
                    self._places[name] = f"constant_{len(self._places)}"
                    self.register_buffer(self._places[name], constants[name])
                else:
                    self._whole[name] = constants[name]
                continue
            if reason := objection(node):
                raise ValueError(f"{file}: {name} is {reason}, which cannot be run here")
            if node["op"] == "Placeholder":
                self.given = tuple(int(axis["size"]) for axis in node["attr"]["shape"]["shape"]["dim"])
            self._nodes.append(node)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """The outputs by name, for what the graph is given, [B, H, W, C]."""
        values = self._whole | {name: self.get_buffer(place) for name, place in self._places.items()}
        for node in self._nodes:
            if node["op"] == "Placeholder":
                values[node["name"]] = pictures
            else:
                operation = OPERATIONS[node["op"]]
                values[node["name"]] = operation(node.get("attr", {}), *(values[n] for n in inputs(node)))
        return {name: values[name] for name in self._outputs}


def inputs(node: Mapping[str, Any]) -> list[str]:
    """Names of the nodes that a node takes in; what only tells an order of running is left out."""
    return [name.removesuffix(":0") for name in node.get("input", []) if not name.startswith("^")]


def needed(file: Path, nodes: Mapping[str, Any], outputs: Sequence[str]) -> list[dict[str, Any]]:
    """The nodes that the outputs rest on, each after those it takes in."""
    before: dict[str, list[str]] = {}
    waiting = list(outputs)
    while waiting:
        name = waiting.pop()
        if name in before:
            continue
        if name not in nodes:
            raise ValueError(f"{file}: there is no node {name!r} in this graph")
        before[name] = inputs(nodes[name])
        waiting += before[name]
    return [nodes[name] for name in TopologicalSorter(before).static_order()]


def objection(node: Mapping[str, Any]) -> str | None:
    """What of a node cannot be run here; None where all can."""
    said = node.get("attr", {})
    if node["op"] not in OPERATIONS and node["op"] != "Placeholder":
        return f"of the kind {node['op']}"
    if strange := set(_texts(said, "fused_ops")) - {"BiasAdd", *ACTIVATIONS}:
        return f"followed by {', '.join(sorted(strange))}"
    if _text(said, "padding", "SAME") not in ("SAME", "VALID"):
        return f"padded by {_text(said, 'padding', '')}"
    if _text(said, "data_format", "NHWC") != "NHWC":
        return f"of the layout {_text(said, 'data_format', '')}"
    if _flag(said, "align_corners") or _flag(said, "half_pixel_centers"):
        return "a resize of the middles or the rims of pixels"
    return None


def weights(file: Path, manifest: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The constants of a graph by name, fp32 or int32, from the files that its manifest names."""
    found: dict[str, Tensor] = {}
    for group in manifest:
        parts = [file.parent / path for path in group["paths"]]
        if missing := [part.name for part in parts if not part.is_file()]:
            raise ValueError(f"{file.parent}: has no {', '.join(missing)}, where {file.name} keeps weights")
        data, at = b"".join(part.read_bytes() for part in parts), 0
        for entry in group["weights"]:
            dtype = entry.get("quantization", entry)["dtype"]
            if dtype not in STORED:
                raise ValueError(f"{file}: weight {entry['name']} is of {dtype}, which cannot be read here")
            count = math.prod(entry["shape"])
            if at + count * STORED[dtype].itemsize > len(data):
                raise ValueError(f"{file}: the weights end at byte {len(data)}, before {entry['name']} does")
            values = np.frombuffer(data, STORED[dtype], count, at).reshape(entry["shape"])
            at += values.nbytes
            whole = np.issubdtype(values.dtype, np.integer)
            found[entry["name"]] = torch.from_numpy(values.astype(np.int32 if whole else np.float32))
    return found


def convolved(said: Mapping[str, Any], x: Tensor, kernel: Tensor, *after: Tensor) -> Tensor:
    """Convolution of [B, H, W, C] with a kernel [h, w, C, D], then bias and activation."""
    return _convolved(said, x, kernel.permute(3, 2, 0, 1), after, groups=1)


def depthwise(said: Mapping[str, Any], x: Tensor, kernel: Tensor, *after: Tensor) -> Tensor:
    """Each channel of [B, H, W, C] with its own kernels, [h, w, C, M], to [B, H, W, C M]."""
    channels = kernel.shape[2]
    return _convolved(said, x, kernel.flatten(2).permute(2, 0, 1)[:, None], after, groups=channels)


def _convolved(
    said: Mapping[str, Any], x: Tensor, kernel: Tensor, after: Sequence[Tensor], groups: int
) -> Tensor:
    steps, gaps = _pair(said, "strides"), _pair(said, "dilations")
    bias, more = (after[0], after[1:]) if after else (None, ())
    if _text(said, "padding") == "SAME":
        x = same(x, kernel.shape[2:], steps, gaps)
    found = F.conv2d(x.permute(0, 3, 1, 2), kernel, bias, steps, 0, gaps, groups).permute(0, 2, 3, 1)
    for name in _texts(said, "fused_ops"):
        if name != "BiasAdd":
            found = ACTIVATIONS[name](found, *more)
    return found


def same(
    x: Tensor, window: Sequence[int], steps: Sequence[int], gaps: Sequence[int], around_it: float = 0.0
) -> Tensor:
    """[B, H, W, C] with as much around that a window finds ceil(size / step) places."""
    around: list[int] = []
    for size, reach, step, gap in zip(x.shape[1:3], window, steps, gaps, strict=True):
        lacking = max(0, (math.ceil(size / step) - 1) * step + gap * (reach - 1) + 1 - size)
        around = [lacking // 2, lacking - lacking // 2, *around]
    return F.pad(x, [0, 0, *around], value=around_it)


def highest(said: Mapping[str, Any], x: Tensor) -> Tensor:
    """The largest value of each channel of [B, H, W, C] in a window; what is padded is none."""
    window, steps = _pair(said, "ksize"), _pair(said, "strides")
    if _text(said, "padding") == "SAME":
        x = same(x, window, steps, (1, 1), -math.inf)
    return F.max_pool2d(x.permute(0, 3, 1, 2), window, steps).permute(0, 2, 3, 1)


def widened(said: Mapping[str, Any], x: Tensor, counts: Tensor) -> Tensor:
    """With so many zeros before and after each axis, counts: [axes, 2]."""
    return F.pad(x, [count for axis in reversed(counts.tolist()) for count in axis])


def resized(said: Mapping[str, Any], x: Tensor, size: Tensor) -> Tensor:
    """[B, H, W, C] drawn larger or smaller, linear between the corners of pixels."""
    for axis, wanted in enumerate(size.tolist(), start=1):
        have = x.shape[axis]
        at = torch.arange(wanted, device=x.device) * (have / wanted)
        low = at.floor().long()
        part = (at - low).to(x.dtype).reshape([-1 if i == axis else 1 for i in range(4)])
        here, there = (x.index_select(axis, place.clamp(max=have - 1)) for place in (low, low + 1))
        x = here + (there - here) * part
    return x


def averaged(said: Mapping[str, Any], x: Tensor, axes: Tensor) -> Tensor:
    return x.mean(axes.reshape(-1).tolist(), keepdim=_flag(said, "keep_dims"))


def joined(said: Mapping[str, Any], *parts: Tensor) -> Tensor:
    *tensors, axis = parts
    return torch.cat(tensors, int(axis))


OPERATIONS: Mapping[str, Callable[..., Tensor]] = {
    "_FusedConv2D": convolved,
    "Conv2D": convolved,
    "FusedDepthwiseConv2dNative": depthwise,
    "DepthwiseConv2dNative": depthwise,
    "ResizeBilinear": resized,
    "MaxPool": highest,
    "Pad": widened,
    "Mean": averaged,
    "ConcatV2": joined,
    "Add": lambda said, a, b: a + b,
    "AddV2": lambda said, a, b: a + b,
    "Mul": lambda said, a, b: a * b,
    "Minimum": lambda said, a, b: torch.minimum(a, b),
    "Maximum": lambda said, a, b: torch.maximum(a, b),
    "Relu": lambda said, x: F.relu(x),
    "Relu6": lambda said, x: F.relu6(x),
    "Prelu": lambda said, x, slopes: ACTIVATIONS["Prelu"](x, slopes),
    "Sigmoid": lambda said, x: x.sigmoid(),
    "Identity": lambda said, x: x,
}


# Attributes of a node: texts are base64 in JSON, whole numbers are texts.


def _text(said: Mapping[str, Any], name: str, otherwise: str = "") -> str:
    return b64decode(said[name]["s"]).decode() if name in said else otherwise


def _texts(said: Mapping[str, Any], name: str) -> list[str]:
    return [b64decode(text).decode() for text in said.get(name, {}).get("list", {}).get("s", [])]


def _pair(said: Mapping[str, Any], name: str) -> tuple[int, int]:
    """What is said of rows and of columns; one of each where nothing is said."""
    found = said.get(name, {}).get("list", {}).get("i", [1, 1, 1, 1])
    return int(found[1]), int(found[2])


def _flag(said: Mapping[str, Any], name: str) -> bool:
    return bool(said.get(name, {}).get("b", False))
