"""Quantize to 4-bit codes: one pass over the weight, each block's absmax and codes from the same registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.launch import launch
from bigq_kernels.tiles import FLOAT32_TINY, absmax_bits, bin_table, ceil_div, encode_4bit, nan_to_inf, next_power_of_2

__all__ = ["quantize_4bit"]

TILE = 1024  # elements a warp, and one warp a program: 8192 x 8192 takes 60 us, 74 in tiles of 4096 for 4 warps


@triton.jit
def _quantize_4bit_kernel(
    weight_ptr,  # [N, K]
    packed_ptr,  # [N, ceil(K / 2)] uint8
    absmax_ptr,  # [N, B] float32
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

    mask = in_row[:, None] & (column < K)
    x = tl.load(weight_ptr + row[:, None] * stride_wn + column, mask=mask, other=0.0).to(tl.float32)
    absmax = nan_to_inf(tl.max(absmax_bits(x), axis=1))
    # The smallest normal float keeps 1 / absmax finite: a block of zeros encodes 0.0. `/` would not round correctly.
    inverse = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), tl.maximum(absmax, FLOAT32_TINY))
    boundary, below = bin_table(QUANT_TYPE)
    codes = encode_4bit(x * inverse[:, None], boundary, below, QUANT_TYPE)
    high, low = tl.split(codes.reshape(ROWS * BLOCKS, HALF, 2))

    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = ((high << 4) | low).to(tl.uint8)
    tl.store(packed_ptr + row[:, None] * row_bytes + byte, packed, mask=in_row[:, None] & (byte < row_bytes))
    tl.store(absmax_ptr + row * B + block, absmax, mask=in_row & (block < B))


def tile_shape(blocks: int, block_size: int) -> tuple[int, int, int]:
    """(blocks of a row, rows, warps) of a tile of TILE elements, or of one larger block; powers of two."""
    width = min(next_power_of_2(blocks), max(1, TILE // block_size))
    return width, max(1, TILE // (block_size * width)), max(1, block_size // TILE)


def quantize_4bit(weight: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Float [N, K] -> packed uint8 [N, ceil(K/2)] and absmax float32 [N, B]."""
    rows, columns = weight.shape
    blocks = ceil_div(columns, block_size)
    packed = torch.empty(rows, ceil_div(columns, 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows, blocks, dtype=torch.float32, device=weight.device)
    if weight.numel() == 0:
        return packed, absmax
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    tile_blocks, tile_rows, warps = tile_shape(blocks, block_size)
    grid = (ceil_div(rows, tile_rows) * ceil_div(blocks, tile_blocks),)
    with torch.cuda.device_of(weight):
        launch(
            _quantize_4bit_kernel,
            grid,
            weight,
            packed,
            absmax,
            rows,
            columns,
            packed.shape[1],
            blocks,
            weight.stride(0),
            options={"num_warps": warps},
            QUANT_TYPE=quant_type,
            BLOCK_SIZE=block_size,
            BLOCKS=tile_blocks,
            ROWS=tile_rows,
        )
    return packed, absmax
