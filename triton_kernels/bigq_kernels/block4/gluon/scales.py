"""Tile functions that the Gluon kernels share: the scales of rows, and the sum over programs that split K."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

__all__ = [
    "add_parts",
    "add_tile_splits",
    "barrier",
    "copy_async",
    "load_scales",
    "quarters",
    "reinterpret",
    "scale_index",
    "scale_layout",
    "scales_of",
]

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in 3.7
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # renamed in 3.8
_memory = gl.shared_memory_descriptor
reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret  # renamed in 3.9


@gluon.constexpr_function
def scale_layout(block_n, warps):
    """[block_n, 4]: a lane has the four scales of each row that it has bytes of in `code_layout`."""
    rows = [[16 << i, 0] for i in range((block_n // 16).bit_length() - 1)]
    of_warps = warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], *rows[of_warps:]],
        lane_bases=[[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        warp_bases=rows[:of_warps],
        block_bases=[],
        shape=[block_n, 4],
    )


@gluon.jit
def _step_blocks(step, part, BLOCK_SIZE: gl.constexpr):
    """The block of a row that quarter `part` of step `step`, 64 elements, lies in."""
    if BLOCK_SIZE == 64:
        return step * 4 + part  # shows that the four are neighbours, which a division hides
    else:
        return (step * 4 + part) // (BLOCK_SIZE // 64)


@gluon.jit
def scale_index(first, step, part, B, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr):
    """The places in a tile's absmax of the four scales that each row has in a step. Neighbours become one load.

    first: of each row, [N, 1]. part: 0 to 3, [1, 4]. EVEN: rows are whole steps.
    """
    block = _step_blocks(step, part, BLOCK_SIZE)
    if not EVEN:
        block = gl.minimum(block, B - 1)  # behind the last block of a row all codes are 0
    index = first + block
    if EVEN and BLOCK_SIZE == 64:
        index = gl.multiple_of(index, [1, 4])  # for then B is, too
    return index


@gluon.jit
def load_scales(absmax_ptr, first, row, step, part, B, nested_ptr, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr):
    """Load what `scales_of` needs for the four scales of each row in a step. No load waits for another.

    first: of the tile, int64. row: [N, 1]. The others as in `scale_index`.
    """
    value = gl.load(absmax_ptr + first + scale_index(row * B, step, part, B, BLOCK_SIZE, EVEN))
    if nested_ptr is None:
        return value, value
    else:
        index = (first % 256).to(gl.int32) + row * B
        if EVEN:
            index += _step_blocks(step, 0, BLOCK_SIZE)  # the four have one, for 256 divides by their number
        else:
            index = scale_index(index, step, part, B, BLOCK_SIZE, EVEN)
        return value, gl.load(nested_ptr + first // 256 + (index >> 8))


@gluon.jit
def scales_of(value, nested, nested_ptr, offset_ptr, code_ptr):
    """The scales from what `load_scales` loaded: nested ones are decoded as in `absmax.load_absmax`."""
    if nested_ptr is None:
        return value
    else:
        return gl.load(code_ptr + value.to(gl.int32)) * nested + gl.load(offset_ptr)


@gluon.jit
def quarters(t):
    """[N, 4 * n] -> four [N, n]; in `code_layout` and `scale_layout` a lane keeps what it has."""
    N: gl.constexpr = t.shape[0]
    even, odd = gl.split(t.reshape([N, 2, 2, t.shape[1] // 4]).permute((0, 3, 1, 2)))
    q0, q2 = gl.split(even)
    q1, q3 = gl.split(odd)
    return q0, q1, q2, q3


@gluon.jit
def add_tile_splits(
    total, tile, split, first_m, M, partial_ptr, count_ptr, BLOCK_M: gl.constexpr, SPLIT: gl.constexpr
):  # fmt: skip
    """(sum of a tile over its SPLIT programs in their order, whether this is the program that has it: the last).

    total: [rows, tokens] of `tile`, whose first token is first_m of M. partial_ptr: float32, room for SPLIT times
    BLOCK_M tokens of each tile. count_ptr: int32, 0 at first.
    """
    ROWS: gl.constexpr = total.shape[0]
    TOKENS: gl.constexpr = total.shape[1]
    SUMS: gl.constexpr = total.type.layout
    tile_m = gl.arange(0, TOKENS, gl.SliceLayout(0, SUMS))[None, :]
    tile_n = gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))[:, None]
    mask = (first_m + tile_m < M) & (tile_n >= 0)
    partial_ptrs = partial_ptr + tile.to(gl.int64) * (SPLIT * BLOCK_M * ROWS) + (tile_m + tile_n * TOKENS)
    count_ptr += tile
    numel: gl.constexpr = ROWS * TOKENS
    gl.store(partial_ptrs + split * numel, total, mask=mask)
    barrier()  # the whole program has stored, then one thread publishes it
    arrived = gl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLIT - 1:
        total = gl.full(total.shape, 0.0, gl.float32, total.type.layout)
        for i in gl.static_range(SPLIT):
            # .cg reads L2: another program wrote this after our L1 may have cached it.
            total += gl.load(partial_ptrs + i * numel, mask=mask, other=0.0, cache_modifier=".cg")
    return total, arrived == SPLIT - 1


@gluon.jit
def add_parts(total, partial_ptr, offset, mask, count_ptr, part, first, is_later, parts):
    """(sum of a tile over its `parts` programs in their order, whether this program has it: the last to finish).

    partial_ptr: float32, room for two tiles of each program. The program `first`, which has the first part, stores it
    in its second place if `is_later`, and all others store theirs in their first. count_ptr: int32, 0 at first.
    """
    numel: gl.constexpr = total.shape[0] * total.shape[1]
    place = 2 * (first + part) + gl.where(part == 0, is_later, 0)
    gl.store(partial_ptr + place.to(gl.int64) * numel + offset, total, mask=mask)
    barrier()  # the whole program has stored, then one thread publishes it
    is_last = gl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == parts - 1
    if is_last:
        total = gl.full(total.shape, 0.0, gl.float32, total.type.layout)
        partial_ptr += 2 * numel * first.to(gl.int64)
        for begin in range(0, parts, 4):
            for i in gl.static_range(4):  # four loads in flight
                at = begin + i
                place = 2 * at + gl.where(at == 0, is_later, 0)
                # .cg reads L2: another program wrote this after our L1 may have cached it.
                here = mask & (at < parts)
                total += gl.load(partial_ptr + place * numel + offset, mask=here, other=0.0, cache_modifier=".cg")
    return total, is_last
