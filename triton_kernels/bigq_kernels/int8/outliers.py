"""Outlier columns for LLM.int8(), gathered from x and from the weight by the list that `tokens.py` makes.

What the codes leave of x is computed from x and the scale, as the codes were: so codes are not gathered.

Most linears have no outlier column, or one. So a tile has the whole list in its registers before its loop, and one sum
and one minimum say how many there are and which is the first. Only for more does it search: that takes three times as
many instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.int8.tokens import Tokens
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div, encode_int8, int8_inverse, next_power_of_2

__all__ = [
    "BLOCK_OUTLIERS",
    "dense_of",
    "first_outlier",
    "gather_block",
    "gather_outliers",
    "load_marks",
    "outlier_columns",
    "rest_of",
    "words_of_group",
]

BLOCK_OUTLIERS = 16  # the least that a tensor core takes


def words_of_group(words: int) -> int:
    """How many words of marks one of BLOCK_OUTLIERS groups takes, see outlier_columns."""
    return max(32, next_power_of_2(ceil_div(words, BLOCK_OUTLIERS)))


@triton.jit
def _bit_count(words):
    """How many bits of each int32 are set."""
    words = words.to(tl.uint32, bitcast=True)
    words -= (words >> 1) & 0x55555555
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def load_marks(mark_ptr, words, MARKS: tl.constexpr):
    """All words of marks, padded to MARKS with 0."""
    word = tl.arange(0, MARKS)
    return tl.load(mark_ptr + word, mask=word < words, other=0)


@triton.jit
def _add_and_least(count, first, other_count, other_first):
    return count + other_count, tl.minimum(first, other_first)


@triton.jit
def first_outlier(marks):
    """(how many outlier columns there are in all, the first; if there is none, any number)."""
    column = tl.arange(0, marks.shape[0]) * 32 + _bit_count(~marks & (marks - 1))
    column = tl.where(marks == 0, 0x7FFFFFFF, column)
    return tl.reduce((_bit_count(marks), column), 0, _add_and_least)


@triton.jit
def outlier_columns(mark_ptr, start, words, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Outlier columns number start to start + BLOCK, past the last one 0.

    BLOCK groups of WORDS words are counted, then each row of [BLOCK, WORDS] looks for its column in one group. So all
    sums but one stay within a warp.
    """
    number = start + tl.arange(0, BLOCK)
    word = tl.arange(0, BLOCK)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    counts = tl.sum(_bit_count(tl.load(mark_ptr + word, mask=word < words, other=0)), axis=1)
    stop = tl.cumsum(counts, axis=0)  # of a group: the number of the first outlier column after it
    count = tl.sum(counts, axis=0)
    is_mine = ((stop - counts)[None, :] <= number[:, None]) & (number[:, None] < stop[None, :])  # of one at most
    group = tl.sum(tl.where(is_mine, tl.arange(0, BLOCK)[None, :], 0), axis=1)
    number -= tl.sum(tl.where(is_mine, (stop - counts)[None, :], 0), axis=1)

    word = group[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    marks = tl.load(mark_ptr + word, mask=word < words, other=0)
    counts = _bit_count(marks)
    stop = tl.cumsum(counts, axis=1)
    is_mine = ((stop - counts) <= number[:, None]) & (number[:, None] < stop)
    mark = tl.sum(tl.where(is_mine, marks, 0), axis=1)
    number -= tl.sum(tl.where(is_mine, stop - counts, 0), axis=1)
    column = tl.sum(tl.where(is_mine, word, 0), axis=1) * 32

    bit = tl.arange(0, 32)[None, :]
    is_set = (mark[:, None] >> bit) & 1
    is_mine = (is_set != 0) & (tl.cumsum(is_set, axis=1) == number[:, None] + 1)
    column += tl.sum(tl.where(is_mine, bit, 0), axis=1)
    return tl.where(start + tl.arange(0, BLOCK) < count, column, 0)


@triton.jit
def rest_of(x, scale, threshold):
    """What the codes leave of x [BLOCK_M, ...], in its dtype; launch with enable_fp_fusion=False: see encode_int8.

    An outlier has code 0 and comes back as it is.
    """
    wide = x.to(tl.float32)
    regular = tl.where(tl.abs(wide) >= threshold, 0.0, wide)
    codes = encode_int8(regular, int8_inverse(scale)[:, None])
    return (wide - codes.to(tl.float32) * (scale * (1.0 / 127.0))[:, None]).to(x.dtype)


@triton.jit
def dense_of(weight, absmax, DTYPE: tl.constexpr):
    """The dequantized weight, as `dequantize_int8` has it."""
    return (weight.to(tl.float32) * absmax[:, None] * (1.0 / 127.0)).to(DTYPE)


@triton.jit
def gather_block(
    x_ptr,
    weight_ptr,
    x_row,  # [BLOCK_M, 1]: where a row starts, and so below
    weight_row,
    in_m,
    column,  # see outlier_columns
    rest,  # how many outlier columns are left, of which the first are `column`
):
    """(x, int8 weight) of these columns, 0 past the last."""
    in_list = (tl.arange(0, column.shape[0]) < rest)[None, :]
    x = tl.load(x_ptr + x_row + column[None, :], mask=in_m & in_list, other=0.0)
    return x, tl.load(weight_ptr + weight_row + column[None, :], mask=in_list, other=0)


@triton.jit(do_not_specialize=["M"])
def _gather_outliers_kernel(
    x_ptr,  # [M, K]
    scale_ptr,  # [M] float32
    weight_ptr,  # [N, K] int8
    absmax_ptr,  # [N, 1] float32
    mark_ptr,  # see Tokens
    rest_ptr,  # [M, CAPACITY]: the rest of the first outlier columns, zero-padded to whole BLOCKs
    dense_ptr,  # [N, CAPACITY]: the weight's
    total_ptr,  # [1] int32: how many outlier columns there are
    M,
    N,
    K,
    words,
    threshold,
    WORDS: tl.constexpr,
    CAPACITY: tl.constexpr,
    FEW: tl.constexpr,  # as many outlier columns the tiles gather for themselves
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        if FEW > 0:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        else:
            # The product that follows starts when x is quantized. It waits for this launch after its loop.
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_ROWS)
    count, _ = first_outlier(load_marks(mark_ptr, words, WORDS * BLOCK))
    if program == 0:
        tl.store(total_ptr, count)
    if count <= FEW:
        return
    number = tl.arange(0, BLOCK)
    for start in range(0, min(count, CAPACITY), BLOCK):
        column = outlier_columns(mark_ptr, start, words, WORDS, BLOCK)
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
            x = tl.load(x_ptr + row[:, None] * K + column[None, :], mask=in_m & in_list, other=0.0)
            scale = tl.load(scale_ptr + row, mask=row < M, other=0.0)
            rest = rest_of(x, scale, threshold)
            tl.store(rest_ptr + row[:, None] * CAPACITY + (start + number)[None, :], rest, mask=in_m)


def gather_outliers(
    x: Tensor, tokens: Tokens, weight: Tensor, absmax: Tensor, threshold: float, capacity: int, few: int, pdl: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(rest [M, capacity], dequantized weight [N, capacity], count [1]) of the first `capacity` outlier columns.

    Those are set up to the count, padded with zeros to whole blocks of BLOCK_OUTLIERS columns. None is set if there are
    no more than `few`.
    """
    assert tokens.marks is not None
    (m, k), n, words = x.shape, weight.shape[0], tokens.marks.numel()
    rest = torch.empty(m, capacity, dtype=x.dtype, device=x.device)
    dense = torch.empty(n, capacity, dtype=x.dtype, device=x.device)
    total = torch.empty(1, dtype=torch.int32, device=x.device)
    rows = 64
    launch(
        _gather_outliers_kernel, (ceil_div(n, rows) + ceil_div(m, rows),),
        x, tokens.scale, weight, absmax, tokens.marks, rest, dense, total, m, n, k, words, threshold,
        WORDS=words_of_group(words), CAPACITY=capacity, FEW=few, BLOCK_ROWS=rows, BLOCK=BLOCK_OUTLIERS, PDL=pdl,
        options={"num_warps": 4, "enable_fp_fusion": False, "launch_pdl": pdl},
    )  # fmt: skip
    return rest, dense, total
