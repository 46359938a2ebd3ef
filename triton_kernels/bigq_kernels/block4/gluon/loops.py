"""The loops of a tile's products with wgmma: how many tokens each multiplies, which is a constant of its code."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["loop_sizes", "power_of_2", "rest_of", "wgmma_sums"]


@gluon.constexpr_function
def loop_sizes(block_m, least, split):
    """The numbers of tokens that a tile has a loop for, ascending: multiples of `least`, one or two powers of two each.

    Partial sums of splits are stored as one power of two.
    """
    return tuple(size for size in range(least, block_m + 1, least) if size.bit_count() <= (2 if split == 1 else 1))


@gluon.constexpr_function
def rest_of(sizes):
    return sizes[1:]


@gluon.constexpr_function
def power_of_2(size):
    """The largest in it."""
    return 1 << (size.bit_length() - 1)


@gluon.constexpr_function
def wgmma_sums(tokens, warps):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, tokens, 16])
