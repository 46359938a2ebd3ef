"""Tokens for LLM.int8(): int8 codes with one scale a row, and their outlier columns, all in static shapes.

An element beyond the threshold gets code 0. What the codes leave of an outlier column, its *rest*, is multiplied in the
dtype of x: the outliers themselves, and the rounding errors of the others. So a row is quantized without a look at the
other rows, in the launch that finds the columns.

Few tokens need no list: `planes_int8.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.launch import launch
from bigq_kernels.linear_int8_configs import MAX_SPLIT_TILES
from bigq_kernels.tiles import absmax_bits, ceil_div, encode_int8, int8_inverse, next_power_of_2

__all__ = ["gather_block", "gather_outliers", "quantize_tokens", "zero_arrivals"]


@triton.jit
def zero_arrivals(arrived_ptr, tiles):
    """The first program zeroes the counters [tiles] of the product that follows; None where it has none."""
    if arrived_ptr is not None:
        tile = tl.arange(0, MAX_SPLIT_TILES)
        tl.store(arrived_ptr + tile, tl.zeros_like(tile), mask=(tile < tiles) & (tl.program_id(0) == 0))


@triton.jit
def _load_regular(x_ptr, column, K, threshold, OUTLIERS: tl.constexpr):
    """One tile of a row in float32, 0 where |x| >= threshold."""
    x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    return tl.where(tl.abs(x) >= threshold, 0.0, x) if OUTLIERS else x


@triton.jit
def _quantize_row(x_ptr, codes_ptr, scale_ptr, K, threshold, OUTLIERS: tl.constexpr, BLOCK_K: tl.constexpr):
    column = tl.arange(0, BLOCK_K)
    x = _load_regular(x_ptr, column, K, threshold, OUTLIERS)  # kept: most rows are one tile, read once
    largest = absmax_bits(x)
    for start in range(BLOCK_K, K, BLOCK_K):
        largest = tl.maximum(largest, absmax_bits(_load_regular(x_ptr, start + column, K, threshold, OUTLIERS)))
    scale = tl.max(largest, axis=0).to(tl.float32, bitcast=True)  # NaN stays NaN here and makes the row NaN
    inverse = int8_inverse(scale)
    tl.store(codes_ptr + column, encode_int8(x, inverse), mask=column < K)
    for start in range(BLOCK_K, K, BLOCK_K):
        x = _load_regular(x_ptr, start + column, K, threshold, OUTLIERS)
        tl.store(codes_ptr + start + column, encode_int8(x, inverse), mask=start + column < K)
    tl.store(scale_ptr, scale)


@triton.jit
def _find_outliers(x_ptr, count_ptr, column_ptr, first, M, K, threshold, SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr):
    """The columns first to first + SEGMENT that hold an outlier, ascending, and how many they are."""
    column = first + tl.arange(0, SEGMENT)
    found = tl.zeros((SEGMENT,), tl.int32)
    for start in range(0, M, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        mask = (row < M)[:, None] & (column < K)[None, :]
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * K + column[None, :], mask=mask, other=0.0).to(tl.float32)
        found |= tl.max((tl.abs(x) >= threshold).to(tl.int32), axis=0)
    tl.store(column_ptr + tl.cumsum(found, axis=0) - found, column, mask=found != 0)
    tl.store(count_ptr, tl.sum(found, axis=0))


@triton.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _quantize_tokens_kernel(
    x_ptr,  # [M, K]
    codes_ptr,  # [M, K] int8
    scale_ptr,  # [M] float32
    count_ptr,  # [segments] int32, or None: how many outlier columns lie in a segment of K
    column_ptr,  # [segments, SEGMENT] int32, or None: those columns, ascending; what follows them is not set
    arrived_ptr,  # see zero_arrivals
    M,
    K,
    threshold,
    segments,
    tiles,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first programs search a segment of the columns each, the others quantize a row each."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    zero_arrivals(arrived_ptr, tiles)
    OUTLIERS: tl.constexpr = count_ptr is not None
    if OUTLIERS and program < segments:
        first = program * SEGMENT
        _find_outliers(
            x_ptr, count_ptr + program, column_ptr + first, first, M, K, threshold, SEGMENT=SEGMENT, BLOCK_M=BLOCK_M
        )
    else:
        row = (program - segments).to(tl.int64)
        _quantize_row(
            x_ptr + row * K, codes_ptr + row * K, scale_ptr + row, K, threshold, OUTLIERS=OUTLIERS, BLOCK_K=BLOCK_K
        )


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
    count_ptr,  # see _quantize_tokens_kernel
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


def search_tile(m: int, outliers: bool) -> tuple[int, int]:
    """(rows, columns) that one program searches at a time: the fewer columns, the more programs share many rows.

    Three kinds for all numbers of tokens, since each is compiled.
    """
    if m <= 16 or not outliers:
        return 16, 256
    return (64, 256) if m <= 64 else (512, 32)


def quantize_tokens(
    x: Tensor, threshold: float, arrived: Tensor | None, pdl: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes int8 [M, K] and scale [M] of x [M, K]; the counts and columns of its outliers, None for threshold 0.

    `arrived` is zeroed.
    """
    m, k = x.shape
    block_m, segment = search_tile(m, threshold > 0)
    segments = ceil_div(k, segment) if threshold > 0 else 0
    block_k = min(16384, next_power_of_2(max(k, 16)))
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    counts = columns = None
    if segments:
        counts = torch.empty(segments, dtype=torch.int32, device=x.device)
        columns = torch.empty(segments, segment, dtype=torch.int32, device=x.device)
    launch(
        _quantize_tokens_kernel,
        (segments + m,),
        x,
        codes,
        scale,
        counts,
        columns,
        arrived,
        m,
        k,
        threshold,
        segments,
        0 if arrived is None else arrived.numel(),
        SEGMENT=segment,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        PDL=pdl,
        options={"num_warps": 16 if block_k > 8192 else 8, "enable_fp_fusion": False},  # see encode_int8
    )
    return codes, scale, counts, columns


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
        _gather_outliers_kernel,
        (ceil_div(n, rows) + ceil_div(m, rows),),
        x,
        codes,
        scale,
        weight,
        absmax,
        counts,
        columns,
        rest,
        dense,
        total,
        m,
        n,
        k,
        counts.shape[0],
        SEGMENT=columns.shape[1],
        SEGMENTS=next_power_of_2(counts.shape[0]),
        CAPACITY=capacity,
        BLOCK_ROWS=rows,
        BLOCK=block,
        PDL=pdl,
        options={"num_warps": 4, **({"launch_pdl": True} if pdl else {})},
    )
    return rest, dense, total
