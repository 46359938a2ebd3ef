"""Layouts of slices: which lane has which copies, codes, scales, tokens and sums of the slice of K that a warp has.

A slice is QUARTERS times 64 elements of K. Of `warps` warps, each `k_warps` neighbours share the K of 16 rows, and the
next ones have the next 16 rows. Row 16 * w + r of a layout is row r of warp w.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["copy_layout", "lane_layout", "quarter_layout", "sum_layout", "token_layout"]


@gluon.constexpr_function
def _bits(size, dimension, rank):
    """The bases of a linear layout that count to `size` along a dimension."""
    return [[(1 << i) * (d == dimension) for d in range(rank)] for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def _row_warps(warps):
    return [[16 * base, 0] for base, _ in _bits(warps, 0, 2)]


@gluon.constexpr_function
def copy_layout(warps):
    """[16 * warps, 8] pieces of 16 bytes: a warp has the 16 rows that it copies, its lanes 4 of them at a time."""
    lanes = _bits(8, 1, 2) + _bits(4, 0, 2)
    return gl.DistributedLinearLayout(
        reg_bases=[[4, 0], [8, 0]],
        lane_bases=lanes,
        warp_bases=_row_warps(warps),
        block_bases=[],
        shape=[16 * warps, 8],
    )


@gluon.constexpr_function
def quarter_layout(warps):
    """[16 * warps, 32] bytes: a quarter of `code_layout`."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=_row_warps(warps),
        block_bases=[],
        shape=[16 * warps, 32],
    )


@gluon.constexpr_function
def lane_layout(warps):
    """[16 * warps, 4]: lane (g, c) has quarter c of rows g and g + 8."""
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=_row_warps(warps),
        block_bases=[],
        shape=[16 * warps, 4],
    )


@gluon.constexpr_function
def token_layout(warps, block_m):
    """[warps, block_m, 64] elements: lane (g, c) has 16c to 16c + 15 of token g, and of g + 8."""
    later_tokens = [[0, 8, 0]] if block_m > 8 else []
    return gl.DistributedLinearLayout(
        reg_bases=[*_bits(16, 2, 3), *later_tokens],
        lane_bases=[[0, 0, 16], [0, 0, 32], *_bits(8, 1, 3)],
        warp_bases=_bits(warps, 0, 3),
        block_bases=[],
        shape=[warps, block_m, 64],
    )


@gluon.constexpr_function
def sum_layout(k_warps, warps, numel):
    """[k_warps, numel] partial sums: a thread has all that are added to one."""
    places = _bits(numel, 1, 2) + [[0, 0]] * 10
    of_warps = warps.bit_length() - 1
    used = max(numel.bit_length() - 1, 5 + of_warps)
    return gl.DistributedLinearLayout(
        reg_bases=_bits(k_warps, 0, 2) + places[5 + of_warps : used],
        lane_bases=places[:5],
        warp_bases=places[5 : 5 + of_warps],
        block_bases=[],
        shape=[k_warps, numel],
    )
