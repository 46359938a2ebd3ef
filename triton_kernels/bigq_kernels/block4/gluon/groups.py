"""place_in_group for Gluon, whose kernels cannot call Triton's functions: the same lines as in `groups.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["place_in_group"]

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
