"""A few dozen tokens times a 4-bit weight on the tensor cores, decoded in registers: a kernel behind `linear_4bit`.

- Swapped operands: the weight is the 64-row side of the MMA, the tokens its narrow side, so few tokens waste little.
- Codes are looked up with PRMT straight into the operand's registers, and absmax scales the float32 sum of a block.
- High nibbles are the even elements of K and low nibbles the odd ones: two products, so the tokens are split before.
- K is split over programs to fill the GPU. The last to finish a tile adds the partial sums in their order.
"""

import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.block4.absmax import load_absmax
from bigq_kernels.block4.configs import MmaConfig
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.tokens import split_tokens
from bigq_kernels.gpu import Gpu
from bigq_kernels.groups import group_tokens, most_tiles, place_in_group
from bigq_kernels.launch import launch
from bigq_kernels.split_k import add_splits, split_workspace, store_split
from bigq_kernels.tiles import ceil_div, decode_pair

__all__ = ["linear_4bit_mma"]


@triton.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _linear_4bit_mma_kernel(
    x_ptr,  # [M, 2, PAIRS]: the even, then the odd elements of a row
    weight_ptr,  # [N, PAIRS] uint8: element 2i in the high nibble
    absmax_ptr,  # [N, B] float32, or uint8 if nested
    bias_ptr,  # [N] or None
    nested_ptr,  # see load_absmax
    offset_ptr,
    code_ptr,
    partial_ptr,  # [tiles, SPLIT, BLOCK_M, BLOCK_N] float32
    count_ptr,  # [tiles] int32, zero: how many programs have finished the tile
    out_ptr,  # [M, N]
    groups_ptr,  # of `group_tokens` for a stack of weights, or None
    M,
    N,
    PAIRS,
    B,
    groups_per_split,
    QUANT_TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,  # K divides into whole steps: no masks in the loop
    USE_PRMT: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
):
    GROUP: tl.constexpr = min(BLOCK_SIZE, 64)  # elements of K in one dot; they share one absmax
    HALF: tl.constexpr = GROUP // 2
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)  # of all results; n_tile is that of the weight's rows
    split = tl.program_id(1)
    n_tile, first_weight_row = tile, tile * BLOCK_N
    if groups_ptr is not None:
        if PDL:
            tl.extra.cuda.gdc_wait()
        n_tiles = tl.cdiv(N, BLOCK_N)
        weight, n_tile, m_tile, first_m, M = place_in_group(groups_ptr, tl.program_id(0), n_tiles, BLOCK_M)
        if M <= 0:
            return
        tile = m_tile * n_tiles + n_tile
        first_weight_row = weight * N + n_tile * BLOCK_N
        x_ptr += first_m * (2 * PAIRS)
        out_ptr += first_m * N
        if bias_ptr is not None:
            bias_ptr += weight * N
    first_row = n_tile * BLOCK_N
    # Rows past N read the last row instead of taking a mask; their result is not stored.
    row = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_row).to(tl.int32))
    token = tl.arange(0, BLOCK_M)
    pair = tl.arange(0, HALF)[None, :]
    weight_ptrs = weight_ptr + first_weight_row * PAIRS + (row[:, None] * PAIRS + pair)
    x_ptrs = x_ptr + token[:, None] * (2 * PAIRS) + pair
    in_m = (token < M)[:, None]

    if PDL and groups_ptr is None:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first_group = split * groups_per_split
    for start in range(first_group, min(first_group + groups_per_split, tl.cdiv(PAIRS, HALF)), UNROLL):
        for step in tl.static_range(UNROLL):
            group = start + step
            in_x = in_m
            if EVEN_K:
                packed = tl.load(weight_ptrs + group * HALF, eviction_policy="evict_first")
            else:
                in_k = group * HALF + pair < PAIRS
                in_x = in_m & in_k
                packed = tl.load(weight_ptrs + group * HALF, mask=in_k, other=0, eviction_policy="evict_first")
            x_even = tl.load(x_ptrs + group * HALF, mask=in_x, other=0)
            x_odd = tl.load(x_ptrs + PAIRS + group * HALF, mask=in_x, other=0)
            block = row * B + min(group * GROUP // BLOCK_SIZE, B - 1)
            absmax = load_absmax(absmax_ptr, first_weight_row * B, block, nested_ptr, offset_ptr, code_ptr)
            high, low = decode_pair(packed, QUANT_TYPE, DTYPE, USE_PRMT)
            product = tl.dot(high, x_even.T)
            product = tl.dot(low, x_odd.T, product)
            total += product * absmax[:, None]  # after the dot: once a block, and the decoded codes stay exact

    in_m = (token < M)[None, :]  # transposed: the tokens are columns of the tile
    partial_ptrs = partial_ptr + tile * (SPLIT * BLOCK_M * BLOCK_N)
    partial_ptrs += token[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    last = 0
    if SPLIT > 1:
        last = store_split(total, partial_ptrs + split * (BLOCK_M * BLOCK_N), count_ptr + tile, in_m)
    if last == SPLIT - 1:
        if SPLIT > 1:
            total = add_splits(partial_ptrs, BLOCK_M * BLOCK_N, SPLIT, in_m, tl.float32, UNROLL=True)
        n = first_row + tl.arange(0, BLOCK_N)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + token.to(tl.int64)[None, :] * N + n[:, None], total.to(DTYPE), mask=in_m & (n < N)[:, None])


def linear_4bit_mma(
    x: Tensor, packed: Packed4, bias: Tensor | None, out: Tensor, config: MmaConfig, stops: Tensor | None = None
) -> None:
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous; K % 32 == 0, M <= 128.

    With `stops`, packed is [E, N, K/2] and bias [E, N], and each weight multiplies its rows, any number, of x.
    """
    m, k = x.shape
    n, pairs = packed.weight.shape[-2:]
    group = min(packed.block_size, 64)
    groups = ceil_div(k, group)
    split = config.split
    groups_per_split = ceil_div(ceil_div(groups, split), config.unroll) * config.unroll
    tiles = ceil_div(n, config.block_n)
    if stops is not None:
        tiles *= most_tiles(m, len(packed.weight), config.block_m)
    gpu = Gpu.of(x.device)
    partial, count = split_workspace(tiles, split, config.block_m * config.block_n, x.device)
    token_groups = None
    if stops is not None:
        token_groups = group_tokens(stops, len(packed.weight), config.block_m, count, out)
    launch(
        _linear_4bit_mma_kernel, (tiles, split),
        split_tokens(x, count), packed.weight, packed.absmax, bias, *packed.nested, partial, count, out, token_groups,
        m, n, pairs, packed.absmax.shape[-1], groups_per_split,
        QUANT_TYPE=packed.quant_type, BLOCK_SIZE=packed.block_size,
        EVEN_K=k % (group * groups_per_split) == 0 and groups % split == 0, USE_PRMT=gpu.ptx, PDL=gpu.pdl,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split, UNROLL=config.unroll,
        options={"num_warps": config.warps, "num_stages": config.stages, "launch_pdl": gpu.pdl},
    )  # fmt: skip
