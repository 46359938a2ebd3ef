"""Dequantize int8 rows: code * absmax, rounded, * (1/127), rounded, then rounded to the output's dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.checks import as_floats, check_dequantize_int8
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = ["dequantize_int8"]


@triton.jit
def _dequantize_int8_kernel(
    codes_ptr,  # [N, K] int8
    absmax_ptr,  # [N, 1] float32
    out_ptr,  # [N, K]
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0)
    row = (tile // column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = (tile % column_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (row < N)[:, None] & (column < K)[None, :]
    offset = row[:, None] * K + column[None, :]
    codes = tl.load(codes_ptr + offset, mask=mask, other=0).to(tl.float32)
    absmax = tl.load(absmax_ptr + row, mask=row < N, other=0.0)
    values = codes * absmax[:, None] * (1.0 / 127.0)
    tl.store(out_ptr + offset, values.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_int8(weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes int8 [N, K] and absmax [N, 1], float32 or its bits as int32 -> [N, K] of `dtype`."""
    check_dequantize_int8(weight, absmax)
    absmax = as_floats(absmax)
    rows, columns = weight.shape
    out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    block_k = min(1024, next_power_of_2(columns))
    block_n = 4096 // block_k  # 4096 elements a program: 32 registers a thread
    grid = (ceil_div(rows, block_n) * ceil_div(columns, block_k),)
    with torch.cuda.device_of(weight):
        launch(
            _dequantize_int8_kernel,
            grid,
            weight.contiguous(),
            absmax.contiguous(),
            out,
            rows,
            columns,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            options={},
        )
    return out
