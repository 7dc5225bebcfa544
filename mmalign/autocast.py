"""What `torch.autocast` makes of a forward, for tensors without content, whose device has no autocast.

Which operations it computes in half precision and which in fp32 depends on the device that is meant, and
is asked of torch: the dispatcher has a kernel for each of them under the key of that device, whether or not
there is one. All but the products and what is promoted to its widest input are computed in fp32; these two
lists are those of ATen/autocast_mode.h.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Device = Literal["cuda", "cpu"]

_PRODUCTS = """
    _addmm_activation _convolution _cudnn_rnn _native_multi_head_attention _scaled_dot_product_flash_attention
    _thnn_fused_gru_cell _thnn_fused_lstm_cell addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d
    conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution cudnn_convolution
    cudnn_convolution_transpose einsum gru_cell linalg_multi_dot linalg_vecdot linear lstm_cell matmul
    mkldnn_rnn_layer mm mv prelu rnn_relu_cell rnn_tanh_cell scaled_dot_product_attention
"""
_PROMOTED = """
    addcdiv addcmul atan2 bilinear cat cross dot grid_sampler index_copy index_put scatter_add stack tensordot
    vdot
"""
PRODUCTS, PROMOTED = frozenset(_PRODUCTS.split()), frozenset(_PROMOTED.split())
# What Python calls them -> the operation that they come to.
CALLED = {"interpolate": "upsample_nearest2d", "multi_dot": "linalg_multi_dot", "normalize": "norm"}


@cache
def in_fp32(device: Device) -> frozenset[str]:
    """The operations that autocast computes in fp32 on this device, which need not be there."""
    key = f"Autocast{device.upper()}"
    every = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    own = (name for name in every if torch._C._dispatch_has_kernel_for_dispatch_key(name, key))
    return frozenset(name[6:].split(".")[0] for name in own) - PRODUCTS - PROMOTED


class Autocast(TorchFunctionMode):
    """Casts what goes into operations as autocast of `device` to `dtype` does, whatever device it lies on.

    Casts are not kept for further use of a weight, as policies ask it of autocast.
    """

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        self.device, self.dtype = device, dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = name.strip("_").removeprefix("r") if name.startswith("__") else name
        name = CALLED.get(name, name)
        if name in PRODUCTS:
            return func(*self._cast(args, self.dtype), **self._cast(kwargs, self.dtype))
        if name in in_fp32(self.device):
            return func(*self._cast(args, torch.float32), **self._cast(kwargs, torch.float32))
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
        if isinstance(value, dict):
            return {name: self._cast(one, dtype) for name, one in value.items()}
        return type(value)(self._cast(one, dtype) for one in value) if type(value) in (list, tuple) else value
