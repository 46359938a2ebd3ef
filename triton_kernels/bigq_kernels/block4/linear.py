"""Multiply by a 4-bit weight: fused for few tokens, dequantized for cuBLAS for many."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial

import torch
import triton
from torch import Tensor

from bigq_kernels.block4.configs import MAX_DP4A_K, wgmma_config
from bigq_kernels.block4.dequantize import dequantize_4bit
from bigq_kernels.block4.dp4a import linear_4bit_dp4a
from bigq_kernels.block4.mma import linear_4bit_mma
from bigq_kernels.block4.quantize_absmax import nested_code
from bigq_kernels.checks import as_floats, check_linear_4bit
from bigq_kernels.internals import TESTED_TRITON
from bigq_kernels.launch import dense_linear
from bigq_kernels.tiles import device_features

__all__ = ["linear_4bit"]

# By M: the longest K for dp4a, whose work is done for each token where the tensor core's decode is shared: two tokens
# take 6.8 us here against 10.4 at 4096 x 4096, but 116 against 76 at 8192 x 28672 (H100).
DP4A_MAX_K = {1: MAX_DP4A_K, 2: 4096}
MAX_GLUON_M = 32  # at 64, 51 us against 45 of the kernel without shared memory (14336 x 4096, H100)
MAX_MMA_M = 128  # above, the bf16 GEMM of cuBLAS after one dequantization is faster...
MAX_MMA_M_PARTIAL = 64  # ...and already here if N is too small to fill the GPU, or K leaves a partial step
NARROW_N = 2048
GLUON_RELEASES = TESTED_TRITON  # no other is promised to take the Gluon kernels

Kernel = Callable[..., None]


@cache
def _takes_gluon(device: torch.device) -> bool:
    """Whether Gluon kernels run there: they want PTX, cp.async, bfloat16 and a release they are known to."""
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    ptx, _ = device_features(device)
    return ptx and torch.cuda.get_device_capability(device) >= (8, 0) and release in GLUON_RELEASES


def _fused_kernel(device: torch.device, m: int, n: int, k: int, block_size: int) -> Kernel | None:
    """The fastest for m tokens of 16 bits and rows of whole 16-byte vectors; None where that is cuBLAS, dequantized."""
    if k <= DP4A_MAX_K.get(m, 0):
        return linear_4bit_dp4a
    if block_size >= 64 and _takes_gluon(device):
        config = wgmma_config(device, m, n, k)
        if config is not None:
            from bigq_kernels.block4.gluon.wgmma import linear_4bit_wgmma  # it imports what other releases may not have

            return partial(linear_4bit_wgmma, config=config)
        if m <= MAX_GLUON_M:
            from bigq_kernels.block4.gluon.staged import linear_4bit_gluon  # likewise

            return linear_4bit_gluon
    most = MAX_MMA_M if n > NARROW_N and k % 64 == 0 else MAX_MMA_M_PARTIAL
    return linear_4bit_mma if m <= most else None


def _contiguous(t: Tensor) -> Tensor:
    """Contiguous and 16-byte aligned, for vector loads of words."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


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
    fused = None
    if m > 0 and n > 0 and k % 32 == 0 and x.dtype in (torch.bfloat16, torch.float16):
        fused = _fused_kernel(x.device, m, n, k, block_size)
    nested: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None)
    if nested_absmax is not None and nested_offset is not None:
        nested = (as_floats(nested_absmax).contiguous(), as_floats(nested_offset), nested_code(x.device))
    else:
        absmax = as_floats(absmax)
    if fused is None:
        dense = dequantize_4bit(weight, absmax, quant_type, block_size, k, x.dtype, nested)
        return dense_linear(x, dense, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))

    out = x.new_empty(*x.shape[:-1], n)
    rows = _contiguous(x.reshape(m, k))
    bias = None if bias is None else bias.contiguous()
    here = not x.is_cuda or x.device.index == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device_of(x):
        fused(rows, _contiguous(weight), absmax.contiguous(), bias, nested, out, quant_type, block_size)
    return out
