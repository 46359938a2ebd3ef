"""Add the parts of a product whose tiles are shared: the steps of all tiles, in their order, are cut into equal shares.

So a tile belongs to one program, or to several neighbours. Each of these stores its part, in the first of two places of
its own if the tile is the first one of its share, and in the second otherwise. This kernel adds the parts of a tile in
their order, so the same call gives the same bits. It needs no counters, which a kernel ahead of the product would zero.
"""

import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div

__all__ = ["add_parts_of_tiles"]

NUMEL = 1024  # of a program


@triton.jit(do_not_specialize=["M"])
def _add_parts_kernel(
    partial_ptr,  # [programs, 2, BLOCK_N, BLOCK_M] float32 of the kernel before
    bias_ptr,
    out_ptr,  # [M, N]
    M,
    N,
    steps,
    programs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (tile, i): rows ROWS * i to ROWS * (i + 1) of a tile that several programs have parts of."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    units = tl.num_programs(0) * steps
    each, more = units // programs, units % programs
    longer = more * (each + 1)
    first_unit, last_unit = tile * steps, tile * steps + steps - 1
    first = tl.where(first_unit < longer, first_unit // (each + 1), more + (first_unit - longer) // each)
    last = tl.where(last_unit < longer, last_unit // (each + 1), more + (last_unit - longer) // each)
    is_later = (first * each + tl.minimum(first, more) < first_unit).to(tl.int32)
    parts = last - first + 1
    if PDL:
        tl.extra.cuda.gdc_wait()  # without parts too: who waits for this kernel, waits for the one before
    if parts > 1:
        n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
        m = tl.arange(0, BLOCK_M)[None, :]
        ptrs = partial_ptr + first.to(tl.int64) * (2 * BLOCK_N * BLOCK_M) + (n * BLOCK_M + m)
        total = tl.zeros((ROWS, BLOCK_M), tl.float32)
        for begin in range(0, parts, 4):
            for i in tl.static_range(4):  # four loads in flight
                part = begin + i
                place = 2 * part + tl.where(part == 0, is_later, 0)
                here = (m < M) & (n >= 0) & (part < parts)
                total += tl.load(ptrs + place * (BLOCK_N * BLOCK_M), mask=here, other=0.0)
        row = tile * BLOCK_N + n
        if bias_ptr is not None:
            total += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + m.to(tl.int64) * N + row, total.to(out_ptr.dtype.element_ty), mask=(m < M) & (row < N))


def add_parts_of_tiles(
    partial: Tensor, bias: Tensor | None, out: Tensor, steps: int, programs: int, tile: tuple[int, int], pdl: bool
) -> None:
    """Write the tiles of out [.., N] of which several of `programs` programs have parts, plus bias.

    partial float32 [programs, 2, *tile], of tiles of [rows of the weight, tokens] with `steps` steps each. A kernel
    launched after it with `launch_pdl` may start meanwhile: the product must have waited when it lets this one start.
    """
    n, (block_n, block_m) = out.shape[-1], tile
    rows = min(block_n, NUMEL // block_m)
    launch(
        _add_parts_kernel,
        (ceil_div(n, block_n), block_n // rows),
        partial,
        bias,
        out,
        out.numel() // n,
        n,
        steps,
        programs,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        ROWS=rows,
        PDL=pdl,
        options={"launch_pdl": pdl},
    )
