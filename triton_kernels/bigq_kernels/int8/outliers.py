"""Outlier columns for LLM.int8(), gathered from x and from the weight by the list of them.

- "beside": the first programs of the product list outlier columns and gather the first CAPACITY of them, while the
  others multiply codes. A tile waits for them when its codes are multiplied. Programs start in the order of their
  number, and wait only for programs with a lower one, which run or have ended.
- "gather": one launch lists them, and one gathers the first CAPACITY of them for all tiles.
- "tiles": each tile gathers all of them.

Each tile gathers further ones itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = [
    "LISTS",
    "gather_block",
    "gather_outliers",
    "gather_steps",
    "list_or_gather",
    "outlier_tables",
    "wait_for",
]

LISTS = tl.constexpr(16)  # programs of a product that list columns
STEP_ROWS = tl.constexpr(128)  # of the weight or of x, that one program of a product gathers: 16 loads of a thread


def gather_steps(m: int, n: int) -> int:
    """How many programs of a product gather outlier columns of m tokens and n rows of a weight."""
    return ceil_div(m, STEP_ROWS.value) + ceil_div(n, STEP_ROWS.value)


def outlier_tables(x: Tensor, n: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for (rest [M, capacity], dequantized weight [n, capacity], count [1]) of outlier columns of x [M, K]."""
    rest = torch.empty(len(x), capacity, dtype=x.dtype, device=x.device)
    dense = torch.empty(n, capacity, dtype=x.dtype, device=x.device)
    return rest, dense, torch.empty(1, dtype=torch.int32, device=x.device)


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


@triton.jit
def _gather_rows(
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
    program,  # of those that gather; the first ones take the weight
    segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather the first outlier columns of BLOCK_ROWS rows of the weight or of x."""
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


@triton.jit(do_not_specialize=["M"])
def _gather_outliers_kernel(
    x_ptr,  # see _gather_rows, and so below
    codes_ptr,
    scale_ptr,
    weight_ptr,
    absmax_ptr,
    count_ptr,
    column_ptr,
    rest_ptr,
    dense_ptr,
    total_ptr,
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
    _gather_rows(
        x_ptr, codes_ptr, scale_ptr, weight_ptr, absmax_ptr, count_ptr, column_ptr, rest_ptr, dense_ptr, total_ptr,
        M, N, K, tl.program_id(0), segments, SEGMENT, SEGMENTS, CAPACITY, BLOCK_ROWS, BLOCK,
    )  # fmt: skip


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
    rest, dense, total = outlier_tables(x, n, capacity)
    rows = 64
    launch(
        _gather_outliers_kernel, (ceil_div(n, rows) + ceil_div(m, rows),),
        x, codes, scale, weight, absmax, counts, columns, rest, dense, total, m, n, k, counts.shape[0],
        SEGMENT=columns.shape[1], SEGMENTS=next_power_of_2(counts.shape[0]), CAPACITY=capacity,
        BLOCK_ROWS=rows, BLOCK=block, PDL=pdl,
        options={"num_warps": 4, "launch_pdl": pdl},
    )  # fmt: skip
    return rest, dense, total


@triton.jit
def _list_segment(mark_ptr, count_ptr, column_ptr, M, words, segment, SEGMENT: tl.constexpr):
    """List the columns of one segment that are outliers in any token."""
    WORDS: tl.constexpr = SEGMENT // 32
    BLOCK_M: tl.constexpr = max(2048 // WORDS, 8)  # 2048 words are 16 loads of a thread, in flight together
    word = segment * WORDS + tl.arange(0, WORDS)[None, :]
    marks = tl.zeros((BLOCK_M, WORDS), tl.int32)
    for start in tl.range(0, M, BLOCK_M, num_stages=1):  # not staged through shared memory
        row = start + tl.arange(0, BLOCK_M)[:, None]
        marks |= tl.load(mark_ptr + row.to(tl.int64) * words + word, mask=(row < M) & (word < words), other=0)
    found = ((tl.reduce_or(marks, axis=0)[:, None] >> tl.arange(0, 32)[None, :]) & 1).reshape(SEGMENT)
    column = segment * SEGMENT + tl.arange(0, SEGMENT)
    tl.store(column_ptr + segment * SEGMENT + tl.cumsum(found, axis=0) - found, column, mask=found != 0)
    tl.store(count_ptr + segment, tl.sum(found, axis=0))


@triton.jit
def wait_for(done_ptr, count):
    """Return when `count` programs have counted themselves as done. They come earlier in the grid."""
    while tl.atomic_add(done_ptr, 0, sem="acquire", scope="gpu") < count:
        pass


@triton.jit
def list_or_gather(
    program,
    x_ptr,
    codes_ptr,
    scale_ptr,
    weight_ptr,
    absmax_ptr,
    mark_ptr,  # [M, words] int32: see _quantize_tokens_kernel
    ready_ptr,  # [2] int32, zero: how many programs have listed, and have gathered
    count_ptr,
    column_ptr,
    rest_ptr,
    dense_ptr,
    total_ptr,
    M,
    N,
    K,
    words,
    SEGMENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the first programs of a product do: LISTS list a segment each, the next gather STEP_ROWS rows each."""
    if program < LISTS:
        _list_segment(mark_ptr, count_ptr, column_ptr, M, words, program, SEGMENT)
    else:
        wait_for(ready_ptr, LISTS)
        _gather_rows(
            x_ptr, codes_ptr, scale_ptr, weight_ptr, absmax_ptr, count_ptr, column_ptr, rest_ptr, dense_ptr, total_ptr,
            M, N, K, program - LISTS, LISTS, SEGMENT, LISTS, CAPACITY, STEP_ROWS, BLOCK,
        )  # fmt: skip
    tl.debug_barrier()  # the whole program has stored, then one thread publishes it
    tl.atomic_add(ready_ptr + (program >= LISTS).to(tl.int32), 1, sem="release", scope="gpu")
