"""What the Gluon kernels share: the scales of rows, and the sum over programs that split K with its workspace."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div

__all__ = ["add_splits", "barrier", "load_absmax", "split_workspace"]

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in 3.7


@gluon.jit
def load_absmax(absmax_ptr, first, row, block, B, nested_ptr, offset_ptr, code_ptr):
    """As `dequantize_absmax.load_absmax`; behind the last block of a row, where all codes are 0, the last."""
    index = row * B + gl.minimum(block, B - 1)
    value = gl.load(absmax_ptr + first + index)
    if nested_ptr is None:
        return value
    else:
        nested = gl.load(nested_ptr + first // 256 + (((first % 256).to(gl.int32) + index) >> 8))
        return gl.load(code_ptr + value.to(gl.int32)) * nested + gl.load(offset_ptr)


@triton.jit
def _zero_counts_kernel(count_ptr, tiles, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Goes before a kernel that calls `add_splits`, which on Hopper starts meanwhile."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(count_ptr + index, tl.zeros((BLOCK,), tl.int32), mask=index < tiles)


def split_workspace(tiles: int, split: int, tile_numel: int, device: torch.device, pdl: bool) -> tuple[Tensor, Tensor]:
    """(partial, count) for `add_splits` of all tiles, count zeroed by a launch; where split is 1, empty and none."""
    is_split = split > 1
    count = torch.empty(tiles if is_split else 0, dtype=torch.int32, device=device)
    partial = torch.empty(tiles * split * tile_numel if is_split else 0, dtype=torch.float32, device=device)
    if is_split:
        launch(_zero_counts_kernel, (ceil_div(tiles, 1024),), count, tiles, BLOCK=1024, PDL=pdl, options={})
    return partial, count


@gluon.jit
def add_splits(total, partial_ptrs, count_ptr, split, mask, SPLIT: gl.constexpr, PDL: gl.constexpr):
    """(sum of a tile over its SPLIT programs in their order, whether this is the program that has it: the last).

    partial_ptrs: float32, where the tile of split 0 goes; the others follow. count_ptr: int32, 0 at first.
    """
    numel: gl.constexpr = total.shape[0] * total.shape[1]
    gl.store(partial_ptrs + split * numel, total, mask=mask)
    if PDL:
        gdc_wait()  # for the counts
    barrier()  # the whole program has stored, then one thread publishes it
    arrived = gl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLIT - 1:
        total = gl.full(total.shape, 0.0, gl.float32, total.type.layout)
        for i in gl.static_range(SPLIT):
            # .cg reads L2: another program wrote this after our L1 may have cached it.
            total += gl.load(partial_ptrs + i * numel, mask=mask, other=0.0, cache_modifier=".cg")
    return total, arrived == SPLIT - 1
