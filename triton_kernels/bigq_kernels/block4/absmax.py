"""Double quantization of absmax: 8-bit codes in flat blocks of 256 around the mean, and back to float32.

Quantizing looks a centred value up in a dynamic map of 256 entries. Dequantizing is code * nested_absmax, rounded, +
nested_offset, rounded.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.block4.packed import Nested
from bigq_kernels.checks import as_floats, check_dequantize_absmax
from bigq_kernels.launch import launch
from bigq_kernels.tiles import FLOAT32_TINY, NESTED_BLOCK_SIZE, absmax_bits, ceil_div

__all__ = ["dequantize_absmax", "load_absmax", "nested_code", "quantize_absmax", "with_code"]


@cache
def nested_code(device: torch.device) -> Tensor:
    """The signed dynamic map, 256 ascending float32: 7 decades, each cut into twice as many steps as the one below."""
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32, device="cpu")
        positive.append(10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0))
    magnitudes = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], device="cpu")
    return torch.cat([magnitudes, -magnitudes, ends]).sort().values.to(device)


def with_code(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> tuple[Tensor, Nested]:
    """(absmax, what kernels decode it with): float32 and no tensors, or uint8 codes and the three of `Nested`."""
    if nested_absmax is None or nested_offset is None:
        return as_floats(absmax), (None, None, None)
    return absmax, (as_floats(nested_absmax).contiguous(), as_floats(nested_offset), nested_code(absmax.device))


@triton.jit
def _midpoint(code_ptr, index):
    return (tl.load(code_ptr + index) + tl.load(code_ptr + index + 1)) * 0.5


@triton.jit
def _quantize_absmax_kernel(
    absmax_ptr,  # [n] float32
    offset_ptr,  # [1] float32
    code_ptr,  # [256] float32
    out_ptr,  # [n] uint8
    nested_ptr,  # [ceil(n / 256)] float32
    n,
):
    block = tl.program_id(0).to(tl.int64)
    index = block * NESTED_BLOCK_SIZE + tl.arange(0, NESTED_BLOCK_SIZE)
    mask = index < n
    offset = tl.load(offset_ptr)
    centred = tl.where(mask, tl.load(absmax_ptr + index, mask=mask, other=0.0) - offset, 0.0)
    nested = tl.max(absmax_bits(centred), axis=0).to(tl.float32, bitcast=True)
    scaled = centred * tl.div_rn(1.0, tl.maximum(nested, FLOAT32_TINY))
    # Binary search for how many of the 255 midpoints lie below: slow, but the scales are 1/64 of the weight.
    code = tl.zeros((NESTED_BLOCK_SIZE,), tl.int32)
    for i in tl.static_range(8):
        code += tl.where(scaled > _midpoint(code_ptr, code + ((128 >> i) - 1)), 128 >> i, 0)
    tie = scaled == _midpoint(code_ptr, tl.minimum(code, 254))
    code += (tie & (code % 2 == 1)).to(tl.int32)  # a tie goes to the even index
    tl.store(out_ptr + index, code.to(tl.uint8), mask=mask)
    tl.store(nested_ptr + block, nested)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 of any shape -> codes uint8 of that shape, nested_absmax float32 [ceil(n/256)], nested_offset [1].

    absmax may be the bits of its float32 values as int32; what is returned is float32.
    """
    absmax = as_floats(absmax)
    n = absmax.numel()
    blocks = ceil_div(n, NESTED_BLOCK_SIZE.value)
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=absmax.device)
    nested = torch.empty(blocks, dtype=torch.float32, device=absmax.device)
    if n == 0:
        return codes, nested, torch.zeros(1, dtype=torch.float32, device=absmax.device)
    flat = absmax.flatten()
    offset = flat.mean().reshape(1)  # torch's own summation order, so that the bytes equal those of other writers
    with torch.cuda.device_of(absmax):
        launch(
            _quantize_absmax_kernel, (blocks,), flat, offset, nested_code(absmax.device), codes, nested, n, options={}
        )
    return codes, nested, offset


@triton.jit
def load_absmax(absmax_ptr, first, index, nested_ptr, offset_ptr, code_ptr):
    """Load absmax[first + index] as float32. If nested_ptr is given, absmax holds uint8 codes and is decoded here.

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
