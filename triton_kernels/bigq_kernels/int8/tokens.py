"""Tokens for LLM.int8(): int8 codes with one scale a row, and the list of their outlier columns, in static shapes.

- One launch, a program a row, reads x once. An element beyond the threshold gets code 0 and sets a bit. So no row is
  read for another. A second launch ORs the bits of all rows and lists the columns.
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

SEGMENT = 128  # columns whose outliers one program lists: 16 bytes of bits a token


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


@triton.jit
def _quantize_tokens_kernel(
    x_ptr,  # [M, K]
    codes_ptr,  # [M, K] int8
    scale_ptr,  # [M] float32
    mark_ptr,  # [M, words] int32, or None: a bit a column, set where the token has an outlier
    arrived_ptr,  # see zero_arrivals
    K,
    words,
    threshold,
    tiles,
    TILES: tl.constexpr,  # of a row: a loop that the compiler cannot leave out takes 30 to 60 registers
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    zero_arrivals(arrived_ptr, tiles)
    OUTLIERS: tl.constexpr = mark_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * K
    codes_ptr += row * K
    if OUTLIERS:
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


@triton.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _list_outliers_kernel(
    mark_ptr,  # see _quantize_tokens_kernel
    count_ptr,  # [segments] int32: how many outlier columns lie in a segment of K
    column_ptr,  # [segments, SEGMENT] int32: those columns, ascending; what follows them is not set
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
    column = segment * SEGMENT + tl.arange(0, SEGMENT)
    tl.store(column_ptr + segment * SEGMENT + tl.cumsum(found, axis=0) - found, column, mask=found != 0)
    tl.store(count_ptr + segment, tl.sum(found, axis=0))


def quantize_tokens(
    x: Tensor, threshold: float, arrived: Tensor | None, pdl: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes int8 [M, K] and scale [M] of x [M, K]; the counts and columns of its outliers, None for threshold 0.

    `arrived` is zeroed.
    """
    m, k = x.shape
    segments = ceil_div(k, SEGMENT) if threshold > 0 else 0
    words = segments * SEGMENT // 32
    block_k = min(16384, next_power_of_2(max(k, SEGMENT)))
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    marks = torch.empty(m, words, dtype=torch.int32, device=x.device) if words else None
    launch(
        _quantize_tokens_kernel, (m,),
        x, codes, scale, marks, arrived, k, words, threshold, 0 if arrived is None else arrived.numel(),
        TILES=ceil_div(k, block_k), BLOCK_K=block_k, PDL=pdl,
        # enable_fp_fusion: see encode_int8.
        options={"num_warps": 16 if block_k > 8192 else 8, "enable_fp_fusion": False, "launch_pdl": pdl},
    )  # fmt: skip
    if marks is None:
        return codes, scale, None, None
    counts = torch.empty(segments, dtype=torch.int32, device=x.device)
    columns = torch.empty(segments, SEGMENT, dtype=torch.int32, device=x.device)
    launch(
        _list_outliers_kernel, (segments,),
        marks, counts, columns, m,
        SEGMENT=SEGMENT, BLOCK_M=128, LOADS=16, PDL=pdl,
        # maxnreg: a cap that none reaches. Without one the compiler keeps to 32 registers and a few loads in flight.
        options={"num_warps": 4, "maxnreg": 128, "launch_pdl": pdl},
    )  # fmt: skip
    return codes, scale, counts, columns
