"""Tokens for LLM.int8(): int8 codes with one scale a row, and the list of their outlier columns, in static shapes.

- An element beyond the threshold gets code 0, whatever the other rows hold. So no row is read for another, and codes do
  not wait for the list.
- Up to MAX_FIND_M tokens, other programs of the same launch read the columns of all tokens, and list them. x comes from
  L2 for them.
- For more tokens, a program quantizes four rows and sets a bit for each of their columns that has an outlier. A second
  launch ORs the bits of all programs and lists the columns.
- What the codes leave of an outlier column is its *rest*: the outliers themselves, and the rounding errors of the other
  elements. It is multiplied in the dtype of x.

Few tokens need no list: see `planes.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.int8.choose import MAX_SPLIT_TILES
from bigq_kernels.launch import launch
from bigq_kernels.tiles import absmax_bits, ceil_div, encode_int8, int8_inverse, next_power_of_2

__all__ = ["quantize_tokens", "zero_arrivals"]

MAX_FIND_M = 256  # 512 tokens of 4096 take 8.4 us found and 6.2 marked (H200)
SEGMENT = 128  # columns that one program lists: of marks, 16 bytes of a row
SHORT_SEGMENT = 64  # columns that one program finds in x where a token is short: 128 bytes of a row
MAX_SHORT_K = 8192


@triton.jit
def zero_arrivals(arrived_ptr, tiles):
    """The first program zeroes the counters [tiles] of the product that follows; None where it has none."""
    if arrived_ptr is not None:
        tile = tl.arange(0, MAX_SPLIT_TILES)
        tl.store(arrived_ptr + tile, tl.zeros_like(tile), mask=tile < tl.where(tl.program_id(0) == 0, tiles, 0))


@triton.jit
def _store_list(found, count_ptr, column_ptr, segment, SEGMENT: tl.constexpr):
    """Store how many columns of a segment have 1 in `found` [SEGMENT], and which, ascending."""
    column = segment * SEGMENT + tl.arange(0, SEGMENT)
    tl.store(column_ptr + segment * SEGMENT + tl.cumsum(found, axis=0) - found, column, mask=found != 0)
    tl.store(count_ptr + segment, tl.sum(found, axis=0))


@triton.jit
def _find_columns(x_ptr, count_ptr, column_ptr, segment, M, K, threshold, SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr):
    """List the columns of one segment of x [M, K] that have an outlier in any token."""
    column = (segment * SEGMENT + tl.arange(0, SEGMENT))[None, :]
    found = tl.zeros((SEGMENT,), tl.int32)
    for start in tl.range(0, M, BLOCK_M, num_stages=1):  # not staged through shared memory
        row = (start + tl.arange(0, BLOCK_M))[:, None]
        x = tl.load(x_ptr + row.to(tl.int64) * K + column, mask=(row < M) & (column < K), other=0.0)
        found |= tl.max((tl.abs(x.to(tl.float32)) >= threshold).to(tl.int32), axis=0)
    _store_list(found, count_ptr, column_ptr, segment, SEGMENT)


@triton.jit
def _load_regular(
    x_ptr,
    mark_ptr,
    row,
    start,
    M,
    K,
    words,
    threshold,
    OUTLIERS: tl.constexpr,
    MARK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of rows [ROWS, 1] in float32, 0 where |x| >= threshold.

    With MARK, and where `mark_ptr` is there, a word for 32 columns is written: a bit where any of the rows has an
    outlier, the first column in the lowest.
    """
    column = start + tl.arange(0, BLOCK_K)[None, :]
    x = tl.load(x_ptr + row * K + column, mask=(row < M) & (column < K), other=0.0).to(tl.float32)
    if OUTLIERS:
        found = tl.abs(x) >= threshold
        if MARK and mark_ptr is not None:
            bits = tl.max(found.to(tl.int32), axis=0).reshape(BLOCK_K // 32, 32) << tl.arange(0, 32)[None, :]
            word = start // 32 + tl.arange(0, BLOCK_K // 32)
            tl.store(mark_ptr + word, tl.sum(bits, axis=1), mask=word < words)
        x = tl.where(found, 0.0, x)
    return x


@triton.jit(do_not_specialize=["M", "finders"])  # a new number of tokens compiles nothing
def _quantize_tokens_kernel(
    x_ptr,  # [M, K]
    codes_ptr,  # [M, K] int8
    scale_ptr,  # [M] float32
    mark_ptr,  # [programs, words] int32: see _load_regular; or None
    count_ptr,  # [finders] int32: how many outlier columns lie in a segment of K; or None
    column_ptr,  # [finders, SEGMENT] int32: those columns, ascending; what follows them is not set
    ready_ptr,  # [1] int32: see gather_beside, zeroed; or None
    arrived_ptr,  # see zero_arrivals
    M,
    K,
    finders,  # the first programs: each finds the outlier columns of a segment
    words,
    threshold,
    tiles,
    OUTLIERS: tl.constexpr,
    TILES: tl.constexpr,  # of a row: a loop that the compiler cannot leave out takes 30 to 60 registers
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,  # tokens that a finder looks at together
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    zero_arrivals(arrived_ptr, tiles)
    program = tl.program_id(0)
    if ready_ptr is not None:
        tl.store(ready_ptr, 0, mask=program == 0)
    if count_ptr is not None:
        if program < finders:
            _find_columns(x_ptr, count_ptr, column_ptr, program, M, K, threshold, SEGMENT, BLOCK_M)
            return
        program -= finders
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if mark_ptr is not None:
        mark_ptr += program.to(tl.int64) * words
    column = tl.arange(0, BLOCK_K)[None, :]
    # kept: most rows are one tile
    x = _load_regular(x_ptr, mark_ptr, row, 0, M, K, words, threshold, OUTLIERS, True, BLOCK_K)
    largest = absmax_bits(x)
    for tile in range(1, TILES):
        start = tile * BLOCK_K
        more = _load_regular(x_ptr, mark_ptr, row, start, M, K, words, threshold, OUTLIERS, True, BLOCK_K)
        largest = tl.maximum(largest, absmax_bits(more))
    # NaN stays NaN here and makes the row NaN.
    scale = tl.max(largest, axis=1).to(tl.float32, bitcast=True)[:, None]
    inverse = int8_inverse(scale)
    codes_ptr += row * K
    tl.store(codes_ptr + column, encode_int8(x, inverse), mask=(row < M) & (column < K))
    for tile in range(1, TILES):
        start = tile * BLOCK_K
        more = _load_regular(x_ptr, mark_ptr, row, start, M, K, words, threshold, OUTLIERS, False, BLOCK_K)
        tl.store(codes_ptr + start + column, encode_int8(more, inverse), mask=(row < M) & (start + column < K))
    tl.store(scale_ptr + row, scale, mask=row < M)


@triton.jit(do_not_specialize=["M"])
def _list_outliers_kernel(
    mark_ptr,  # [M, words] int32: see _quantize_tokens_kernel, whose programs are rows here
    count_ptr,  # see _quantize_tokens_kernel, and so below
    column_ptr,
    M,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a segment."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    segment = tl.program_id(0)
    WORDS: tl.constexpr = SEGMENT // 32
    words = tl.num_programs(0) * WORDS
    word = segment * WORDS + tl.arange(0, WORDS)
    marks = tl.zeros((BLOCK_M, WORDS), tl.int32)
    for start in range(0, M, LOADS * BLOCK_M):
        for load in tl.static_range(LOADS):  # in flight together
            row = start + load * BLOCK_M + tl.arange(0, BLOCK_M)
            row_ptr = mark_ptr + row.to(tl.int64)[:, None] * words
            marks |= tl.load(row_ptr + word[None, :], mask=(row < M)[:, None], other=0)
    found = ((tl.reduce_or(marks, axis=0)[:, None] >> tl.arange(0, 32)[None, :]) & 1).reshape(SEGMENT)
    _store_list(found, count_ptr, column_ptr, segment, SEGMENT)


def quantize_tokens(
    x: Tensor, threshold: float, arrived: Tensor | None, ready: Tensor | None, pdl: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes int8 [M, K] and scale [M] of x [M, K], counts [segments] and columns [segments, SEGMENT] of its outliers.

    No list for threshold 0. `arrived` and `ready` are zeroed.
    """
    m, k = x.shape
    is_found, is_marked = threshold > 0 and m <= MAX_FIND_M, threshold > 0 and m > MAX_FIND_M
    segment = SHORT_SEGMENT if is_found and k <= MAX_SHORT_K else SEGMENT
    segments = ceil_div(k, segment) if threshold > 0 else 0
    block_k = min(16384, next_power_of_2(max(k, SEGMENT)))
    rows = min(4, 16384 // block_k) if is_marked else 1
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    counts = columns = marks = None
    if segments:
        counts = torch.empty(segments, dtype=torch.int32, device=x.device)
        columns = torch.empty(segments, segment, dtype=torch.int32, device=x.device)
    if is_marked:
        marks = torch.empty(ceil_div(m, rows), segments * segment // 32, dtype=torch.int32, device=x.device)
    finders = segments if is_found else 0
    launch(
        _quantize_tokens_kernel, (finders + ceil_div(m, rows),),
        x, codes, scale, marks, counts if is_found else None, columns if is_found else None, ready, arrived, m, k,
        finders, 0 if marks is None else marks.shape[1], threshold, 0 if arrived is None else arrived.numel(),
        OUTLIERS=threshold > 0, TILES=ceil_div(k, block_k), ROWS=rows, BLOCK_K=block_k, SEGMENT=segment,
        BLOCK_M=16 if m <= 16 else 64 if m <= 64 else 256, PDL=pdl,
        # enable_fp_fusion: see encode_int8.
        options={"num_warps": 16 if block_k > 8192 else 8, "enable_fp_fusion": False, "launch_pdl": pdl},
    )  # fmt: skip
    if marks is not None and counts is not None and columns is not None:
        launch(
            _list_outliers_kernel, (segments,),
            marks, counts, columns, len(marks),
            SEGMENT=segment, BLOCK_M=128, LOADS=16, PDL=pdl,
            # maxnreg: a cap that none reaches. Without one the compiler keeps to 32 registers and few loads in flight.
            options={"num_warps": 4, "maxnreg": 128, "launch_pdl": pdl},
        )  # fmt: skip
    return codes, scale, counts, columns
