"""Undo double quantization: code * nested_absmax, rounded, + nested_offset, rounded."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.block4.quantize_absmax import nested_code
from bigq_kernels.checks import as_floats, check_dequantize_absmax
from bigq_kernels.launch import launch
from bigq_kernels.tiles import NESTED_BLOCK_SIZE, ceil_div

__all__ = ["dequantize_absmax"]


@triton.jit
def load_absmax(absmax_ptr, first, index, nested_ptr, offset_ptr, code_ptr):
    """absmax[first + index] in float32, stored so (nested_ptr is None) or quantized itself.

    `first` is a 64-bit scalar and `index` a tile of 32 bits, so that no tile needs 64-bit arithmetic.
    """
    value = tl.load(absmax_ptr + first + index)
    if nested_ptr is None:
        return value
    else:
        block = ((first % NESTED_BLOCK_SIZE).to(tl.int32) + index) >> 8
        nested = tl.load(nested_ptr + first // NESTED_BLOCK_SIZE + block)
        return tl.load(code_ptr + value.to(tl.int32)) * nested + tl.load(offset_ptr)


@triton.jit
def _dequantize_absmax_kernel(
    codes_ptr,  # [n] uint8
    nested_ptr,  # [ceil(n / 256)] float32
    offset_ptr,  # [1] float32
    code_ptr,  # [256] float32
    out_ptr,  # [n] float32
    n,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    value = tl.load(code_ptr + tl.load(codes_ptr + index, mask=mask, other=0).to(tl.int32))
    nested = tl.load(nested_ptr + index // NESTED_BLOCK_SIZE, mask=mask, other=0.0)
    tl.store(out_ptr + index, value * nested + tl.load(offset_ptr), mask=mask)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """Codes uint8 of any shape -> float32 of that shape.

    nested_absmax [ceil(n/256)] and nested_offset [1] are float32 or its bits as int32.
    """
    check_dequantize_absmax(codes, nested_absmax, nested_offset)
    nested_absmax, nested_offset = as_floats(nested_absmax), as_floats(nested_offset)
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    n = codes.numel()
    if n == 0:
        return out
    block = 1024
    with torch.cuda.device_of(codes):
        launch(
            _dequantize_absmax_kernel,
            (ceil_div(n, block),),
            codes.contiguous(),
            nested_absmax.contiguous(),
            nested_offset,
            nested_code(codes.device),
            out,
            n,
            BLOCK=block,
            options={"enable_fp_fusion": False},  # the product is rounded before the sum
        )
    return out
