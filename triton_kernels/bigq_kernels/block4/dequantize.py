"""Dequantize 4-bit codes: code times absmax in float32, rounded once to the output's dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.block4.absmax import load_absmax
from bigq_kernels.block4.packed import Nested
from bigq_kernels.block4.quantize import tile_shape
from bigq_kernels.checks import as_floats, check_dequantize_4bit
from bigq_kernels.gpu import Gpu
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div, code_table, lookup

__all__ = ["dequantize_4bit"]


@triton.jit
def _dequantize_4bit_kernel(
    packed_ptr,  # [N, ceil(K / 2)] uint8
    absmax_ptr,  # [N, B] float32, or uint8 if nested
    nested_ptr,  # see load_absmax
    offset_ptr,
    code_ptr,
    out_ptr,  # [N, K]
    N,
    K,
    row_bytes,  # ceil(K / 2); an argument, so that the compiler sees it is divisible by 16 when it is
    B,
    QUANT_TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of one row in a tile
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    HALF: tl.constexpr = BLOCK_SIZE // 2
    column_tiles = tl.cdiv(B, BLOCKS)
    tile = tl.program_id(0)
    index = tl.arange(0, ROWS * BLOCKS)
    first_row = (tile // column_tiles).to(tl.int64) * ROWS
    row = first_row + index // BLOCKS
    block = (tile % column_tiles) * BLOCKS + index % BLOCKS
    in_row = row < N

    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    mask = in_row[:, None] & (byte < row_bytes)
    packed = tl.load(packed_ptr + row[:, None] * row_bytes + byte, mask=mask, other=0)
    place = tl.minimum(index // BLOCKS, (N - 1 - first_row).to(tl.int32)) * B + tl.minimum(block, B - 1)
    absmax = load_absmax(absmax_ptr, first_row * B, place, nested_ptr, offset_ptr, code_ptr)
    table = code_table(QUANT_TYPE)
    high = lookup(table, packed >> 4) * absmax[:, None]
    low = lookup(table, packed & 15) * absmax[:, None]
    values = tl.join(high, low).reshape(ROWS * BLOCKS, BLOCK_SIZE)

    column = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    mask = in_row[:, None] & (column < K)
    tl.store(out_ptr + row[:, None] * K + column, values.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_4bit(
    weight: Tensor,
    absmax: Tensor,
    quant_type: str,
    block_size: int,
    in_features: int | None,
    dtype: torch.dtype,
    nested: Nested = (None, None, None),
) -> Tensor:
    """Packed uint8 [N, ceil(K/2)] and absmax [N, B], float32 or its bits as int32 -> [N, K] of `dtype`.

    in_features: K. None: K is even.
    nested: absmax, offset and code of an absmax that is uint8.
    """
    in_features = 2 * weight.shape[1] if in_features is None else in_features
    check_dequantize_4bit(weight, absmax, nested[0], nested[1], block_size, in_features)
    if nested[0] is None:
        absmax = as_floats(absmax)
    else:
        nested = (as_floats(nested[0]), as_floats(nested[1]), nested[2])
    rows = weight.shape[0]
    out = torch.empty(rows, in_features, dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    blocks = ceil_div(in_features, block_size)
    tile_blocks, tile_rows, warps = tile_shape(blocks, block_size)
    pdl = Gpu.of(weight.device).pdl
    grid = (ceil_div(rows, tile_rows) * ceil_div(blocks, tile_blocks),)
    with torch.cuda.device_of(weight):
        launch(
            _dequantize_4bit_kernel,
            grid,
            weight.contiguous(),
            absmax.contiguous(),
            *nested,
            out,
            rows,
            in_features,
            weight.shape[1],
            blocks,
            QUANT_TYPE=quant_type,
            BLOCK_SIZE=block_size,
            BLOCKS=tile_blocks,
            ROWS=tile_rows,
            PDL=pdl,
            # A nested scale's product is rounded before the sum.
            options={"num_warps": warps, "enable_fp_fusion": False, "launch_pdl": pdl},
        )
    return out
