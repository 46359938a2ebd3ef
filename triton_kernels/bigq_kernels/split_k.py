"""Split K over programs: over how many, the memory that their partial sums take, and their sum.

Each program of a tile stores its partial sum and counts itself in. The last one adds all sums in their order, so that
the same call gives the same bits.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.tiles import ceil_div

__all__ = ["add_splits", "even_splits", "split_steps", "split_workspace", "store_split"]

MIN_STEPS = 2  # a program with fewer has nothing to overlap
MIN_PROGRAMS = 2  # a multiprocessor: one does not hide its own latencies, 29.8 us against 24.5 (4096 x 14336, H100)


@cache
def split_steps(tiles: int, steps: int, multiprocessors: int, overhead: float) -> tuple[int, int]:
    """(programs along K, steps of each): the least work for the multiprocessor that gets most of it.

    A program works for its steps plus `overhead` of one. Programs share a multiprocessor evenly, so how many the
    busiest gets decides, not whether all fit at once: of 224 tiles with 16 steps over 132 multiprocessors it gets 2
    programs of 16 steps, 4 of 8, or 7 of 4, which are 32, 32 and 28 steps; the 7 do not fit at once.
    """
    best = None
    for per_split in range(min(MIN_STEPS, steps), steps + 1):
        split = ceil_div(steps, per_split)
        programs = ceil_div(tiles * split, multiprocessors)
        lonely = programs < MIN_PROGRAMS
        candidate = lonely, programs * (per_split + overhead), split, per_split
        best = candidate if best is None else min(best, candidate)
    assert best is not None
    return best[2:]


def even_splits(steps: int, split: int, *, least: int) -> tuple[int, int]:
    """(steps of a program, programs along K): at most `split`, and at least `least` steps for each, where there are."""
    while True:
        each = ceil_div(steps, split)
        split = ceil_div(steps, each)
        if split == 1 or steps - (split - 1) * each >= least:
            return each, split
        split -= 1


def split_workspace(
    tiles: int, split: int, tile_numel: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(partial sums, int32 counts) of all tiles, neither written; where split is 1, empty."""
    if split == 1:
        tiles = 0
    partial = torch.empty(tiles * split * tile_numel, dtype=dtype, device=device)
    return partial, torch.empty(tiles, dtype=torch.int32, device=device)


@triton.jit
def store_split(total, partial_ptrs, count_ptr, mask):
    """Store this program's sum of a tile, then count it in: how many were counted before."""
    tl.store(partial_ptrs, total, mask=mask)
    tl.debug_barrier()  # the whole program has stored, then one thread publishes it
    return tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def add_splits(partial_ptrs, stride, split, mask, DTYPE: tl.constexpr, UNROLL: tl.constexpr):
    """The sum of `split` partial sums that lie `stride` elements apart; UNROLL wants a constexpr split."""
    total = tl.zeros(partial_ptrs.shape, DTYPE)
    # .cg reads L2: another program wrote this after our L1 may have cached it.
    if UNROLL:  # all loads in flight together
        for i in tl.static_range(split):
            total += tl.load(partial_ptrs + i * stride, mask=mask, other=0, cache_modifier=".cg")
    else:
        for i in tl.range(0, split, num_stages=1):  # not staged through shared memory
            total += tl.load(partial_ptrs + i * stride, mask=mask, other=0, cache_modifier=".cg")
    return total
