"""Multiply by a 4-bit weight in the way that `choose` says: fused for few tokens, dequantized for cuBLAS for many."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from bigq_kernels.block4.absmax import with_code
from bigq_kernels.block4.choose import choose
from bigq_kernels.block4.dequantize import dequantize_4bit
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.checks import check_linear_4bit
from bigq_kernels.launch import dense_linear

__all__ = ["contiguous", "device_of", "launcher", "linear_4bit", "linear_4bit_backward"]

_MODULES = {  # imported on first use: not all releases of Triton have what the Gluon kernels import
    "bulk": "bigq_kernels.block4.gluon.bulk",
    "dp4a": "bigq_kernels.block4.dp4a",
    "sliced": "bigq_kernels.block4.gluon.sliced",
    "staged": "bigq_kernels.block4.gluon.staged",
    "wgmma": "bigq_kernels.block4.gluon.wgmma",
    "mma": "bigq_kernels.block4.mma",
}
_NO_CHANGE = nullcontext()


@cache
def launcher(way: str) -> Callable[..., None]:
    """The function (x [M, K], Packed4, bias, out [M, N], config, stops of a stack) of a way; contiguous tensors."""
    return getattr(import_module(_MODULES[way]), f"linear_4bit_{way}")  # type: ignore[no-any-return]


def contiguous(t: Tensor) -> Tensor:
    """Contiguous and 16-byte aligned, for vector loads of words."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """The context in which kernels are launched on the device of x."""
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return _NO_CHANGE if here else torch.cuda.device_of(x)


def linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int | None = None,
) -> Tensor:
    """x [..., K] times packed uint8 [N, ceil(K/2)] transposed, plus bias [N], in x's dtype.

    absmax [N, B] is uint8 if nested_absmax [ceil(N*B/256)] and nested_offset [1] are given. Scales are float32 or its
    bits as int32. Raises RuntimeError if the tensors do not fit together, or K is not in_features.
    """
    check_linear_4bit(x, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features)
    n, k = weight.shape[0], x.shape[-1]
    m = x.numel() // k if k else 0
    choice = choose(x.device, m, n, k, block_size, x.dtype)
    absmax, nested = with_code(absmax, nested_absmax, nested_offset)
    if choice.way == "dequantize":
        dense = dequantize_4bit(weight, absmax, quant_type, block_size, k, x.dtype, nested)
        return dense_linear(x, dense, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))

    out = x.new_empty(*x.shape[:-1], n)
    packed = Packed4(contiguous(weight), absmax.contiguous(), nested, quant_type, block_size)
    bias = None if bias is None else bias.contiguous()
    with device_of(x):
        launcher(choice.way)(contiguous(x.reshape(m, k)), packed, bias, out, choice.config)
    return out


def linear_4bit_backward(
    grad: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> Tensor:
    """The gradient of x in `linear_4bit`: grad [..., N] times the packed weight [N, ceil(K/2)], in grad's dtype."""
    absmax, nested = with_code(absmax, nested_absmax, nested_offset)
    dense = dequantize_4bit(weight, absmax, quant_type, block_size, in_features, grad.dtype, nested)
    return dense_linear(grad, dense.mT, None)
