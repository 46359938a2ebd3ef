"""Outlier columns for LLM.int8(), gathered from x and from the weight by the list that `tokens.py` makes.

- "tiles": each tile of the product gathers all of them. The first ones are on their way while it multiplies codes.
- "gather": one launch gathers the first CAPACITY of them for all tiles, beside the product. Each tile gathers any
  further ones itself.

What the codes leave of x is computed from x and the scale, as the codes were: so codes are not gathered.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.int8.tokens import LISTED, Tokens
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div, encode_int8, next_power_of_2

__all__ = ["dense_of", "gather_block", "gather_outliers", "outlier_columns", "rest_of"]


@triton.jit
def outlier_columns(
    word_ptr, column_ptr, start, segments, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr
):
    """(outlier columns number start to start + BLOCK, past the last one 0; how many there are in all).

    Each row of [BLOCK, SEGMENTS] looks for one of them. So a warp needs no other, and no barrier.
    """
    segment = tl.arange(0, SEGMENTS)
    count = tl.sum(tl.load(word_ptr + segment, mask=segment < segments, other=0) & 255, axis=0)
    number = start + tl.arange(0, BLOCK)
    segment = segment[None, :] + tl.zeros((BLOCK, SEGMENTS), tl.int32)
    words = tl.load(word_ptr + segment, mask=segment < segments, other=0)
    stop = tl.cumsum(words & 255, axis=1)  # of a segment: the number of the first outlier column after it
    first = stop - (words & 255)
    is_mine = (first <= number[:, None]) & (number[:, None] < stop)  # of one segment at most
    word = tl.sum(tl.where(is_mine, words, 0), axis=1)
    offset = number + tl.sum(tl.where(is_mine, segment * SEGMENT - first, 0), axis=1)  # in the list of columns
    rank = offset & (SEGMENT - 1)
    column = offset - rank + ((word >> (8 + 7 * tl.minimum(rank, LISTED - 1))) & 127)
    rare = (rank >= LISTED) & (number < count)
    column = tl.where(rare, tl.load(column_ptr + offset, mask=rare, other=0), column)
    return tl.where(number < count, column, 0), count


@triton.jit
def rest_of(x, scale, inverse, threshold):
    """What the codes leave of x [BLOCK_M, ...], in its dtype; launch with enable_fp_fusion=False: see encode_int8.

    An outlier has code 0 and comes back as it is.
    """
    wide = x.to(tl.float32)
    regular = tl.where(tl.abs(wide) >= threshold, 0.0, wide)
    codes = encode_int8(regular, inverse[:, None])
    return (wide - codes.to(tl.float32) * (scale * (1.0 / 127.0))[:, None]).to(x.dtype)


@triton.jit
def dense_of(weight, absmax, DTYPE: tl.constexpr):
    """The dequantized weight, as `dequantize_int8` has it."""
    return (weight.to(tl.float32) * absmax[:, None] * (1.0 / 127.0)).to(DTYPE)


@triton.jit
def gather_block(
    x_ptr,
    weight_ptr,
    x_token,  # [BLOCK_M]
    weight_row,  # [BLOCK_N, 1]: where a row starts
    in_m,  # [BLOCK_M, 1]
    word_ptr,  # see Tokens, and so below
    column_ptr,
    start,
    M,
    K,
    segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,  # x is [K, M]
    BLOCK: tl.constexpr,
):
    """(x, int8 weight, how many in all) of outlier columns number start to start + BLOCK, 0 past the last."""
    column, count = outlier_columns(word_ptr, column_ptr, start, segments, SEGMENT, SEGMENTS, BLOCK)
    in_list = (start + tl.arange(0, BLOCK) < count)[None, :]
    column = column[None, :]
    offset = column.to(tl.int64) * M + x_token[:, None] if IS_TRANSPOSED else x_token[:, None] * K + column
    x = tl.load(x_ptr + offset, mask=in_m & in_list, other=0.0)
    return x, tl.load(weight_ptr + weight_row + column, mask=in_list, other=0), count


@triton.jit(do_not_specialize=["M"])
def _gather_outliers_kernel(
    x_ptr,  # [M, K], or transposed
    scale_ptr,  # see Tokens, and so below
    weight_ptr,  # [N, K] int8
    absmax_ptr,  # [N, 1] float32
    word_ptr,
    column_ptr,
    rest_ptr,  # [M, CAPACITY]: the rest of the first outlier columns, zero-padded to whole BLOCKs
    dense_ptr,  # [N, CAPACITY]: the weight's
    total_ptr,  # [1] int32: how many outlier columns there are
    M,
    N,
    K,
    segments,
    threshold,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # In this order: the product that follows starts when x is quantized, and waits for this only in its end.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_ROWS)
    column, count = outlier_columns(word_ptr, column_ptr, 0, segments, SEGMENT, SEGMENTS, BLOCK)
    if program == 0:
        tl.store(total_ptr, count)
    number = tl.arange(0, BLOCK)
    for start in range(0, max(min(count, CAPACITY), 1), BLOCK):  # one block at least
        if start > 0:
            column, _ = outlier_columns(word_ptr, column_ptr, start, segments, SEGMENT, SEGMENTS, BLOCK)
        in_list = (start + number < count)[None, :]
        if program < tiles_n:
            row = program.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            in_n = (row < N)[:, None]
            absmax = tl.load(absmax_ptr + row, mask=row < N, other=0.0)
            weight = tl.load(weight_ptr + row[:, None] * K + column[None, :], mask=in_n & in_list, other=0)
            dense = dense_of(weight, absmax, dense_ptr.dtype.element_ty)
            tl.store(dense_ptr + row[:, None] * CAPACITY + (start + number)[None, :], dense, mask=in_n)
        else:
            row = (program - tiles_n).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            in_m = (row < M)[:, None]
            if IS_TRANSPOSED:
                x_ptrs = x_ptr + column[None, :].to(tl.int64) * M + row[:, None]
            else:
                x_ptrs = x_ptr + row[:, None] * K + column[None, :]
            x = tl.load(x_ptrs, mask=in_m & in_list, other=0.0)
            scale = tl.load(scale_ptr + row, mask=row < M, other=0.0)
            rest = rest_of(x, scale, tl.load(scale_ptr + M + row, mask=row < M, other=0.0), threshold)
            tl.store(rest_ptr + row[:, None] * CAPACITY + (start + number)[None, :], rest, mask=in_m)


def gather_outliers(
    x: Tensor, tokens: Tokens, weight: Tensor, absmax: Tensor, threshold: float, capacity: int, block: int, pdl: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(rest [M, capacity], dequantized weight [N, capacity], count [1]) of the first `capacity` outlier columns.

    Those are set up to the count, padded with zeros to whole blocks of `block` columns, one at least.
    """
    assert tokens.words is not None
    assert tokens.columns is not None
    (m, k), n = x.shape, weight.shape[0]
    rest = torch.empty(m, capacity, dtype=x.dtype, device=x.device)
    dense = torch.empty(n, capacity, dtype=x.dtype, device=x.device)
    total = torch.empty(1, dtype=torch.int32, device=x.device)
    rows, (segments, segment) = 64, tokens.columns.shape
    x_columns = tokens.x_columns
    launch(
        _gather_outliers_kernel, (ceil_div(n, rows) + ceil_div(m, rows),),
        x if x_columns is None else x_columns, tokens.scale, weight, absmax, tokens.words, tokens.columns,
        rest, dense, total, m, n, k, segments, threshold,
        SEGMENT=segment, SEGMENTS=next_power_of_2(segments), CAPACITY=capacity, IS_TRANSPOSED=x_columns is not None,
        BLOCK_ROWS=rows, BLOCK=block, PDL=pdl,
        options={"num_warps": 4, "enable_fp_fusion": False, "launch_pdl": pdl},
    )  # fmt: skip
    return rest, dense, total
