"""Tokens for LLM.int8(): int8 codes with one scale a row, and the list of their outlier columns, in static shapes.

- An element beyond the threshold gets code 0, whatever the other rows hold. So no row is read for another, and codes do
  not wait for the list.
- Up to MAX_FIND_M tokens, further programs of the same launch read the columns of all tokens, from L2, and list them.
  They also store each outlier column of x as a row: the tiles of the product then read it with few loads.
- For more tokens, a program quantizes a row and sets a bit for each of its columns that has an outlier. A second launch
  ORs the bits of all rows and lists the columns.
- What the codes leave of an outlier column is its *rest*: the outliers themselves, and the rounding errors of the other
  elements. It is multiplied in the dtype of x.

Few tokens need no list: see `planes.py`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.int8.choose import MAX_SPLIT_TILES
from bigq_kernels.launch import launch
from bigq_kernels.tiles import absmax_bits, ceil_div, encode_int8, int8_inverse, next_power_of_2

__all__ = ["LISTED", "Tokens", "quantize_tokens", "zero_arrivals"]

MAX_FIND_M = 512
SEGMENT = 128  # columns that one program lists: of marks, 16 bytes a token
COPIED = tl.constexpr(4)  # outlier columns of x that are stored together
MAX_SHORT_K = 8192  # programs that find columns in longer tokens look at twice as many
LISTED = tl.constexpr(3)  # outlier columns of a segment that its word holds, in 7 bits each, above its count in 8


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """x [M, K] in int8, and the list of its outlier columns."""

    codes: Tensor  # int8 [M, K]
    scale: Tensor  # float32 [1, M]; where the threshold is not 0 [2, M], see int8_inverse for the second row
    words: Tensor | None  # int32 [segments]: how many outlier columns lie in a segment of K, and the first LISTED
    columns: Tensor | None  # int32 [segments, SEGMENT]: those columns, ascending; what follows them is not set
    x_columns: Tensor | None  # [K, M]: x transposed, set in outlier columns alone; None above MAX_FIND_M tokens


@triton.jit
def zero_arrivals(arrived_ptr, tiles):
    """The first program zeroes the counters [tiles] of the product that follows; None where it has none."""
    if arrived_ptr is not None:
        tile = tl.arange(0, MAX_SPLIT_TILES)
        tl.store(arrived_ptr + tile, tl.zeros_like(tile), mask=tile < tl.where(tl.program_id(0) == 0, tiles, 0))


@triton.jit
def _outlier_words(found):
    """32 elements a word, the first in its lowest bit."""
    bits = found.to(tl.int32).reshape(found.numel // 32, 32) << tl.arange(0, 32)[None, :]
    return tl.sum(bits, axis=1)


@triton.jit
def _store_list(found, word_ptr, column_ptr, segment, SEGMENT: tl.constexpr):
    """List the columns of a segment that have 1 in `found` [SEGMENT]: see Tokens. How many there are."""
    place = tl.arange(0, SEGMENT)
    before = tl.cumsum(found, axis=0) - found
    count = tl.sum(found, axis=0)
    tl.store(column_ptr + segment * SEGMENT + before, segment * SEGMENT + place, mask=found != 0)
    in_word = tl.where((found != 0) & (before < LISTED), place << (8 + 7 * tl.minimum(before, LISTED - 1)), 0)
    tl.store(word_ptr + segment, tl.sum(in_word, axis=0) | count)
    return count


@triton.jit
def _find_columns(
    x_ptr,
    word_ptr,
    column_ptr,
    x_column_ptr,
    segment,
    M,
    K,
    threshold,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least M
):
    """List the columns of one segment of x that have an outlier in any token, and store them as rows."""
    row = tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    column = (segment * SEGMENT + tl.arange(0, SEGMENT))[None, :]
    mask = (row < M) & (column < K)
    x = tl.load(x_ptr + row * K + column, mask=mask, other=0.0)
    found = tl.max((tl.abs(x.to(tl.float32)) >= threshold).to(tl.int32), axis=0)
    count = _store_list(found, word_ptr, column_ptr, segment, SEGMENT)
    row = tl.arange(0, BLOCK_M)[None, :].to(tl.int64)
    place = tl.arange(0, SEGMENT)[None, :] + tl.zeros((COPIED, SEGMENT), tl.int32)
    number = tl.cumsum(found, axis=0)[None, :]
    for start in tl.range(0, count, COPIED, num_stages=1):
        later = start + tl.arange(0, COPIED)[:, None]
        listed = tl.sum(tl.where((found != 0)[None, :] & (number == later + 1), place, 0), axis=1)[:, None]
        listed += segment * SEGMENT
        copied = tl.load(x_ptr + row * K + listed, mask=(later < count) & (row < M))
        tl.store(x_column_ptr + listed.to(tl.int64) * M + row, copied, mask=(later < count) & (row < M))


@triton.jit
def _load_regular(
    x_ptr, mark_ptr, start, K, words, threshold, OUTLIERS: tl.constexpr, MARK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One tile of a row in float32, 0 where |x| >= threshold; with MARK those places are written to mark_ptr."""
    column = start + tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    if OUTLIERS:
        found = tl.abs(x) >= threshold
        if MARK and mark_ptr is not None:
            word = start // 32 + tl.arange(0, BLOCK_K // 32)
            tl.store(mark_ptr + word, _outlier_words(found), mask=word < words)
        x = tl.where(found, 0.0, x)
    return x


@triton.jit(do_not_specialize=["M", "finders"])  # a new number of tokens compiles nothing
def _quantize_tokens_kernel(
    x_ptr,  # [M, K]
    codes_ptr,  # [M, K] int8
    scale_ptr,  # see Tokens
    mark_ptr,  # [M, words] int32, or None: a bit a column, set where the token has an outlier
    word_ptr,  # see Tokens, and so below; None where no program finds columns
    column_ptr,
    x_column_ptr,
    arrived_ptr,  # see zero_arrivals
    M,
    K,
    finders,  # the first programs: each finds the outlier columns of a segment
    words,
    threshold,
    tiles,
    OUTLIERS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,  # at least M, where there are finders
    TILES: tl.constexpr,  # of a row: a loop that the compiler cannot leave out takes 30 to 60 registers
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    zero_arrivals(arrived_ptr, tiles)
    program = tl.program_id(0)
    if word_ptr is not None:
        if program < finders:
            _find_columns(
                x_ptr, word_ptr, column_ptr, x_column_ptr, program, M, K, threshold, SEGMENT, BLOCK_M
            )  # fmt: skip
            return
        program -= finders
    row = program.to(tl.int64)
    x_ptr += row * K
    codes_ptr += row * K
    if mark_ptr is not None:
        mark_ptr += row * words
    column = tl.arange(0, BLOCK_K)
    x = _load_regular(x_ptr, mark_ptr, 0, K, words, threshold, OUTLIERS, True, BLOCK_K)  # kept: most rows are one tile
    largest = absmax_bits(x)
    for tile in range(1, TILES):
        more = _load_regular(x_ptr, mark_ptr, tile * BLOCK_K, K, words, threshold, OUTLIERS, True, BLOCK_K)
        largest = tl.maximum(largest, absmax_bits(more))
    scale = tl.max(largest, axis=0).to(tl.float32, bitcast=True)  # NaN stays NaN here and makes the row NaN
    inverse = int8_inverse(scale)
    tl.store(codes_ptr + column, encode_int8(x, inverse), mask=column < K)
    for tile in range(1, TILES):
        start = tile * BLOCK_K
        more = _load_regular(x_ptr, mark_ptr, start, K, words, threshold, OUTLIERS, False, BLOCK_K)
        tl.store(codes_ptr + start + column, encode_int8(more, inverse), mask=start + column < K)
    tl.store(scale_ptr + row, scale)
    if OUTLIERS:
        tl.store(scale_ptr + M + row, inverse)


@triton.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _list_outliers_kernel(
    mark_ptr,  # see _quantize_tokens_kernel
    word_ptr,  # see Tokens, and so below
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
    _store_list(found, word_ptr, column_ptr, segment, SEGMENT)


def _segment(m: int, k: int) -> int:
    """Columns that one program finds: the more, the fewer entries the list has, and the longer the program takes."""
    return (64 if m <= 128 else 32) * (1 if k <= MAX_SHORT_K else 2)


def quantize_tokens(x: Tensor, threshold: float, arrived: Tensor | None, pdl: bool) -> Tokens:
    """x [M, K] in int8, with the list of its outlier columns where the threshold is not 0. `arrived` is zeroed."""
    m, k = x.shape
    is_found, is_marked = threshold > 0 and m <= MAX_FIND_M, threshold > 0 and m > MAX_FIND_M
    segment = _segment(m, k) if is_found else SEGMENT
    segments = ceil_div(k, segment) if threshold > 0 else 0
    finders, marked = segments if is_found else 0, segments * segment // 32 if is_marked else 0
    block_k = min(16384, next_power_of_2(max(k, SEGMENT)))
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(2 if threshold > 0 else 1, m, dtype=torch.float32, device=x.device)
    marks = torch.empty(m, marked, dtype=torch.int32, device=x.device) if is_marked else None
    words = torch.empty(segments, dtype=torch.int32, device=x.device) if segments else None
    columns = torch.empty(segments, segment, dtype=torch.int32, device=x.device) if segments else None
    x_columns = torch.empty(k, m, dtype=x.dtype, device=x.device) if is_found else None
    found = (words, columns, x_columns) if is_found else (None, None, None)
    launch(
        _quantize_tokens_kernel, (finders + m,),
        x, codes, scale, marks, *found, arrived, m, k, finders, marked, threshold,
        0 if arrived is None else arrived.numel(),
        OUTLIERS=threshold > 0, SEGMENT=segment, BLOCK_M=max(16, next_power_of_2(m)) if is_found else 1,
        TILES=ceil_div(k, block_k), BLOCK_K=block_k, PDL=pdl,
        # enable_fp_fusion: see encode_int8.
        options={"num_warps": 16 if block_k > 8192 else 8, "enable_fp_fusion": False, "launch_pdl": pdl},
    )  # fmt: skip
    if marks is not None and words is not None:
        launch(
            _list_outliers_kernel, (segments,),
            marks, words, columns, m,
            SEGMENT=segment, BLOCK_M=128, LOADS=16, PDL=pdl,
            # maxnreg: a cap that none reaches. Without one the compiler keeps to 32 registers and few loads in flight.
            options={"num_warps": 4, "maxnreg": 128, "launch_pdl": pdl},
        )  # fmt: skip
    return Tokens(codes=codes, scale=scale, words=words, columns=columns, x_columns=x_columns)
