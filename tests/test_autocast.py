"""Autocast of tensors without content is that of torch, of the device that is meant."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmalign.autocast import PRODUCTS, PROMOTED, Autocast, in_fp32
from mmalign.planning import Live

HALF = torch.bfloat16
OPERATIONS = {
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: x @ x,
    "from the right": lambda x: x.__rmatmul__(x),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
    "conv1d": lambda x: F.conv1d(x, x[:, :, None]),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "cat": lambda x: torch.cat([x, x]),
    "add": lambda x: x + 1,
    "layer norm": lambda x: F.layer_norm(x, x.shape),
    "group norm": lambda x: F.group_norm(x, 2),
    "softmax": lambda x: x.softmax(0),
    "gelu": F.gelu,
    "sum": lambda x: x.sum(),
    "power": lambda x: x**2,
    "interpolate": lambda x: F.interpolate(x[None, None], scale_factor=2),
    "mse": lambda x: F.mse_loss(x, x),
    "view as complex": lambda x: torch.view_as_complex(x.reshape(-1, 2)).real,
}


def listed(name: str) -> set[str]:
    """The operations of a list of autocast on CUDA, in torch's own header."""
    text = (Path(torch.__path__[0]) / "include/ATen/autocast_mode.h").read_text()
    found = re.search(rf"#define {name}\(_\)(.*?)\n\n", text, re.DOTALL)
    assert found
    return set(re.findall(r"_\((?:ADD_NS\()?(\w+)", found.group(1)))


def test_lists_are_those_of_torch():
    assert listed("AT_FORALL_LOWER_PRECISION_FP") <= PRODUCTS
    assert listed("AT_FORALL_PROMOTE") <= PROMOTED
    wide = listed("AT_FORALL_FP32") | listed("AT_FORALL_FP32_SET_OPT_DTYPE") | {"norm"}
    rare = {"binary_cross_entropy", "linalg_matrix_sqrth"}  # one is forbidden, one registered elsewhere
    assert in_fp32("cuda") - rare == wide


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_a_cpu_give_the_type_that_they_give_under_autocast(name, dtype):
    with torch.autocast("cpu", HALF):
        real = OPERATIONS[name](torch.rand(4, 4, dtype=dtype))
    with Autocast("cpu", HALF):
        blank = OPERATIONS[name](torch.empty(4, 4, dtype=dtype, device="meta"))
    assert (blank.dtype, blank.shape) == (real.dtype, real.shape)


def test_cuda_leaves_more_in_fp32_than_a_cpu():
    wide = {"layer norm", "group norm", "softmax", "sum", "power", "interpolate"}
    for name in wide:
        for device, dtype in {"cuda": torch.float32, "cpu": HALF}.items():
            with Autocast(device, HALF):
                found = OPERATIONS[name](torch.empty(4, 4, dtype=HALF, device="meta"))
            assert found.dtype == dtype, name


def test_double_precision_is_left_alone():
    x = torch.empty(4, 4, dtype=torch.float64, device="meta")
    with Autocast("cuda", HALF):
        assert (x @ x).dtype == x.softmax(0).dtype == torch.float64


def test_no_cast_of_a_weight_is_kept():
    network, x = nn.Linear(8, 8, bias=False, device="meta"), torch.empty(1, 8, device="meta")
    live = Live([network.weight, x])
    with torch.no_grad(), live, Autocast("cpu", HALF):
        network(x)
        assert live.now == 0
    assert live.peak > 2 * 8 * 8
