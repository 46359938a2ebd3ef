"""Quantize rows to int8: one scale a row, codes rounded half to even."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.launch import launch
from bigq_kernels.tiles import absmax_bits, encode_int8, int8_inverse, nan_to_inf, next_power_of_2

__all__ = ["quantize_int8"]


@triton.jit
def _quantize_int8_kernel(
    weight_ptr,  # [N, K]
    codes_ptr,  # [N, K] int8
    absmax_ptr,  # [N, 1] float32
    K,
    stride_wn,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight_ptr += row * stride_wn
    codes_ptr += row * K
    column = tl.arange(0, BLOCK_K)
    x = tl.load(weight_ptr + column, mask=column < K, other=0.0)  # kept: most rows are one tile, read once
    largest = absmax_bits(x)
    for start in range(BLOCK_K, K, BLOCK_K):
        more = tl.load(weight_ptr + start + column, mask=start + column < K, other=0.0)
        largest = tl.maximum(largest, absmax_bits(more))
    absmax = nan_to_inf(tl.max(largest, axis=0))
    inverse = int8_inverse(absmax)
    tl.store(codes_ptr + column, encode_int8(x, inverse), mask=column < K)
    for start in range(BLOCK_K, K, BLOCK_K):
        more = tl.load(weight_ptr + start + column, mask=start + column < K, other=0.0)
        tl.store(codes_ptr + start + column, encode_int8(more, inverse), mask=start + column < K)
    tl.store(absmax_ptr + row, absmax)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float [N, K] -> codes int8 [N, K] and absmax float32 [N, 1]."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(rows, 1, dtype=torch.float32, device=weight.device)
    if rows == 0:
        return codes, absmax
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    block_k = min(16384, next_power_of_2(max(columns, 16)))
    with torch.cuda.device_of(weight):
        launch(
            _quantize_int8_kernel,
            (rows,),
            weight,
            codes,
            absmax,
            columns,
            weight.stride(0),
            options={"num_warps": 16 if block_k > 8192 else 8, "enable_fp_fusion": False},  # see encode_int8
            BLOCK_K=block_k,
        )
    return codes, absmax
