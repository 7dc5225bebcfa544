"""Graphs of TensorFlow.js run by torch, against what @tensorflow/tfjs 4.22 computes of the same files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import moves, text, waves, write
from torch.testing import assert_close

from mmalign.rewardmodels.tfjs import Graph, same

# By tfjs-converter and tfjs-backend-cpu of the graph that `saved` writes, for `picture()`; by channels.
# fmt: off
KNOWN = torch.tensor([
    [[0, 0.0317, 0.36003, 0.52419, 0.52419], [1.93948, 1.07723, 0.21498, 0, 0],
     [4.17558, 2.12276, 0.06993, 0, 0], [6.41169, 3.16828, 0, 0, 0],
     [7.52974, 3.69105, 0, 0, 0], [7.52974, 3.69105, 0, 0, 0],
     [7.52974, 3.69105, 0, 0, 0]],
    [[0, 0, 0.15198, 2.14486, 2.14486], [0, 0, 0.03164, 1.41713, 1.41713],
     [0, 0, 0, 0.68939, 0.68939], [0, 0, 0, 0, 0],
     [0.26283, 0, 0, 0, 0], [0.26283, 0, 0, 0, 0],
     [0.26283, 0, 0, 0, 0]],
    [[0, 0, 0.29362, 0.5925, 0.5925], [1.85796, 1.11319, 0.36842, 0, 0],
     [4.6178, 2.53051, 0.44322, 0, 0], [7.37763, 3.94783, 0.51802, 0, 0],
     [8.75755, 4.65649, 0.55542, 0, 0], [8.75755, 4.65649, 0.55542, 0, 0],
     [8.75755, 4.65649, 0.55542, 0, 0]],
    [[0.42472, 0.62298, 0.82123, 0.92036, 0.92036], [1.77496, 1.2543, 0.73365, 0.47332, 0.47332],
     [3.1252, 1.88563, 0.64606, 0.02628, 0.02628], [4.47543, 2.51695, 0.55848, 0, 0],
     [5.15055, 2.83262, 0.51468, 0, 0], [5.15055, 2.83262, 0.51468, 0, 0],
     [5.15055, 2.83262, 0.51468, 0, 0]],
    [[0, 0, 0.5544, 1.51349, 1.51349], [0, 0, 0.49649, 1.16327, 1.16327],
     [0, 0, 0.43857, 0.81304, 0.81304], [0.05207, 0.21637, 0.38066, 0.46281, 0.46281],
     [0.60775, 0.47973, 0.3517, 0.28769, 0.28769], [0.60775, 0.47973, 0.3517, 0.28769, 0.28769],
     [0.60775, 0.47973, 0.3517, 0.28769, 0.28769]],
    [[0.03933, 0.27891, 0.51849, 0.63828, 0.63828], [1.14548, 0.84697, 0.54847, 0.39921, 0.39921],
     [2.25163, 1.41504, 0.57845, 0.16015, 0.16015], [3.35777, 1.9831, 0.60843, 0, 0],
     [3.91085, 2.26713, 0.62342, 0, 0], [3.91085, 2.26713, 0.62342, 0, 0],
     [3.91085, 2.26713, 0.62342, 0, 0]],
])
# fmt: on


# By the same of the graph that `pooled` writes.
# fmt: off
POOLED = torch.tensor([
    [[1.24316, 1.24316, 1.24316], [1.24316, 1.24316, 1.24316], [1.24316, 1.24316, 1.24316],
     [1.24316, 1.24316, 1.24316]],
    [[1.18819, 1.19078, 1.23289], [0.96597, 0.906, 1.078], [1.05921, 0.84317, 1.17611],
     [0.90307, 0.14931, 1.29442]],
    [[-0.26466, -0.2191, -0.27952], [-0.25372, -0.22683, -0.23826], [-0.25631, -0.25165, -0.2808],
     [-0.31192, -0.30478, -0.30373]],
    [[-0.58461, -0.68491, -0.59623], [-1.5, -1.5, -0.53446], [-1.5, -1.30404, -0.53826],
     [-1.37199, -0.74443, -0.60387]],
    [[1.01953, 1.01953, 1.01953], [0.61144, 0.75865, 1.01953], [1.00208, 0.8092, 1.01953],
     [1.01953, 1.01953, 1.01953]],
    [[0.01878, 0.17553, 0.03798], [0.7428, 0.28165, 0.0102], [0.30025, 0.21486, 0.08903],
     [0.11715, 0.41275, 0.07814]],
    [[-1.43332, -1.24774, -1.5], [-1.40603, -1.11408, -1.29281], [-1.2627, -1.08758, -1.49578],
     [-1.29999, -1.23428, -1.5]],
])
# fmt: on


def picture() -> torch.Tensor:
    return torch.from_numpy(waves(1, 7, 6, 3, start=0.5).astype(np.float32))


def saved(folder: Path) -> Path:
    """A graph with each kind of node, uneven paddings and a picture drawn larger by no whole number."""
    constants = {
        "k1": waves(3, 3, 3, 4),
        "b1": waves(4, start=1),
        "k2": waves(3, 3, 4, 2, start=2),
        "b2": waves(8, start=3),
        "k3": waves(2, 1, 8, 3, start=4),
        "k4": waves(3, 2, 3, 1, start=5),
        "k5": waves(1, 1, 3, 3, start=7),
        "b5": waves(3, start=8),
        "size": np.array([7, 5], np.int32),
        "axes": np.array([1, 2], np.int32),
        "axis": np.array(3, np.int32),
    }
    resize = {"align_corners": {"b": False}, "half_pixel_centers": {"b": False}, "T": {"type": "DT_FLOAT"}}
    plain = {"T": {"type": "DT_FLOAT"}}
    shape = {"shape": {"shape": {"dim": [{"size": str(size)} for size in (1, 7, 6, 3)]}}}
    nodes = [  # name, kind, inputs, attributes; the last are not needed, and could not be run
        ("x", "Placeholder", [], shape | {"dtype": {"type": "DT_FLOAT"}}),
        ("halved", "_FusedConv2D", ["x", "k1", "b1"], moves(2, "SAME", "BiasAdd", "Relu6")),
        ("each", "FusedDepthwiseConv2dNative", ["halved", "k2", "b2"], moves(1, "SAME", "BiasAdd", "Relu")),
        ("inner", "Conv2D", ["each", "k3"], moves(1, "VALID")),
        ("quarter", "DepthwiseConv2dNative", ["inner", "k4"], moves(2, "SAME")),
        ("larger", "ResizeBilinear", ["quarter", "size"], resize),
        ("mean", "Mean", ["larger", "axes"], plain | {"keep_dims": {"b": True}}),
        ("weight", "_FusedConv2D", ["mean", "k5", "b5"], moves(1, "SAME", "BiasAdd")),
        ("gate", "Sigmoid", ["weight"], plain),
        ("gated", "Mul", ["larger", "gate"], plain),
        ("bent", "Relu", ["larger"], plain),
        ("more", "Add", ["gated", "gate"], plain),
        ("capped", "Relu6", ["more"], plain),
        ("both", "ConcatV2", ["bent", "capped", "axis"], plain | {"N": {"i": "2"}}),
        ("told", "Identity", ["both"], plain),
        ("tail", "TopKV2", ["told"], plain),
    ]
    return write(folder, "tiny", constants, nodes)


def pooled(folder: Path) -> Path:
    """A graph of what networks of faces have beside: pools of odd sizes, slopes, wider and bounded values."""
    constants = {
        "k1": waves(3, 3, 3, 4),
        "b1": waves(4, start=1) - np.float16(3),
        "s1": waves(1, 1, 4, start=2) / np.float16(4) + np.float16(0.5),
        "wider": np.array([[0, 0], [0, 0], [0, 0], [1, 2]], np.int32),
        "around": np.array([[0, 0], [1, 0], [0, 1], [0, 0]], np.int32),
        "k2": waves(1, 1, 7, 7, start=6),
        "s2": waves(1, 1, 7, start=3),
        "floor": np.array(-1.5, np.float16),
        "ceiling": waves(7, start=4) + np.float16(2),
        "axes": np.array([1, 2], np.int32),
    }

    def pool(window: int, step: int, padding: str) -> dict:
        sizes = {"list": {"i": ["1", str(window), str(window), "1"]}}
        return moves(step, padding) | {"ksize": sizes}

    plain = {"T": {"type": "DT_FLOAT"}}
    shape = {"shape": {"shape": {"dim": [{"size": str(size)} for size in (-1, 7, 6, 3)]}}}
    counts = plain | {"Tpaddings": {"type": "DT_INT32"}}
    sloped = moves(1, "SAME", "BiasAdd", "Prelu") | {"num_args": {"i": "2"}}
    nodes = [
        ("x", "Placeholder", [], shape | {"dtype": {"type": "DT_FLOAT"}}),
        ("bent", "_FusedConv2D", ["x", "k1", "b1", "s1"], sloped),
        ("halved", "MaxPool", ["bent"], pool(3, 2, "SAME")),
        ("inner", "MaxPool", ["bent"], pool(3, 2, "VALID")),
        ("thick", "Pad", ["halved", "wider"], counts),
        ("grown", "Pad", ["inner", "around"], counts),
        ("both", "Pad", ["grown", "wider"], counts),
        ("mixed", "Conv2D", ["thick", "k2"], moves(1, "VALID")),
        ("sum", "AddV2", ["mixed", "both"], plain),
        ("slope", "Prelu", ["sum", "s2"], plain),
        ("below", "Minimum", ["slope", "ceiling"], plain),
        ("within", "Maximum", ["below", "floor"], plain),
        ("mean", "Mean", ["within", "axes"], plain | {"keep_dims": {"b": False}}),
    ]
    return write(folder, "pooled", constants, nodes)


def test_a_graph_computes_what_tensorflow_js_does(tmp_path):
    graph = Graph(saved(tmp_path), ["told"])
    assert graph.given == (1, 7, 6, 3)
    assert_close(graph(picture())["told"], KNOWN.permute(1, 2, 0)[None], atol=1e-5, rtol=1e-5)


def test_pools_slopes_and_bounds_are_those_of_tensorflow_js(tmp_path):
    graph = Graph(pooled(tmp_path), ["within", "mean"])
    told = graph(picture())
    assert_close(told["within"], POOLED.permute(1, 2, 0)[None], atol=1e-5, rtol=1e-5)
    assert_close(told["mean"], POOLED.mean((1, 2))[None], atol=1e-5, rtol=1e-5)


def test_gradients_pass_pools_slopes_and_bounds(tmp_path):
    graph = Graph(pooled(tmp_path), ["within"]).double()
    seen = torch.rand(2, 7, 6, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: graph(x)["within"], seen)


def test_pictures_of_other_sizes_and_numbers_pass_and_gradients_reach_them(tmp_path):
    graph = Graph(saved(tmp_path), ["mean"]).double()
    seen = torch.rand(2, 9, 11, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert graph(seen)["mean"].shape == (2, 1, 1, 3)
    assert_close(graph(seen)["mean"][1:], graph(seen[1:])["mean"])
    assert torch.autograd.gradcheck(lambda x: graph(x)["mean"], seen[:1, :5, :4].detach().requires_grad_())


@pytest.mark.parametrize(("size", "window", "step"), [(7, 3, 2), (6, 3, 2), (6, 2, 1), (5, 1, 3), (8, 5, 4)])
def test_same_padding_finds_as_many_places_as_there_are_steps(size, window, step):
    x = torch.ones(1, size, size, 1)
    wide = same(x, (window, window), (step, step), (1, 1))
    assert (wide.shape[1] - window) // step + 1 == -(-size // step)
    above = int((wide[0, :, wide.shape[2] // 2, 0] == 1).nonzero()[0])
    below = wide.shape[1] - size - above
    assert below - above in (0, 1)  # the larger part lies below


def changed(file: Path, name: str, **new) -> Path:
    said = json.loads(file.read_text())
    (node,) = (node for node in said["modelTopology"]["node"] if node["name"] == name)
    node["attr"] |= new
    file.write_text(json.dumps(said))
    return file


@pytest.mark.parametrize(
    ("name", "new", "wrong"),
    [
        ("halved", {"fused_ops": {"list": {"s": [text("Elu")]}}}, "halved is followed by Elu"),
        ("inner", {"padding": {"s": text("EXPLICIT")}}, "inner is padded by EXPLICIT"),
        ("inner", {"data_format": {"s": text("NCHW")}}, "inner is of the layout NCHW"),
        ("larger", {"half_pixel_centers": {"b": True}}, "larger is a resize of the middles"),
    ],
)
def test_what_cannot_be_run_is_refused_when_it_is_read(tmp_path, name, new, wrong):
    with pytest.raises(ValueError, match=wrong):
        Graph(changed(saved(tmp_path), name, **new), ["told"])


def test_broken_files_are_refused(tmp_path):
    file = saved(tmp_path)
    with pytest.raises(ValueError, match="tail is of the kind TopKV2, which cannot be run here"):
        Graph(file, ["tail"])
    with pytest.raises(ValueError, match="there is no node 'heat'"):
        Graph(file, ["heat"])
    data = (tmp_path / "tiny.bin").read_bytes()
    (tmp_path / "tiny.bin").write_bytes(data[:100])
    with pytest.raises(ValueError, match="the weights end at byte 100, before k1 does"):
        Graph(file, ["told"])
    (tmp_path / "tiny.bin").unlink()
    with pytest.raises(ValueError, match=r"has no tiny\.bin, where tiny\.json keeps weights"):
        Graph(file, ["told"])
