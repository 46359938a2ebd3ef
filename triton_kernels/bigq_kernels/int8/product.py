"""LLM.int8(): outlier columns of x in its own dtype, the rest in int8, both summed by one GEMM kernel.

The kernel multiplies by one weight, or by the weights of a stack, each row of x by its own.

- Which columns are outliers is known on the device only. The GEMM reads their list and their number there: no host
  synchronization, static shapes, capturable in a CUDA graph.
- On Hopper it starts while the tokens are being quantized, and has the first bytes of its weights brought to L2
  meanwhile.
- Where tiles are too few for the GPU, K is split over programs if that leaves each of them enough steps: 64 tokens of
  4096 x 14336 take 36 us split and 41 whole (H100). The partial sums are integers, so they are exact in any order.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.gpu import Gpu
from bigq_kernels.groups import group_tokens, most_tiles, place_in_group
from bigq_kernels.int8.choose import Int8Config
from bigq_kernels.int8.outliers import (
    BLOCK_OUTLIERS,
    dense_of,
    first_outlier,
    gather_block,
    gather_outliers,
    load_marks,
    outlier_columns,
    rest_of,
    words_of_group,
)
from bigq_kernels.int8.planes import quantize_planes
from bigq_kernels.int8.tokens import quantize_tokens
from bigq_kernels.launch import launch
from bigq_kernels.split_k import add_splits, split_workspace, store_split
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = ["multiply_int8"]

CAPACITY = 128  # outlier columns that are gathered before the product, if any; it gathers any further ones itself
MAX_FEW_M = 512  # with more tokens a launch gathers any outlier columns, and the product starts before it
FEW = 4  # outlier columns that each tile gathers for itself where a launch would gather more
LOOK_STEP = tl.constexpr(4)  # of a tile's loop, by which its first loads are on their way
PREFETCH_BYTES = tl.constexpr(512)
PREFETCH_ASM = tl.constexpr(f"cp.async.bulk.prefetch.L2.global [$1], {PREFETCH_BYTES.value}; mov.b32 $0, 0;")


@triton.jit
def _prefetch(ptrs):
    """Ask for the PREFETCH_BYTES behind each pointer, which divides by 16, to be brought to L2."""
    tl.inline_asm_elementwise(PREFETCH_ASM, "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["M", "E", "repeat", "split"])  # a new number of tokens compiles nothing
def _linear_int8_kernel(
    codes_ptr,  # [M, K] int8: x; with PLANES [3, M, K]
    scale_ptr,  # [M] float32; with PLANES [3, M]
    weight_ptr,  # [N, K] int8; of a stack [E, N, K], and so below
    absmax_ptr,  # [N, 1] float32
    bias_ptr,  # [N] or None
    x_ptr,  # [M, K]
    mark_ptr,  # see Tokens
    rest_ptr,  # see _gather_outliers_kernel; None where each program gathers for itself
    dense_ptr,
    total_ptr,
    partial_ptr,  # [split, tiles, BLOCK_M, BLOCK_N] int32; None without a split
    arrived_ptr,  # [tiles] int32, zero: how many programs have finished the tile
    out_ptr,  # [M, N]; with ids [S, N]
    groups_ptr,  # of `group_tokens` for a stack of weights and rows that are sorted by weight, or None
    ids_ptr,  # [S]: which weight of a stack multiplies row // repeat of x, in a tile of its own, or None
    M,
    N,
    K,
    E,  # weights of the stack
    repeat,
    words,
    split,
    k_per_split,
    threshold,
    MARKS: tl.constexpr,  # at least `words`
    WORDS: tl.constexpr,  # see outlier_columns
    CAPACITY: tl.constexpr,  # outlier columns that were gathered before
    FEW: tl.constexpr,  # each tile gathers in its loop: 16 of any number, or up to 4 where a launch gathers more, or 0
    PLANES: tl.constexpr,  # a tile is 4 groups of tokens: their codes, and the two planes of their outliers
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCHES: tl.constexpr,  # PREFETCH_BYTES of a weight row to bring to L2 before x is quantized
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUTLIERS: tl.constexpr,
    GROUP_M: tl.constexpr,  # tiles of M that share their tiles of N in L2
):
    tile, tiles_n = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    TOKENS: tl.constexpr = BLOCK_M // 4 if PLANES else BLOCK_M
    base = 0  # the first row of its weight in a stack
    if groups_ptr is not None:
        matrix, n_tile, _m_tile, first_m, rows = place_in_group(groups_ptr, tile, tiles_n, BLOCK_M)
        if rows <= 0:
            if PDL:
                tl.extra.cuda.gdc_wait()  # all programs may end here, and the next kernel waits for nothing else
            return
        first_x, read, base = first_m, rows, matrix * N
    elif ids_ptr is not None:
        n_tile, first_m, rows = tile % tiles_n, (tile // tiles_n).to(tl.int64), 1
        matrix = tl.load(ids_ptr + first_m).to(tl.int64)
        first_x, base = first_m // repeat, tl.minimum(tl.maximum(matrix, 0), E - 1) * N
        read = tl.where((matrix >= 0) & (matrix < E), 1, 0)  # a row of no weight is 0
    else:
        first_tile = tile // (GROUP_M * tiles_n) * GROUP_M
        group_m = min(tl.cdiv(M, BLOCK_M) - first_tile, GROUP_M)
        n_tile = tile % (GROUP_M * tiles_n) // group_m
        first_m = ((first_tile + tile % (GROUP_M * tiles_n) % group_m) * BLOCK_M).to(tl.int64)
        rows = (M - first_m).to(tl.int32)
        first_x, read = first_m, rows
    n = n_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token, row = tl.arange(0, TOKENS), tl.arange(0, BLOCK_M)
    # Rows past the end read the last row, or nothing in the loop: 16 copies of one token would load one cache line.
    in_tile = (row % TOKENS < read) & (row // TOKENS < (3 if PLANES else 1))
    x_token = first_x + tl.minimum(token, rows - 1)
    scale_row = first_x + tl.where(in_tile, row // TOKENS * M + row % TOKENS, 0) if PLANES else x_token
    x_row = scale_row[:, None] * K
    in_m = in_tile[:, None]
    in_n = (n < N) & (read > 0)
    n_row = base + tl.minimum(n, N - 1)
    weight_row = n_row[:, None] * K
    first_k = tl.program_id(1) * k_per_split
    if PREFETCHES > 0:
        first_byte = min(first_k, K - PREFETCHES * PREFETCH_BYTES)
        _prefetch(weight_ptr + weight_row + first_byte + tl.arange(0, PREFETCHES)[None, :] * PREFETCH_BYTES)
    absmax = tl.load(absmax_ptr + base + n, mask=in_n, other=0.0)
    if PDL and (FEW > 0 or rest_ptr is None):
        tl.extra.cuda.gdc_wait()
    scale = tl.load(scale_ptr + scale_row, mask=in_tile, other=0.0)

    k = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    last_k = min(first_k + k_per_split, K)
    if FEW > 0:
        marks = load_marks(mark_ptr, words, MARKS)  # here, for they are needed some steps later
        most = 0x7FFFFFFF if rest_ptr is None else FEW
        count = 0
        first_x_columns = tl.zeros((BLOCK_M, BLOCK_OUTLIERS), x_ptr.dtype.element_ty)
        first_weight = tl.zeros((BLOCK_N, BLOCK_OUTLIERS), tl.int8)
        look = first_k + min(LOOK_STEP, tl.cdiv(last_k - first_k, BLOCK_K) - 1) * BLOCK_K
    for start in range(first_k, last_k, BLOCK_K):
        if FEW > 0:  # noqa: SIM102, a branch of the compiler's
            if start == look:  # what the loop loads next is on its way meanwhile
                count, first = first_outlier(marks)
                if (count > 0) & (count <= most):
                    column = tl.full((BLOCK_OUTLIERS,), first, tl.int32)
                    if count > 1:
                        column = outlier_columns(mark_ptr, 0, words, WORDS, BLOCK_OUTLIERS)
                    first_x_columns, first_weight = gather_block(
                        x_ptr, weight_ptr, x_row, weight_row, in_m, column, count
                    )
        if EVEN_K:
            codes = tl.load(codes_ptr + x_row + start + k, mask=in_m, other=0)
            weight = tl.load(weight_ptr + weight_row + start + k)
        else:
            codes = tl.load(codes_ptr + x_row + start + k, mask=in_m & (start + k < K), other=0)
            weight = tl.load(weight_ptr + weight_row + start + k, mask=start + k < K, other=0)
        total = tl.dot(codes, weight.T, total, out_dtype=tl.int32)

    if PDL and FEW == 0 and rest_ptr is not None:
        # The launch before this one gathers, and let this one start when it had waited for the codes.
        tl.extra.cuda.gdc_wait()

    is_last = True
    if partial_ptr is not None:
        offset = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        partial_ptr += tile.to(tl.int64) * (BLOCK_M * BLOCK_N)
        stride = tl.num_programs(0).to(tl.int64) * (BLOCK_M * BLOCK_N)
        mine = partial_ptr + tl.program_id(1) * stride + offset
        is_last = store_split(total, mine, arrived_ptr + tile, True) == split - 1
    if is_last:
        if partial_ptr is not None:
            # Its own sum too is read again: kept beside the others it spills 264 bytes a thread of the 128 x 128 tile.
            total = add_splits(partial_ptr + offset, stride, split, True, tl.int32, UNROLL=False)
        out = total.to(tl.float32) * (scale[:, None] * absmax[None, :]) * (1.0 / (127.0 * 127.0))

        if PLANES:
            out = tl.sum(tl.reshape(out, (4, TOKENS, BLOCK_N)), axis=0)
        if mark_ptr is not None:
            begin = 0
            if FEW > 0:
                begin = BLOCK_OUTLIERS
                if (count > 0) & (count <= most):
                    rest = rest_of(first_x_columns, scale, threshold)
                    out = tl.dot(rest, dense_of(first_weight, absmax, rest.dtype).T, out, input_precision="ieee")
            if rest_ptr is not None:
                begin = CAPACITY
                if FEW == 0:
                    count = tl.load(total_ptr)
                number = tl.arange(0, BLOCK_OUTLIERS)[None, :]
                rest_ptrs = rest_ptr + x_token[:, None] * CAPACITY + number
                dense_ptrs = dense_ptr + n_row[:, None] * CAPACITY + number
                stop = tl.where(count <= FEW, 0, min(count, CAPACITY))
                for start in tl.range(0, stop, BLOCK_OUTLIERS, num_stages=1):
                    rest, dense = tl.load(rest_ptrs + start), tl.load(dense_ptrs + start)
                    out = tl.dot(rest, dense.T, out, input_precision="ieee")
            if count > begin:  # else what the loop computes once would be computed before it
                for start in tl.range(begin, count, BLOCK_OUTLIERS, num_stages=1):
                    column = outlier_columns(mark_ptr, start, words, WORDS, BLOCK_OUTLIERS)
                    x, weight = gather_block(x_ptr, weight_ptr, x_row, weight_row, in_m, column, count - start)
                    rest = rest_of(x, scale, threshold)
                    out = tl.dot(rest, dense_of(weight, absmax, rest.dtype).T, out, input_precision="ieee")

        if bias_ptr is not None:
            out += tl.load(bias_ptr + base + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        mask = (token < rows)[:, None] & (n < N)[None, :]
        out_ptrs = out_ptr + (first_m + token)[:, None] * N + n[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@cache
def _rounded(threshold: float, dtype: torch.dtype) -> float:
    """The threshold as torch compares it: rounded to the dtype of x.

    One that rounds to 0, which would mean no outliers, is the smallest number: only zeros are below.
    """
    rounded = torch.tensor(threshold, dtype=dtype, device="cpu").item()
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    return max(rounded, smallest) if threshold > 0 else 0.0


def multiply_int8(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out: Tensor,
    threshold: float,
    way: str,
    config: Int8Config,
    *,
    stops: Tensor | None = None,
    ids: Tensor | None = None,
) -> None:
    """out [M, N] = x [M, K] times int8 [N, K] transposed, plus bias [N], all contiguous and not empty.

    With `stops` or `ids`, weight is [E, N, K], absmax [E, N, 1] and bias [E, N]. With `stops` [E] weight e multiplies
    the rows of x up to stops[e]. With `ids` [S], out is [S, N]: row i is row i // (S / M) of x times the weight ids[i].
    Each of these rows is a tile of its own. A row that no weight multiplies is 0.
    """
    (m, k), n, e = x.shape, weight.shape[-2], len(weight)
    pdl = Gpu.of(x.device).pdl
    threshold = _rounded(threshold, x.dtype)
    groups = marks = rest = dense = total = partial = arrived = None
    tiles, repeat, few = config.tiles(m, n), 1, 0
    if stops is not None:
        tiles = most_tiles(m, e, config.block_m) * ceil_div(n, config.block_n)
        groups = group_tokens(stops, e, config.block_m, torch.empty(0, dtype=torch.int32, device=x.device), out)
    elif ids is not None:
        tiles, repeat = len(ids) * ceil_div(n, config.block_n), len(ids) // m
    if config.split > 1:
        tile_numel = config.block_m * config.block_n
        partial, arrived = split_workspace(tiles, config.split, tile_numel, x.device, torch.int32)
    if way == "planes":
        codes, scale = quantize_planes(x, threshold, arrived, pdl)
    else:
        tokens = quantize_tokens(x, threshold, arrived, pdl)
        codes, scale, marks = tokens.codes, tokens.scale, tokens.marks
        if marks is not None:
            few = BLOCK_OUTLIERS if way == "tiles" else FEW if m <= MAX_FEW_M else 0
        if way == "gather":
            matrix, scales = weight.view(-1, k), absmax.view(-1, 1)
            rest, dense, total = gather_outliers(x, tokens, matrix, scales, threshold, CAPACITY, few, pdl)
    words = 0 if marks is None else marks.numel()
    prefetch = pdl and k % 16 == 0 and k >= config.prefetches * PREFETCH_BYTES.value and weight.data_ptr() % 16 == 0
    launch(
        _linear_int8_kernel, (tiles, config.split),
        codes, scale, weight, absmax, bias, x, marks, rest, dense, total, partial, arrived, out,
        groups, ids, m, n, k, e, repeat, words, config.split, config.steps_per_split * config.block_k or k,
        threshold,
        MARKS=max(128, next_power_of_2(words)) if words else 1, WORDS=words_of_group(words), CAPACITY=CAPACITY,
        FEW=few, PLANES=way == "planes", EVEN_K=k % config.block_k == 0, PDL=pdl,
        PREFETCHES=config.prefetches if prefetch else 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_OUTLIERS=BLOCK_OUTLIERS, GROUP_M=8,
        # enable_fp_fusion: see rest_of.
        options={
            "num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False, "launch_pdl": pdl,
        },
    )  # fmt: skip
