"""Kernels that run ahead of a 4-bit product: they reorder its tokens and zero its counts of finished tiles.

On Hopper each may start before the kernel ahead of it has ended, and the product before this one has.

- `split_tokens`, for mma: even elements of K, which are high nibbles, and odd ones are stored apart.
- `tile_tokens`, for wgmma and bulk: the tiles and the order of K in which the product copies tokens to shared memory.
  A lane of four holds 8 consecutive bytes of a row of codes, 16 elements of 64, which are one read of shared memory.
  wgmma gives that lane other columns of its operand: 2c, 2c + 1, 2c + 8 and 2c + 9 of each 16. Any order of K is right
  if weights and tokens agree. Hardware reads the tokens, so the tokens are moved: pair 8s + 4h + c of the 32 pairs of a
  slice is pair 8c + 2s + h of x. A tile of a slice is contiguous, because a program copies it in one piece.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.gpu import Gpu
from bigq_kernels.groups import place_in_group
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div

__all__ = ["split_tokens", "tile_tokens"]

_PAIRS = 1024  # of a row, a program


@triton.jit
def _split_pairs_kernel(
    x_ptr,  # [M, PAIRS] int32: two elements each
    even_odd_ptr,  # [M, 2, PAIRS] int16
    count_ptr,  # [tiles] int32: zeroed, for the kernel that follows
    numel,
    PAIRS,
    tiles,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    x = tl.load(x_ptr + index, mask=mask, other=0)
    out = even_odd_ptr + index + index // PAIRS * PAIRS
    tl.store(out, x.to(tl.int16), mask=mask)
    tl.store(out + PAIRS, (x >> 16).to(tl.int16), mask=mask)
    tl.store(count_ptr + index, tl.zeros((BLOCK,), tl.int32), mask=index < tiles)


def split_tokens(x: Tensor, count: Tensor) -> Tensor:
    """The even, then the odd elements of each row of x [M, K] of 16 bits, as [M, 2, K / 2]; zeroes count.

    x contiguous. A kernel launched after it with `launch_pdl` may start meanwhile.
    """
    m, pairs, block = x.shape[0], x.shape[1] // 2, 512
    pdl = Gpu.of(x.device).pdl
    even_odd = torch.empty(m, 2, pairs, dtype=x.dtype, device=x.device)
    launch(
        _split_pairs_kernel,
        (ceil_div(max(m * pairs, count.numel()), block),),
        x.view(torch.int32),
        even_odd.view(torch.int16),
        count,
        m * pairs,
        pairs,
        count.numel(),
        BLOCK=block,
        PDL=pdl,
        options={"launch_pdl": pdl},
    )
    return even_odd


@triton.jit(do_not_specialize=["M", "counts"])
def _tile_tokens_kernel(
    x_ptr,  # [M, PAIRS] int32: two elements
    out_ptr,  # [cdiv(M, BLOCK_M), OUT_PAIRS / 32, BLOCK_M, 32] int32
    count_ptr,  # [counts] int32, zeroed
    groups_ptr,  # of `group_tokens` for a stack of weights, or None
    M,
    PAIRS,
    OUT_PAIRS,
    counts,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    SWAPPED: tl.constexpr,  # pieces of 16 bytes lie as the tensor cores read them
    PDL: tl.constexpr,
):
    """Program (m, i): BLOCK pairs of token m; of row m of all tiles, with groups."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(0).to(tl.int64)
    row = m
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < OUT_PAIRS
    if groups_ptr is not None:
        _, _, _, first_row, rows = place_in_group(groups_ptr, tl.program_id(0) // BLOCK_M, 1, BLOCK_M)
        row = first_row + m % BLOCK_M
        mask = mask & (m % BLOCK_M < rows)
    pair = index % 32
    source = index - pair + pair % 4 * 8 + pair // 8 * 2 + pair // 4 % 2
    value = tl.load(x_ptr + row * PAIRS + source, mask=mask & (index < PAIRS), other=0)
    tile = out_ptr + m // BLOCK_M * BLOCK_M * OUT_PAIRS + m % BLOCK_M * 32
    if SWAPPED:
        pair = (pair // 4 ^ (m % 8).to(tl.int32)) * 4 + pair % 4
    tl.store(tile + index // 32 * (BLOCK_M * 32) + pair, value, mask=mask)
    first = m * tl.num_programs(1) + tl.program_id(1)
    for start in range(first * BLOCK, counts, tl.num_programs(1).to(tl.int64) * M * BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(count_ptr + place, tl.zeros((BLOCK,), tl.int32), mask=place < counts)
    if PDL:  # last: programs that came earlier would crowd where this kernel has left room, 39 us instead of 33
        tl.extra.cuda.gdc_launch_dependents()


def tile_tokens(
    x: Tensor, block_m: int, width: int, count: Tensor, groups: Tensor | None = None, *, swapped: bool = False
) -> Tensor:
    """x [M, K] of 16 bits as tiles [ceil(M / block_m), width / 64, block_m, 64]; zeroes count.

    Columns past K are 0, and rows past M are not written. With `groups` of `group_tokens` the tiles are theirs:
    [most_tiles, width / 64, block_m, 64].
    With `swapped`, piece p of the 8 pieces of 16 bytes of row m in a slice lies at place p ^ (m % 8).
    K % 64 == 0, x contiguous. A kernel launched after it with `launch_pdl` may start meanwhile.
    """
    m, k = x.shape
    pdl = Gpu.of(x.device).pdl
    of_groups = ceil_div(m, block_m) if groups is None else len(groups)
    rows = m if groups is None else of_groups * block_m
    tiles = torch.empty(of_groups, width // 64, block_m, 64, dtype=x.dtype, device=x.device)
    launch(
        _tile_tokens_kernel,
        (rows, ceil_div(width // 2, _PAIRS)),
        x.view(torch.int32),
        tiles.view(torch.int32),
        count,
        groups,
        rows,
        k // 2,
        width // 2,
        count.numel(),
        BLOCK_M=block_m,
        BLOCK=_PAIRS,
        SWAPPED=swapped,
        PDL=pdl,
        options={"launch_pdl": pdl},
    )
    return tiles
