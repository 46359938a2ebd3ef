"""Slots: a few weights of a stack in the memory of a GPU, copied from pinned host memory when rows need them.

`assign_slots` says which weight each slot holds, and which are to be copied; `fill_slots` copies them. The host waits
for neither, and both take the same launches whatever the ids are, so a CUDA graph can hold them.
"""

from collections.abc import Sequence
from itertools import chain, zip_longest

import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.checks import MAX_PARTS, check_assign_slots, check_fill_slots
from bigq_kernels.gpu import Gpu
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = ["assign_slots", "fill_slots"]

WORDS = 4096  # of a part that a program copies: 16 KiB, 128 bytes a thread, which are on their way at once
WARPS = 4


@triton.jit(do_not_specialize=["R"])
def _assign_slots_kernel(
    ids_ptr,  # [R] int32 or int64
    held_ptr,  # [S] int32: the weight that a slot holds, or -1
    stamps_ptr,  # [S] int64: the call that used a slot last
    slots_ptr,  # [R] int32
    copies_ptr,  # [R, 2] int32
    R,
    E,
    S,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    slot = tl.arange(0, BLOCK_S)
    held = tl.load(held_ptr + slot, mask=slot < S, other=-1)
    stamp = tl.load(stamps_ptr + slot, mask=slot < S, other=0)
    now = tl.max(stamp, axis=0) + 1
    used = slot >= S  # there are none, so no weight gets one
    for r in range(R):
        id = tl.load(ids_ptr + r)
        used = used | ((held == id) & (id >= 0))
    copies = 0
    for r in range(R):
        id = tl.load(ids_ptr + r)
        is_known = (id >= 0) & (id < E)
        found = tl.max(tl.where((held == id) & is_known, slot, -1), axis=0)
        if is_known & (found < 0):
            # Those of this call are out of the question. R <= S, so one is left.
            age = tl.where(used, 0x7FFFFFFFFFFFFFFF, stamp * BLOCK_S + slot)
            found = (tl.min(age, axis=0) % BLOCK_S).to(tl.int32)
            held = tl.where(slot == found, id.to(tl.int32), held)
            used = used | (slot == found)
            tl.store(copies_ptr + 2 * copies, id.to(tl.int32))
            tl.store(copies_ptr + 2 * copies + 1, found)
            copies += 1
        tl.store(slots_ptr + r, found)
    for r in range(copies, R):
        tl.store(copies_ptr + 2 * r, -1)
        tl.store(copies_ptr + 2 * r + 1, -1)
    tl.store(held_ptr + slot, held, mask=slot < S)
    tl.store(stamps_ptr + slot, tl.where(used, now, stamp), mask=slot < S)


def assign_slots(ids: Tensor, held: Tensor, stamps: Tensor, weights: int) -> tuple[Tensor, Tensor]:
    """Give each weight that ids [R] hit a slot: (slots int32 [R], copies int32 [R, 2]).

    A weight that a slot holds keeps it. Each other one gets the slot that was not used for longest, of those that no id
    hits; of several, the first.

    Args:
        ids: int32 or int64. One that is none of the `weights` gets the slot -1.
        held: int32 [S], S >= R: the weight that each slot holds, or -1. It is updated.
        stamps: int64 [S]: the number of the call that used it last. It is updated.
        weights: how many there are.

    Returns:
        The slot of each id; and (weight, slot) of each copy to make, in the order of ids, with -1 behind the last.
    """
    check_assign_slots(ids, held, stamps)
    ids, (rows,), (count,) = ids.contiguous(), ids.shape, held.shape
    slots, copies = held.new_empty(rows), held.new_empty(rows, 2)
    pdl = Gpu.of(held.device).pdl
    launch(
        _assign_slots_kernel, (1,), ids, held, stamps, slots, copies, rows, weights, count,
        BLOCK_S=max(16, next_power_of_2(count)), PDL=pdl,
        options={"num_warps": 1, "launch_pdl": pdl},  # reductions within a warp need no barriers
    )  # fmt: skip
    return slots, copies


@triton.jit
def _copy_part(
    source_ptr, to_ptr, weight, slot, chunk, FIRST: tl.constexpr, NUMEL: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Copy a chunk of `weight` to `slot`, if it is of this part, whose chunks begin at FIRST."""
    if (chunk >= FIRST) & (chunk < FIRST + (NUMEL + WORDS - 1) // WORDS):
        word = (chunk - FIRST) * WORDS + tl.arange(0, WORDS)
        value = tl.load(source_ptr + weight * NUMEL + word, mask=word < NUMEL)
        tl.store(to_ptr + slot * NUMEL + word, value, mask=word < NUMEL)


@triton.jit
def _fill_slots_kernel(
    copies_ptr,  # [R, 2] int32: weight and slot, or -1
    from0, to0, from1, to1, from2, to2, from3, to3, from4, to4, from5, to5, from6, to6, from7, to7,  # parts, or None
    N0: tl.constexpr,  # elements of a weight in a part, or 0
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    N4: tl.constexpr,
    N5: tl.constexpr,
    N6: tl.constexpr,
    N7: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    copy = copies_ptr + 2 * tl.program_id(0)
    chunk = tl.program_id(1)
    weight = tl.load(copy).to(tl.int64)
    slot = tl.load(copy + 1).to(tl.int64)
    F1: tl.constexpr = (N0 + WORDS - 1) // WORDS
    F2: tl.constexpr = F1 + (N1 + WORDS - 1) // WORDS
    F3: tl.constexpr = F2 + (N2 + WORDS - 1) // WORDS
    F4: tl.constexpr = F3 + (N3 + WORDS - 1) // WORDS
    F5: tl.constexpr = F4 + (N4 + WORDS - 1) // WORDS
    F6: tl.constexpr = F5 + (N5 + WORDS - 1) // WORDS
    F7: tl.constexpr = F6 + (N6 + WORDS - 1) // WORDS
    if weight >= 0:
        if N0:
            _copy_part(from0, to0, weight, slot, chunk, 0, N0, WORDS)
        if N1:
            _copy_part(from1, to1, weight, slot, chunk, F1, N1, WORDS)
        if N2:
            _copy_part(from2, to2, weight, slot, chunk, F2, N2, WORDS)
        if N3:
            _copy_part(from3, to3, weight, slot, chunk, F3, N3, WORDS)
        if N4:
            _copy_part(from4, to4, weight, slot, chunk, F4, N4, WORDS)
        if N5:
            _copy_part(from5, to5, weight, slot, chunk, F5, N5, WORDS)
        if N6:
            _copy_part(from6, to6, weight, slot, chunk, F6, N6, WORDS)
        if N7:
            _copy_part(from7, to7, weight, slot, chunk, F7, N7, WORDS)


def fill_slots(copies: Tensor, sources: Sequence[Tensor], pools: Sequence[Tensor]) -> None:
    """Copy row copies[i, 0] of each of `sources` to row copies[i, 1] of its pool, for each i; -1 is none.

    Args:
        copies: int32 [R, 2], as `assign_slots` gives them.
        sources: up to 8 parts of a stack, [E, n]: a row is that of one weight. Contiguous, in the memory of the GPU or
            in host memory that it reads by its address. Elements of 4 bytes are copied fastest.
        pools: the same parts of the weights in the slots, [S, n].
    """
    check_fill_slots(copies, sources, pools)
    numels = [source.shape[1] for source in sources] + [0] * (MAX_PARTS - len(sources))
    chunks = sum(ceil_div(numel, WORDS) for numel in numels)
    if not (chunks and len(copies)):
        return
    pairs = chain.from_iterable(zip(sources, pools, strict=True))
    parts = [part for part, _ in zip_longest(pairs, range(2 * MAX_PARTS))]
    pdl = Gpu.of(copies.device).pdl
    launch(
        _fill_slots_kernel, (len(copies), chunks), copies.contiguous(), *parts,
        **{f"N{i}": numel for i, numel in enumerate(numels)}, WORDS=WORDS, PDL=pdl,
        options={"num_warps": WARPS, "launch_pdl": pdl},
    )  # fmt: skip
