"""Outlier columns for LLM.int8(), gathered from x and from the weight by the list that `tokens.py` makes.

- "gather": one launch gathers the first CAPACITY of them for all tiles of the product.
- "beside": the first programs of the product do, while the others multiply codes. A tile needs them when its codes are
  multiplied. They come first in the grid, so a GPU has started them by then. Where they are not done after MAX_POLLS,
  whatever kept them, the tile gathers for itself. So no order of programs makes a tile wait for ever.
- "tiles": each tile gathers all of them.

Each tile gathers those beyond CAPACITY itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = [
    "TABLE_BLOCK",
    "gather_beside",
    "gather_block",
    "gather_outliers",
    "gather_programs",
    "is_gathered",
    "outlier_tables",
    "wait_for",
]

REST_ROWS = tl.constexpr(64)  # of x, that a program gathers
TABLE_BLOCK = tl.constexpr(16)  # columns: the tables are padded with zeros to whole blocks
LOADS = tl.constexpr(4096)  # numbers of the weight that a program reads together: 32 loads of a thread
MAX_POLLS = tl.constexpr(1000)  # of about 0.7 us


def gather_programs(m: int, n: int, rows: int) -> int:
    """How many programs gather outlier columns of m tokens and n rows of a weight, `rows` of these each."""
    return ceil_div(m, REST_ROWS.value) + ceil_div(n, rows)


def outlier_tables(x: Tensor, n: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Memory for outlier columns of x [M, K]: (their rest [M, capacity], dequantized weight [n, capacity])."""
    rest = torch.empty(len(x), capacity, dtype=x.dtype, device=x.device)
    return rest, torch.empty(n, capacity, dtype=x.dtype, device=x.device)


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
def _gather_weight(
    weight_ptr,  # [N, K] int8
    absmax_ptr,  # [N, 1] float32
    count_ptr,  # see _quantize_tokens_kernel
    column_ptr,
    dense_ptr,  # [N, CAPACITY]: the weight's first outlier columns, dequantized
    N,
    K,
    program,
    stop,  # columns of the table that are set
    segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather BLOCK columns at once of ROWS rows."""
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_n = (row < N)[:, None]
    absmax = tl.load(absmax_ptr + row, mask=row < N, other=0.0)[:, None]
    for start in tl.range(0, stop, BLOCK, num_stages=1):
        number = start + tl.arange(0, BLOCK)
        column, count = outlier_columns(count_ptr, column_ptr, start, segments, SEGMENT, SEGMENTS, BLOCK)
        mask = in_n & (number < count)[None, :]
        weight = tl.load(weight_ptr + row[:, None] * K + column[None, :], mask=mask, other=0)
        dense = dense_of(weight, absmax, dense_ptr.dtype.element_ty)
        tl.store(dense_ptr + row[:, None] * CAPACITY + number[None, :], dense, mask=in_n & (number < stop)[None, :])


@triton.jit
def _gather_rest(
    x_ptr,  # [M, K]
    codes_ptr,  # [M, K] int8
    scale_ptr,  # [M] float32
    count_ptr,
    column_ptr,
    rest_ptr,  # [M, CAPACITY]: the rest of the first outlier columns
    M,
    K,
    program,
    stop,
    segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = program.to(tl.int64) * REST_ROWS + tl.arange(0, REST_ROWS)
    in_m = (row < M)[:, None]
    scale = tl.load(scale_ptr + row, mask=row < M, other=0.0)[:, None]
    for start in tl.range(0, stop, BLOCK, num_stages=1):
        number = start + tl.arange(0, BLOCK)
        column, count = outlier_columns(count_ptr, column_ptr, start, segments, SEGMENT, SEGMENTS, BLOCK)
        mask = in_m & (number < count)[None, :]
        x = tl.load(x_ptr + row[:, None] * K + column[None, :], mask=mask, other=0.0)
        codes = tl.load(codes_ptr + row[:, None] * K + column[None, :], mask=mask, other=0)
        tl.store(rest_ptr + row[:, None] * CAPACITY + number[None, :], rest_of(x, codes, scale), mask=in_m)


@triton.jit
def _gather_rows(
    x_ptr,
    codes_ptr,
    scale_ptr,
    weight_ptr,
    absmax_ptr,
    count_ptr,
    column_ptr,
    rest_ptr,
    dense_ptr,
    M,
    N,
    K,
    program,  # of those that gather; the first ones take the weight
    segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set the tables of ROWS rows of the weight, or of REST_ROWS of x: zero-padded to whole TABLE_BLOCKs of columns.

    Beside a product that is bound by memory a load takes several microseconds, so BLOCK columns are in flight together.
    """
    programs_n = tl.cdiv(N, ROWS)
    counts = tl.load(count_ptr + tl.arange(0, SEGMENTS), mask=tl.arange(0, SEGMENTS) < segments, other=0)
    stop = min(tl.cdiv(tl.sum(counts, axis=0), TABLE_BLOCK) * TABLE_BLOCK, CAPACITY)
    if program < programs_n:
        _gather_weight(
            weight_ptr, absmax_ptr, count_ptr, column_ptr, dense_ptr, N, K, program, stop, segments,
            SEGMENT, SEGMENTS, CAPACITY, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _gather_rest(
            x_ptr, codes_ptr, scale_ptr, count_ptr, column_ptr, rest_ptr, M, K, program - programs_n, stop, segments,
            SEGMENT, SEGMENTS, CAPACITY, TABLE_BLOCK,
        )  # fmt: skip


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
    M,
    N,
    K,
    segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    _gather_rows(
        x_ptr, codes_ptr, scale_ptr, weight_ptr, absmax_ptr, count_ptr, column_ptr, rest_ptr, dense_ptr,
        M, N, K, tl.program_id(0), segments, SEGMENT, SEGMENTS, CAPACITY, ROWS, BLOCK,
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
    pdl: bool,
) -> tuple[Tensor, Tensor]:
    """(rest [M, capacity], dequantized weight [N, capacity]) of the first `capacity` outlier columns.

    Those are set up to the count, padded with zeros to whole blocks of TABLE_BLOCK columns.
    """
    (m, k), n = x.shape, weight.shape[0]
    rest, dense = outlier_tables(x, n, capacity)
    rows = 64
    launch(
        _gather_outliers_kernel, (gather_programs(m, n, rows),),
        x, codes, scale, weight, absmax, counts, columns, rest, dense, m, n, k, counts.shape[0],
        SEGMENT=columns.shape[1], SEGMENTS=next_power_of_2(counts.shape[0]), CAPACITY=capacity,
        ROWS=rows, BLOCK=TABLE_BLOCK.value, PDL=pdl,
        options={"num_warps": 4, "launch_pdl": pdl},
    )  # fmt: skip
    return rest, dense


@triton.jit
def gather_beside(
    program,
    x_ptr,
    codes_ptr,
    scale_ptr,
    weight_ptr,
    absmax_ptr,
    ready_ptr,  # [1] int32, zero: how many programs have gathered
    count_ptr,
    column_ptr,
    rest_ptr,
    dense_ptr,
    M,
    N,
    K,
    segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What the first programs of a product do, each for its rows."""
    _gather_rows(
        x_ptr, codes_ptr, scale_ptr, weight_ptr, absmax_ptr, count_ptr, column_ptr, rest_ptr, dense_ptr,
        M, N, K, program, segments, SEGMENT, SEGMENTS, CAPACITY, ROWS, LOADS // ROWS,
    )  # fmt: skip
    tl.debug_barrier()  # the whole program has stored, then one thread publishes it
    tl.atomic_add(ready_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(ready_ptr, programs):
    """Whether `programs` programs have gathered, after a wait of MAX_POLLS at most."""
    ready, polls = 0, 0
    while (ready < programs) & (polls < MAX_POLLS):
        ready = tl.atomic_add(ready_ptr, 0, sem="acquire", scope="gpu")
        polls += 1
    return ready >= programs


@triton.jit
def is_gathered(ready_ptr, programs):
    """Whether `programs` programs have gathered, the same for all threads: one asks."""
    return tl.atomic_add(ready_ptr, 0, sem="acquire", scope="gpu") >= programs
