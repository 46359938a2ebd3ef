"""Runs of tiles in a stack of weights: the tiles that meet the same tokens, one after the other, and where each lies.

An entry is a tile of tokens of one weight: one of `group_tokens`, or, if rows are taken one by one, a row. A run is all
tiles of rows of the weight for an entry and one of the splits of K. The tiles of all runs, in their order, are cut into
equal shares. So a program has long runs, and in each it keeps its tokens.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["count_entries", "next_tile", "place_of_tile", "tokens_of_run"]

FIELDS = gl.constexpr(5)  # of an entry of `group_tokens`


@gluon.jit
def count_entries(route_ptr, S, SINGLE: gl.constexpr):
    """How many entries there are for S rows. route_ptr: the weight of each row if SINGLE, else `group_tokens`."""
    if SINGLE:
        return S
    else:
        return gl.load(route_ptr + 4)


@gluon.jit
def place_of_tile(tile, stack, TILE: gl.constexpr, SPLIT: gl.constexpr, SINGLE: gl.constexpr):
    """(the tile, tiles that are left of its run, its first row among those of all weights, its split of K).

    stack: (route_ptr, tiles of rows of a weight, rows of a weight, weights). The row is int64.
    """
    route_ptr, n_tiles, N, E = stack
    run, n_tile = tile // n_tiles, tile % n_tiles
    if SINGLE:
        weight = gl.load(route_ptr + run // SPLIT).to(gl.int64)
        weight = gl.minimum(gl.maximum(weight, 0), E - 1)
    else:
        weight = gl.load(route_ptr + run // SPLIT * FIELDS).to(gl.int64)
    return tile, n_tiles - n_tile, weight * N + n_tile * TILE, run % SPLIT


@gluon.jit
def next_tile(place, stop, stack, TILE: gl.constexpr, SPLIT: gl.constexpr, SINGLE: gl.constexpr):
    """The place after a place, which may be behind the last tile of a program."""
    tile, left, row, split = place
    tile += 1
    row += TILE
    if stack[0] is not None:
        left -= 1
        if (left == 0) & (tile < stop):
            tile, left, row, split = place_of_tile(tile, stack, TILE, SPLIT, SINGLE)
    return tile, left, row, split


@gluon.jit
def tokens_of_run(run, stack, repeat, BLOCK_M: gl.constexpr, SPLIT: gl.constexpr, SINGLE: gl.constexpr):
    """(weight, first row of x, first row of the output, rows of x, rows of the output) of a run; the first 3 int64.

    A row whose weight is none of the stack has no row of x, and its output is 0.
    """
    route_ptr, _, _, E = stack
    entry = run // SPLIT
    if SINGLE:
        weight = gl.load(route_ptr + entry).to(gl.int64)
        is_known = (weight >= 0) & (weight < E)
        weight = gl.minimum(gl.maximum(weight, 0), E - 1)
        rows = is_known.to(gl.int32)
        return weight, (entry // repeat).to(gl.int64), entry.to(gl.int64), rows, 1
    else:
        place = route_ptr + entry * FIELDS
        weight = gl.load(place).to(gl.int64)
        first = gl.load(place + 1)
        rows = gl.load(place + 2)
        behind = (entry - gl.load(place + 3)) * BLOCK_M  # rows of the weight in the entries before
        first = (first + behind).to(gl.int64)
        return weight, first, first, rows - behind, rows - behind
