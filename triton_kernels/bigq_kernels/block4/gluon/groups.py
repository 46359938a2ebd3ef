"""place_in_group for Gluon, whose kernels cannot call Triton's functions: the same lines as in `groups.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

__all__ = ["place_in_group", "place_of_program"]

FIELDS = gl.constexpr(5)


@gluon.jit
def place_in_group(groups_ptr, program, n_tiles, BLOCK_M: gl.constexpr):
    """(weight, tile of its rows, its tile of tokens, first row of x, rows of the tile) of a program.

    The weight, the tile of tokens and the row of x are int64, for addresses.
    """
    entry = groups_ptr + program // n_tiles * FIELDS
    weight = gl.load(entry).to(gl.int64)
    first = gl.load(entry + 1).to(gl.int64)
    rows = gl.load(entry + 2)
    group = gl.load(entry + 3)
    m_tiles = gl.maximum(gl.cdiv(rows, BLOCK_M), 1)
    inside = program - group * n_tiles
    m_tile = inside % m_tiles
    return weight, inside // m_tiles, (group + m_tile).to(gl.int64), first + m_tile * BLOCK_M, rows - m_tile * BLOCK_M


@gluon.jit
def place_of_program(groups_ptr, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(tile, its tile of tokens, first row of x, first row of the weight, weight, the row of x behind its last).

    Programs of one tile of the weight follow each other, so it is read once. With groups of a stack, a program behind
    the last tile has no rows. The tile of tokens, the row of x and the weight are int64, for addresses.
    """
    tile = gl.program_id(0)
    if groups_ptr is None:
        m_tiles = gl.cdiv(M, BLOCK_M)
        m_tile = (tile % m_tiles).to(gl.int64)
        return tile, m_tile, m_tile * BLOCK_M, tile // m_tiles * BLOCK_N, m_tile * 0, M
    else:
        gdc_wait()
        n_tiles = gl.cdiv(N, BLOCK_N)
        weight, n_tile, m_tile, first_m, rows = place_in_group(groups_ptr, tile, n_tiles, BLOCK_M)
        tile = (m_tile * n_tiles).to(gl.int32) + n_tile
        return tile, m_tile, first_m, n_tile * BLOCK_N, weight, first_m + gl.maximum(rows, 0)
