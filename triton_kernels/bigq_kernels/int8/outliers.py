"""Outlier columns for LLM.int8(), gathered from x and from the weight by the list that `tokens.py` makes.

Above 128 tokens one launch gathers the first 128 outlier columns for all tiles of the product. Each tile gathers any
further ones itself, and for fewer tokens all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = ["gather_block", "gather_outliers"]


@triton.jit
def outlier_columns(
    count_ptr, column_ptr, start, segments, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr
):
    """(outlier columns number start to start + BLOCK, past the last one 0; how many there are in all)."""
    segment = tl.arange(0, SEGMENTS)
    counts = tl.load(count_ptr + segment, mask=segment < segments, other=0)
    number = start + tl.arange(0, BLOCK)
    before = tl.cumsum(counts, axis=0)[None, :] <= number[:, None]  # segments that end before this outlier
    count = tl.sum(counts, axis=0)
    offset = tl.sum(before.to(tl.int32), axis=1) * SEGMENT + number
    offset -= tl.sum(tl.where(before, counts[None, :], 0), axis=1)
    return tl.load(column_ptr + offset, mask=number < count, other=0), count


@triton.jit
def rest_of(x, codes, scale):
    """What the codes leave of x, in its dtype; an outlier has code 0 and comes back as it is."""
    return (x.to(tl.float32) - codes.to(tl.float32) * (scale * (1.0 / 127.0))).to(x.dtype)


@triton.jit
def dense_of(weight, absmax, DTYPE: tl.constexpr):
    """The dequantized weight, as `dequantize_int8` has it."""
    return (weight.to(tl.float32) * absmax * (1.0 / 127.0)).to(DTYPE)


@triton.jit
def gather_block(
    x_ptr,
    codes_ptr,
    weight_ptr,
    x_row,  # [BLOCK_M, 1]: where a row starts, and so below
    weight_row,
    in_m,
    scale,  # [BLOCK_M]
    absmax,
    count_ptr,
    column_ptr,
    start,
    segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(rest, dequantized weight, how many in all) of outlier columns number start to start + BLOCK, 0 past the last."""
    column, count = outlier_columns(count_ptr, column_ptr, start, segments, SEGMENT, SEGMENTS, BLOCK)
    in_list = (start + tl.arange(0, BLOCK) < count)[None, :]
    x = tl.load(x_ptr + x_row + column[None, :], mask=in_m & in_list, other=0.0)
    codes = tl.load(codes_ptr + x_row + column[None, :], mask=in_m & in_list, other=0)
    weight = tl.load(weight_ptr + weight_row + column[None, :], mask=in_list, other=0)
    return rest_of(x, codes, scale[:, None]), dense_of(weight, absmax[:, None], x.dtype), count


@triton.jit(do_not_specialize=["M"])
def _gather_outliers_kernel(
    x_ptr,  # [M, K]
    codes_ptr,  # [M, K] int8
    scale_ptr,  # [M] float32
    weight_ptr,  # [N, K] int8
    absmax_ptr,  # [N, 1] float32
    count_ptr,  # see _list_outliers_kernel
    column_ptr,
    rest_ptr,  # [M, CAPACITY]: the rest of the first outlier columns, zero-padded to whole BLOCKs
    dense_ptr,  # [N, CAPACITY]: the weight's
    total_ptr,  # [1] int32: how many outlier columns there are
    M,
    N,
    K,
    segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_ROWS)
    column, count = outlier_columns(count_ptr, column_ptr, 0, segments, SEGMENT, SEGMENTS, BLOCK)
    if program == 0:
        tl.store(total_ptr, count)
    number = tl.arange(0, BLOCK)
    for start in range(0, max(min(count, CAPACITY), 1), BLOCK):  # one block at least
        if start > 0:
            column, _ = outlier_columns(count_ptr, column_ptr, start, segments, SEGMENT, SEGMENTS, BLOCK)
        in_list = (start + number < count)[None, :]
        if program < tiles_n:
            row = program.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            in_n = (row < N)[:, None]
            absmax = tl.load(absmax_ptr + row, mask=row < N, other=0.0)[:, None]
            weight = tl.load(weight_ptr + row[:, None] * K + column[None, :], mask=in_n & in_list, other=0)
            dense = dense_of(weight, absmax, dense_ptr.dtype.element_ty)
            tl.store(dense_ptr + row[:, None] * CAPACITY + (start + number)[None, :], dense, mask=in_n)
        else:
            row = (program - tiles_n).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            in_m = (row < M)[:, None]
            offset = row[:, None] * K + column[None, :]
            x = tl.load(x_ptr + offset, mask=in_m & in_list, other=0.0)
            codes = tl.load(codes_ptr + offset, mask=in_m & in_list, other=0)
            rest = rest_of(x, codes, tl.load(scale_ptr + row, mask=row < M, other=0.0)[:, None])
            tl.store(rest_ptr + row[:, None] * CAPACITY + (start + number)[None, :], rest, mask=in_m)


def gather_outliers(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    absmax: Tensor,
    counts: Tensor,
    columns: Tensor,
    capacity: int,
    block: int,
    pdl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rest [M, capacity], dequantized weight [N, capacity], count [1]) of the first `capacity` outlier columns.

    Those are set up to the count, padded with zeros to whole blocks of `block` columns, one at least.
    """
    (m, k), n = x.shape, weight.shape[0]
    rest = torch.empty(m, capacity, dtype=x.dtype, device=x.device)
    dense = torch.empty(n, capacity, dtype=x.dtype, device=x.device)
    total = torch.empty(1, dtype=torch.int32, device=x.device)
    rows = 64
    launch(
        _gather_outliers_kernel, (ceil_div(n, rows) + ceil_div(m, rows),),
        x, codes, scale, weight, absmax, counts, columns, rest, dense, total, m, n, k, counts.shape[0],
        SEGMENT=columns.shape[1], SEGMENTS=next_power_of_2(counts.shape[0]), CAPACITY=capacity,
        BLOCK_ROWS=rows, BLOCK=block, PDL=pdl,
        options={"num_warps": 4, "launch_pdl": pdl},
    )  # fmt: skip
    return rest, dense, total
