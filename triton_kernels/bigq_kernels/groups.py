"""Groups: which rows of x each weight of a stack multiplies, as tiles of tokens that programs take without a host wait.

The rows of x are sorted by the weight that multiplies them, and `stops` says where the rows of each weight end. How
many rows a weight has is known on the GPU alone, so the grid is the most that S rows of E weights can need:
`most_tiles(S, E, BLOCK_M)`. Programs beyond the tiles that there are end at once.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.gpu import Gpu
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = [
    "group_tokens",
    "most_tiles",
    "place_in_group",
    "rows_of_weights",
    "sort_by_weight",
    "weights_hit",
    "weights_of_rows",
]

# Of a tile of tokens: weight, its first row of x, how many rows it has, its first tile, and how many tiles there are.
FIELDS = tl.constexpr(5)
TILES = 16  # that a program describes: a comparison with 512 weights fits its registers


def most_tiles(rows: int, weights: int, block_m: int) -> int:
    """The most tiles of block_m rows that `rows` rows of `weights` weights make."""
    hit = min(rows, weights)
    return hit + (rows - hit) // block_m


def rows_of_weights(stops: Tensor) -> Iterator[tuple[int, slice]]:
    """Each weight that has rows, and these rows: for products one by one, for which the host reads `stops`."""
    start = 0
    for weight, stop in enumerate(stops.tolist()):
        if stop > start:
            yield weight, slice(start, stop)
            start = stop


def weights_hit(rows: int, weights: int) -> int:
    """How many of `weights` weights multiply some of `rows` rows, on average, if each row chooses one at random."""
    return max(1, round(weights * (1 - (1 - 1 / weights) ** rows)))


@triton.jit
def place_in_group(groups_ptr, program, n_tiles, BLOCK_M: tl.constexpr):
    """(weight, tile of its rows, its tile of tokens, first row of x, rows of the tile) of a program.

    The weight, the tile of tokens and the row of x are int64, for addresses.

    Programs of one weight follow each other, and of these the ones with the same rows of the weight. So a weight is
    read once, and its tokens stay in the L2 cache.
    """
    entry = groups_ptr + program // n_tiles * FIELDS
    weight = tl.load(entry).to(tl.int64)
    first = tl.load(entry + 1).to(tl.int64)
    rows = tl.load(entry + 2)
    group = tl.load(entry + 3)
    m_tiles = tl.maximum(tl.cdiv(rows, BLOCK_M), 1)
    inside = program - group * n_tiles
    m_tile = inside % m_tiles
    return weight, inside // m_tiles, (group + m_tile).to(tl.int64), first + m_tile * BLOCK_M, rows - m_tile * BLOCK_M


@triton.jit(do_not_specialize=["S", "tiles", "counts"])
def _group_tokens_kernel(
    stops_ptr,  # [E] int32: where the rows of each weight end
    groups_ptr,  # [tiles, FIELDS] int32
    count_ptr,  # [counts] int32, zeroed
    out_ptr,  # [S, N]: rows behind the last stop are zeroed
    S,
    N,
    E,
    tiles,
    counts,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program, programs = tl.program_id(0), tl.num_programs(0)
    weight = tl.arange(0, BLOCK_E)
    stop = tl.minimum(tl.load(stops_ptr + weight, mask=weight < E, other=0), S).to(tl.int32)
    start = tl.load(stops_ptr + weight - 1, mask=(weight > 0) & (weight < E), other=0).to(tl.int32)
    rows = tl.maximum(stop - start, 0)
    m_tiles = (rows + (BLOCK_M - 1)) // BLOCK_M
    after = tl.cumsum(m_tiles, axis=0)  # the first tile of the next weight
    tile = program * BLOCK_T + tl.arange(0, BLOCK_T)
    is_its = (after[None, :] > tile[:, None]) & ((after - m_tiles)[None, :] <= tile[:, None])
    entry = groups_ptr + tile * FIELDS
    mask = tile < tiles
    tl.store(entry, tl.sum(tl.where(is_its, weight[None, :], 0), axis=1), mask=mask)
    tl.store(entry + 1, tl.sum(tl.where(is_its, start[None, :], 0), axis=1), mask=mask)
    # A tile behind the last has no rows, and is the first of its group: so its programs end.
    tl.store(entry + 2, tl.sum(tl.where(is_its, rows[None, :], 0), axis=1), mask=mask)
    own = tl.sum(tl.where(is_its, (after - m_tiles)[None, :], 0), axis=1)
    there_are = tl.minimum(tl.sum(m_tiles, axis=0), tiles)  # stops that do not ascend would make more
    tl.store(entry + 3, tl.where(tile < there_are, own, tile), mask=mask)
    tl.store(entry + 4, tl.zeros((BLOCK_T,), tl.int32) + there_are, mask=mask)
    for begin in range(program * BLOCK, counts, programs * BLOCK):
        place = begin + tl.arange(0, BLOCK)
        tl.store(count_ptr + place, tl.zeros((BLOCK,), tl.int32), mask=place < counts)
    behind = tl.max(stop, axis=0) + program
    out_ptr += behind.to(tl.int64) * N
    for _ in range(behind, S, programs):
        for begin in range(0, N, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            tl.store(out_ptr + column, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=column < N)
        out_ptr += programs.to(tl.int64) * N


def group_tokens(stops: Tensor, weights: int, block_m: int, count: Tensor, out: Tensor) -> Tensor:
    """The tiles of block_m rows of `out` [S, N] as int32 [most_tiles, 5], see `place_in_group`; zeroes `count`.

    Rows of `out` behind the last of `stops`, int32 [weights], are zeroed. A kernel launched after it with `launch_pdl`
    may start meanwhile.
    """
    s, n = out.shape
    tiles = most_tiles(s, weights, block_m)
    pdl = Gpu.of(out.device).pdl
    groups = torch.empty(tiles, FIELDS.value, dtype=torch.int32, device=out.device)
    launch(
        _group_tokens_kernel,
        (ceil_div(tiles, TILES),),
        stops,
        groups,
        count,
        out,
        s,
        n,
        weights,
        tiles,
        count.numel(),
        BLOCK_E=next_power_of_2(weights),
        BLOCK_M=block_m,
        BLOCK_T=TILES,
        BLOCK=512,
        PDL=pdl,
        options={"launch_pdl": pdl},
    )
    return groups


@triton.jit(do_not_specialize=["S"])
def _weights_of_rows_kernel(stops_ptr, ids_ptr, S, E, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    weight = tl.arange(0, BLOCK_E)
    stop = tl.load(stops_ptr + weight, mask=weight < E, other=2**31 - 1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(ids_ptr + row, tl.sum((stop[None, :] <= row[:, None]).to(tl.int32), axis=1), mask=row < S)


def weights_of_rows(stops: Tensor, rows: int) -> Tensor:
    """int32 [rows]: which weight multiplies each row; E, the number of weights, for rows behind the last of `stops`."""
    ids = torch.empty(rows, dtype=torch.int32, device=stops.device)
    pdl = Gpu.of(stops.device).pdl
    launch(
        _weights_of_rows_kernel,
        (ceil_div(rows, TILES),),
        stops,
        ids,
        rows,
        len(stops),
        BLOCK_E=next_power_of_2(len(stops)),
        BLOCK=TILES,
        PDL=pdl,
        options={"launch_pdl": pdl},
    )
    return ids


def sort_by_weight(ids: Tensor, weights: int) -> tuple[Tensor, Tensor]:
    """The order int64 [S] that sorts rows by their weight, ids [S], and where the rows of each end: int32 [weights].

    Rows whose id is no weight's come last.
    """
    ordered, order = torch.where((ids >= 0) & (ids < weights), ids, weights).sort(stable=True)
    every = torch.arange(weights, device=ids.device)
    return order, torch.searchsorted(ordered, every, right=True, out_int32=True)
