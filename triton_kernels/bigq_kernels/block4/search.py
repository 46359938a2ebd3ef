"""Search the scales of 4-bit blocks that lose least where a weight's inputs are large, and encode with given scales.

A program has a tile of whole blocks in registers and tries nine scales on it, five with FP4. A scale takes 40
instructions an element (compiled for Hopper). So the search takes many times as long as reading the weight from GPU
memory would. It was written to take less than the link to the host takes to bring the weight: 2.7 ns for 64 elements
at 47 GB/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.block4.quantize import tile_shape
from bigq_kernels.checks import check_encode_scaled_4bit, check_search_scales_4bit
from bigq_kernels.launch import launch
from bigq_kernels.tiles import (
    FLOAT32_TINY,
    INF_BITS,
    absmax_bits,
    bin_table,
    ceil_div,
    code_table,
    encode_4bit,
    lookup,
    nan_to_inf,
)

__all__ = ["encode_scaled_4bit", "search_scales_4bit"]


@triton.jit
def _tree_sum(x, SIZE: tl.constexpr):
    """Sum each row of x [R, SIZE]: neighbours, then neighbouring sums. `tl.sum` has another order in each layout."""
    if SIZE == 1:
        return x.reshape(x.shape[0])
    else:
        even, odd = tl.split(x.reshape(x.shape[0], SIZE // 2, 2))
        return _tree_sum(even + odd, SIZE // 2)


@triton.jit
def _inverse_factor(attempt):
    """1 / (9/12, 10/12, 11/12, 1), then the same times -1, by the number of an attempt."""
    place = attempt % 4
    inverse = tl.where(place == 0, 12 / 9, tl.where(place == 1, 12 / 10, tl.where(place == 2, 12 / 11, 1.0)))
    return tl.where(attempt < 4, inverse, -inverse)


@triton.jit
def _search_scales_4bit_kernel(
    weight_ptr,  # [N, K]
    importance_ptr,  # [K] float32
    scales_ptr,  # [N, B] float32
    N,
    K,
    B,
    stride_wn,
    largest,  # of weight's dtype
    QUANT_TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of one row in a tile
    ROWS: tl.constexpr,
):
    column_tiles = tl.cdiv(B, BLOCKS)
    tile = tl.program_id(0)
    index = tl.arange(0, ROWS * BLOCKS)
    row = (tile // column_tiles).to(tl.int64) * ROWS + index // BLOCKS
    block = (tile % column_tiles) * BLOCKS + index % BLOCKS
    column = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    in_row = row < N
    in_columns = column < K

    x = tl.load(weight_ptr + row[:, None] * stride_wn + column, mask=in_row[:, None] & in_columns, other=0.0)
    x = x.to(tl.float32)
    u = tl.load(importance_ptr + column, mask=in_columns, other=0.0)
    absmax = nan_to_inf(tl.max(absmax_bits(x), axis=1))
    one = tl.full(absmax.shape, 1.0, tl.float32)
    inverse = tl.div_rn(one, tl.maximum(absmax, FLOAT32_TINY))
    is_finite = absmax.to(tl.int32, bitcast=True) < INF_BITS
    x = tl.where(is_finite[:, None], x * inverse[:, None], 0.0)

    boundary, below = bin_table(QUANT_TYPE)
    table = code_table(QUANT_TYPE)
    best, scale = tl.full(absmax.shape, -1.0, tl.float32), one
    GIVEN: tl.constexpr = 8 if QUANT_TYPE == "nf4" else 4  # FP4 is symmetric
    for attempt in range(GIVEN + 1):  # no static_range: nine copies take a minute to compile for blocks of 4096
        inverse = tl.where(attempt < GIVEN, _inverse_factor(attempt), tl.div_rn(one, scale))
        # The bins of encode_4bit wrap around beyond 1.
        scaled = tl.minimum(tl.maximum(x * inverse[:, None], -1.0), 1.0)
        code = lookup(table, encode_4bit(scaled, boundary, below, QUANT_TYPE))
        weighted = u * code
        p, q = _tree_sum(weighted * x, BLOCK_SIZE), _tree_sum(weighted * code, BLOCK_SIZE)
        q_or_one = tl.where(q > 0.0, q, 1.0)
        score = tl.div_rn(p * p, q_or_one)
        better = (q > 0.0) & (score > best)  # a tie keeps the earlier one
        best, scale = tl.where(better, score, best), tl.where(better, tl.div_rn(p, q_or_one), scale)

    found = tl.minimum(tl.maximum(scale * absmax, -largest), largest)
    found = tl.where((absmax < FLOAT32_TINY) | (is_finite == 0), absmax, found)
    tl.store(scales_ptr + row * B + block, found, mask=in_row & (block < B))


def search_scales_4bit(weight: Tensor, importance: Tensor, quant_type: str, block_size: int) -> Tensor:
    """Float [N, K] and importance float32 [K] -> scales float32 [N, B], negative ones among those of "nf4"."""
    check_search_scales_4bit(weight, importance)
    rows, columns = weight.shape
    blocks = ceil_div(columns, block_size)
    scales = torch.empty(rows, blocks, dtype=torch.float32, device=weight.device)
    if weight.numel() == 0:
        return scales
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    tile_blocks, tile_rows, warps = tile_shape(blocks, block_size)
    grid = (ceil_div(rows, tile_rows) * ceil_div(blocks, tile_blocks),)
    with torch.cuda.device_of(weight):
        launch(
            _search_scales_4bit_kernel,
            grid,
            weight,
            importance.contiguous(),
            scales,
            rows,
            columns,
            blocks,
            weight.stride(0),
            torch.finfo(weight.dtype).max,
            options={"num_warps": warps, "enable_fp_fusion": False},  # every product is rounded, as on the CPU
            QUANT_TYPE=quant_type,
            BLOCK_SIZE=block_size,
            BLOCKS=tile_blocks,
            ROWS=tile_rows,
        )
    return scales


@triton.jit
def _encode_scaled_4bit_kernel(
    weight_ptr,  # [N, K]
    scales_ptr,  # [N, B] float32
    packed_ptr,  # [N, ceil(K / 2)] uint8
    N,
    K,
    row_bytes,  # ceil(K / 2); an argument, so that the compiler sees it is divisible by 16 when it is
    B,
    stride_wn,
    QUANT_TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of one row in a tile
    ROWS: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_SIZE // 2
    column_tiles = tl.cdiv(B, BLOCKS)
    tile = tl.program_id(0)
    index = tl.arange(0, ROWS * BLOCKS)
    row = (tile // column_tiles).to(tl.int64) * ROWS + index // BLOCKS
    block = (tile % column_tiles) * BLOCKS + index % BLOCKS
    column = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    in_row = row < N

    x = tl.load(weight_ptr + row[:, None] * stride_wn + column, mask=in_row[:, None] & (column < K), other=0.0)
    scale = tl.load(scales_ptr + row * B + block, mask=in_row & (block < B), other=1.0)
    bits = absmax_bits(scale)
    magnitude = tl.maximum(bits.to(tl.float32, bitcast=True), FLOAT32_TINY)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), magnitude)
    inverse = tl.where(scale.to(tl.int32, bitcast=True) < 0, -inverse, inverse)  # also of -0.0
    scaled = tl.minimum(tl.maximum(x.to(tl.float32) * inverse[:, None], -1.0), 1.0)
    scaled = tl.where((bits < INF_BITS)[:, None], scaled, 0.0)
    boundary, below = bin_table(QUANT_TYPE)
    codes = encode_4bit(scaled, boundary, below, QUANT_TYPE)
    high, low = tl.split(codes.reshape(ROWS * BLOCKS, HALF, 2))

    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = ((high << 4) | low).to(tl.uint8)
    tl.store(packed_ptr + row[:, None] * row_bytes + byte, packed, mask=in_row[:, None] & (byte < row_bytes))


def encode_scaled_4bit(weight: Tensor, scales: Tensor, quant_type: str, block_size: int) -> Tensor:
    """Float [N, K] and its scales [N, B], float32 of either sign -> packed uint8 [N, ceil(K/2)]."""
    check_encode_scaled_4bit(weight, scales, block_size)
    rows, columns = weight.shape
    blocks = ceil_div(columns, block_size)
    packed = torch.empty(rows, ceil_div(columns, 2), dtype=torch.uint8, device=weight.device)
    if weight.numel() == 0:
        return packed
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    tile_blocks, tile_rows, warps = tile_shape(blocks, block_size)
    grid = (ceil_div(rows, tile_rows) * ceil_div(blocks, tile_blocks),)
    with torch.cuda.device_of(weight):
        launch(
            _encode_scaled_4bit_kernel,
            grid,
            weight,
            scales.contiguous(),
            packed,
            rows,
            columns,
            packed.shape[1],
            blocks,
            weight.stride(0),
            options={"num_warps": warps, "enable_fp_fusion": False},
            QUANT_TYPE=quant_type,
            BLOCK_SIZE=block_size,
            BLOCKS=tile_blocks,
            ROWS=tile_rows,
        )
    return packed
