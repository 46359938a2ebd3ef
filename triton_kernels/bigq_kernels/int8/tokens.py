"""Tokens for LLM.int8(): int8 codes with one scale a row, and the list of their outlier columns, in static shapes.

- An element beyond the threshold gets code 0, whatever the other rows hold. So no row is read for another, and codes do
  not wait for the list.
- The list is a bit for each column. Up to MAX_FIND_M tokens, further programs of the same launch find them: each reads
  32 columns of all tokens, from L2. Multiprocessors are busy issuing instructions in this launch, so elements of 16
  bits are compared two at a time, as integers.
- For more tokens, a program that quantizes a row sets the bits of that row. A second launch ORs the bits of all rows.
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

__all__ = ["Tokens", "quantize_tokens", "zero_arrivals"]

MAX_FIND_M = 512
SEGMENT = 128  # columns for which one program ORs the bits of rows: 16 bytes a row


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """x [M, K] in int8, and the list of its outlier columns."""

    codes: Tensor  # int8 [M, K]
    scale: Tensor  # float32 [M]
    marks: Tensor | None  # int32, a bit a column, the first in the lowest: set where any token has an outlier


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
def _find_in_pairs(pairs, threshold, DTYPE: tl.constexpr):
    """Bit 15 and bit 31 say which of two elements in an int32 are beyond the threshold; the others mean nothing.

    As integers, magnitudes order like their values, and NaN follows Inf.
    """
    least = tl.full((1, 1), threshold, tl.float32).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
    least = tl.maximum(least, 1)  # a cast may make the smallest numbers 0, and with 0 every element would be beyond
    inf: tl.constexpr = 0x7F80 if tl.bfloat16 == DTYPE else 0x7C00
    magnitude = pairs & 0x7FFF7FFF
    beyond = magnitude + (0x8000 - least) * 0x10001  # no sum of one element carries into the other
    return beyond & ~(magnitude + (0x7FFF - inf) * 0x10001)  # without NaN


@triton.jit
def _find_columns(x_ptr, mark_ptr, word, M, K, threshold, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr):
    """Store one word of marks. With PAIRS elements have 16 bits, K is even, and x is aligned for int32."""
    ROWS: tl.constexpr = min(BLOCK_M, 64)  # of 64 bytes: 16 bytes a thread
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    if PAIRS:
        pair = tl.arange(0, 16)[None, :]
        x_ptrs = x_ptr.to(tl.pointer_type(tl.int32)) + word * 16 + pair
        in_k = word * 16 + pair < K // 2
        found = tl.zeros((ROWS, 16), tl.int32)
        for start in tl.static_range(0, BLOCK_M, ROWS):  # all loads in flight together
            pairs = tl.load(x_ptrs + (start + row) * (K // 2), mask=(start + row < M) & in_k, other=0)
            found |= _find_in_pairs(pairs, threshold, x_ptr.dtype.element_ty)
        bits = (((found >> 15) & 1) | ((found >> 30) & 2)) << (2 * pair)
    else:
        bit = tl.arange(0, 32)[None, :]
        x_ptrs = x_ptr + word * 32 + bit
        found = tl.zeros((ROWS, 32), tl.int1)
        for start in tl.static_range(0, BLOCK_M, ROWS):
            mask = (start + row < M) & (word * 32 + bit < K)
            x = tl.load(x_ptrs + (start + row) * K, mask=mask, other=0.0)
            found |= tl.abs(x.to(tl.float32)) >= threshold
        bits = found.to(tl.int32) << bit
    tl.store(mark_ptr + word, tl.reduce_or(bits.reshape(bits.numel), axis=0))


@triton.jit
def _load_regular(
    x_ptr, mark_ptr, start, K, words, threshold, OUTLIERS: tl.constexpr, MARK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One tile of a row in float32, 0 where |x| >= threshold; with MARK those places are written to mark_ptr."""
    column = start + tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    if OUTLIERS:
        found = tl.abs(x) >= threshold
        if MARK:
            word = start // 32 + tl.arange(0, BLOCK_K // 32)
            tl.store(mark_ptr + word, _outlier_words(found), mask=word < words)
        x = tl.where(found, 0.0, x)
    return x


@triton.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _quantize_tokens_kernel(
    x_ptr,  # [M, K]
    codes_ptr,  # [M, K] int8
    scale_ptr,  # [M] float32
    mark_ptr,  # see Tokens, where there are finders; else the marks of each row, [M, words] int32; or None
    arrived_ptr,  # see zero_arrivals
    M,
    K,
    words,
    threshold,
    tiles,
    FINDS: tl.constexpr,  # each program past the first M finds the outliers of 32 columns
    PAIRS: tl.constexpr,  # see _find_columns
    BLOCK_M: tl.constexpr,  # at least M, if it finds
    TILES: tl.constexpr,  # of a row: a loop that the compiler cannot leave out takes 30 to 60 registers
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    zero_arrivals(arrived_ptr, tiles)
    OUTLIERS: tl.constexpr = mark_ptr is not None
    MARK: tl.constexpr = OUTLIERS and not FINDS
    program = tl.program_id(0)
    if FINDS:  # noqa: SIM102, a branch of the compiler's
        if program >= M:
            _find_columns(x_ptr, mark_ptr, program - M, M, K, threshold, BLOCK_M, PAIRS)
            return
    row = program.to(tl.int64)
    x_ptr += row * K
    codes_ptr += row * K
    if MARK:
        mark_ptr += row * words
    column = tl.arange(0, BLOCK_K)
    x = _load_regular(x_ptr, mark_ptr, 0, K, words, threshold, OUTLIERS, MARK, BLOCK_K)  # kept: most rows are one tile
    largest = absmax_bits(x)
    for tile in range(1, TILES):
        more = _load_regular(x_ptr, mark_ptr, tile * BLOCK_K, K, words, threshold, OUTLIERS, MARK, BLOCK_K)
        largest = tl.maximum(largest, absmax_bits(more))
    scale = tl.max(largest, axis=0).to(tl.float32, bitcast=True)  # NaN stays NaN here and makes the row NaN
    inverse = int8_inverse(scale)
    tl.store(codes_ptr + column, encode_int8(x, inverse), mask=column < K)
    for tile in range(1, TILES):
        start = tile * BLOCK_K
        more = _load_regular(x_ptr, mark_ptr, start, K, words, threshold, OUTLIERS, False, BLOCK_K)
        tl.store(codes_ptr + start + column, encode_int8(more, inverse), mask=start + column < K)
    tl.store(scale_ptr + row, scale)


@triton.jit(do_not_specialize=["M"])
def _or_marks_kernel(
    mark_ptr,  # [M, words] int32
    out_ptr,  # [words] int32
    M,
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for WORDS words."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    words = tl.num_programs(0) * WORDS
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    marks = tl.zeros((BLOCK_M, WORDS), tl.int32)
    for start in range(0, M, LOADS * BLOCK_M):
        for load in tl.static_range(LOADS):  # in flight together
            row = start + load * BLOCK_M + tl.arange(0, BLOCK_M)
            row_ptr = mark_ptr + row.to(tl.int64)[:, None] * words
            marks |= tl.load(row_ptr + word[None, :], mask=(row < M)[:, None], other=0)
    tl.store(out_ptr + word, tl.reduce_or(marks, axis=0))


def quantize_tokens(x: Tensor, threshold: float, arrived: Tensor | None, pdl: bool) -> Tokens:
    """x [M, K] in int8, with the list of its outlier columns where the threshold is not 0. `arrived` is zeroed."""
    m, k = x.shape
    segments, finds = ceil_div(k, SEGMENT) if threshold > 0 else 0, threshold > 0 and m <= MAX_FIND_M
    words = segments * SEGMENT // 32
    block_k = min(16384, next_power_of_2(max(k, SEGMENT)))
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    marks = torch.empty(words, dtype=torch.int32, device=x.device) if words else None
    row_marks = torch.empty(m, words, dtype=torch.int32, device=x.device) if words and not finds else None
    launch(
        _quantize_tokens_kernel, (m + words if finds else m,),
        x, codes, scale, marks if row_marks is None else row_marks, arrived, m, k, words, threshold,
        0 if arrived is None else arrived.numel(),
        FINDS=finds, PAIRS=finds and x.element_size() == 2 and k % 2 == 0 and x.data_ptr() % 4 == 0,
        BLOCK_M=max(16, next_power_of_2(m)) if finds else 1, TILES=ceil_div(k, block_k), BLOCK_K=block_k, PDL=pdl,
        # enable_fp_fusion: see encode_int8.
        options={"num_warps": 16 if block_k > 8192 else 8, "enable_fp_fusion": False, "launch_pdl": pdl},
    )  # fmt: skip
    if row_marks is not None and marks is not None:
        launch(
            _or_marks_kernel, (segments,),
            row_marks, marks, m,
            WORDS=SEGMENT // 32, BLOCK_M=128, LOADS=16, PDL=pdl,
            # maxnreg: a cap that none reaches. Without one the compiler keeps to 32 registers and few loads in flight.
            options={"num_warps": 4, "maxnreg": 128, "launch_pdl": pdl},
        )  # fmt: skip
    return Tokens(codes=codes, scale=scale, marks=marks)
