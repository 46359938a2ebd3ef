"""The wgmma kernel for one weight: programs that stay, in rounds of whole tiles, and the last tiles in parts, in Gluon.

- A program starts the first copies of its next tile, and then stores the one before.
- Who has the last steps of a tile stores sums in float32, 16 bytes of a lane beside those of its neighbour, and counts
  itself in. Who has the first steps waits for the others and adds their sums to its own in order, so the same call
  gives the same bits. Row by row, the addresses of sums would take so many registers that 600 bytes are spilled.
- Programs wait only for such as started before them: the first ones have the last steps.

`rounds` divides the tiles, and `wgmma_steps` is what a program does in one. Gluon has no interpreter, so values are
tested on a GPU only.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from bigq_kernels.block4.configs import WgmmaConfig
from bigq_kernels.block4.gluon.scales import barrier
from bigq_kernels.block4.gluon.table import code_tables, fill_table
from bigq_kernels.block4.gluon.wgmma_steps import (
    STEP_BYTES,
    allocate_stages,
    copy_first_tokens,
    copy_first_weights,
    loops_of,
    multiply,
    scale_copy_layout,
    store_tile,
    sums_layout,
    weight_copy_layout,
)
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.rounds import rounds_of
from bigq_kernels.block4.tokens import tile_tokens
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div

__all__ = ["linear_4bit_rounds"]


@gluon.jit
def _span(program, i, rounds, steps):
    """(tile, first step, step after the last) of the i-th turn of a program, by the fields of `Rounds`."""
    programs, whole, rest, parts, helped, helped_more, _, more = rounds
    tile = program + i * programs
    start = gl.to_tensor(0)
    stop = steps
    helpers = programs - rest
    if i >= whole and parts > 1:
        part = program // rest
        tile = whole * programs + program - part * rest
        start = steps * part // parts
        stop = steps * (part + 1) // parts
    elif i >= whole and program >= rest:
        helper = program - rest
        tile = whole * programs + helper + (i - whole) * helpers
        start = steps - gl.where(helper < more, helped_more, helped)
    elif i >= whole and helped > 0:
        stop = steps - gl.where(program % helpers < more, helped_more, helped)
    return tile, start, stop


@gluon.jit
def _turns(program, rounds):
    """How many turns a program has."""
    _, whole, rest, parts, _, _, each, more = rounds
    turns = whole
    if parts > 1:
        turns += (program < rest * parts).to(gl.int32)
    elif program < rest:
        turns += 1
    else:
        turns += each + (program - rest < more).to(gl.int32)
    return turns


@gluon.jit
def _in_lanes(total):
    """Sums as [tokens / 8, 8 * rows]: of each row a lane has 4 neighbours, those of a warp follow each other."""
    N: gl.constexpr = total.shape[0]
    M: gl.constexpr = total.shape[1]
    return total.reshape([N // 16, 2, 8, M // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([M // 8, N * 8])


@gluon.jit
def _of_lanes(sums, SUMS: gl.constexpr):
    """`_in_lanes` undone."""
    M: gl.constexpr = sums.shape[0] * 8
    N: gl.constexpr = sums.shape[1] // 8
    total = sums.reshape([M // 8, N // 16, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5)).reshape([N, M])
    return gl.convert_layout(total, SUMS, assert_trivial=True)


@gluon.jit
def _places(sums):
    LAYOUT: gl.constexpr = sums.type.layout
    ROW: gl.constexpr = sums.shape[1]
    row = gl.arange(0, sums.shape[0], gl.SliceLayout(1, LAYOUT))[:, None]
    return row * ROW + gl.arange(0, ROW, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def _store_part(total, partial_ptr, count_ptr, tile, part, others):
    """Store the sums of a part, 0 for the second one of a tile, and count it in. tile: among those that are cut."""
    numel: gl.constexpr = total.shape[0] * total.shape[1]
    sums = _in_lanes(total)
    gl.store(partial_ptr + (tile * others + part).to(gl.int64) * numel + _places(sums), sums)
    barrier()  # the whole program has stored, then one thread publishes it
    gl.atomic_add(count_ptr + tile, 1, sem="release", scope="gpu")


@gluon.jit
def _add_others(total, partial_ptr, count_ptr, tile, others):
    """The sums of a tile's first part plus those of its other parts, in their order, once these are stored."""
    numel: gl.constexpr = total.shape[0] * total.shape[1]
    SUMS: gl.constexpr = total.type.layout
    UNROLL: gl.constexpr = 4096 * gl.num_warps() // numel  # parts whose loads are in flight: 128 registers
    arrived = gl.atomic_add(count_ptr + tile, 0, sem="acquire", scope="gpu")
    while arrived < others:
        arrived = gl.atomic_add(count_ptr + tile, 0, sem="acquire", scope="gpu")
    sums = _in_lanes(total)
    places = _places(sums)
    partial_ptr += (tile * others).to(gl.int64) * numel
    for begin in range(0, others, UNROLL):
        for i in gl.static_range(UNROLL):
            here = (places >= 0) & (begin + i < others)  # the first for the shape
            ptrs = partial_ptr + (begin + i).to(gl.int64) * numel + places
            # .cg reads L2: another program wrote this after our L1 may have cached it.
            sums += gl.load(ptrs, mask=here, other=0.0, cache_modifier=".cg")
    return _of_lanes(sums, SUMS)


# A new number of tokens compiles nothing.
@gluon.jit(do_not_specialize=["M", "programs", "whole", "rest", "parts", "helped", "helped_more", "each", "more"])
def _linear_4bit_rounds_kernel(
    x_ptr,  # [m_tiles, 4 * steps, BLOCK_M, 64] of `tile_tokens`, the kernel before
    weight_ptr,  # [N, PAIRS] uint8: element 2i in the high nibble
    absmax_ptr,  # [N, B] float32, or uint8 if nested
    bias_ptr,  # [N] or None
    nested_ptr,  # see load_scales
    offset_ptr,
    code_ptr,
    partial_ptr,  # [m_tiles, rest, others, BLOCK_M * BLOCK_N] float32
    count_ptr,  # [m_tiles, rest] int32, zero once the kernel before has ended: how many parts are stored
    out_ptr,  # [M, N]
    M,
    N,
    PAIRS,
    B,
    programs, whole, rest, parts, helped, helped_more, each, more,  # Rounds, of each tile of tokens
    t0, t1, t2, t3, t4, t5, t6, t7,  # code_tables
    BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr,  # K divides into whole steps: no masks
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    CHUNK: gl.constexpr,  # see `multiply`
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    SUMS: gl.constexpr = sums_layout(BLOCK_M, WARPS)
    W_COPY: gl.constexpr = weight_copy_layout(WARPS)
    ABSMAX_COPY: gl.constexpr = scale_copy_layout(nested_ptr is not None, EVEN, WARPS)
    w_smem, absmax_smem, x_smem = allocate_stages(DTYPE, BLOCK_M, BLOCK_N)

    rounds = (programs, whole, rest, parts, helped, helped_more, each, more)
    steps = gl.cdiv(PAIRS, STEP_BYTES)
    m_tiles = gl.cdiv(M, BLOCK_M)  # programs of one tile of the weight follow each other, so it is read once
    place = gl.program_id(0) // m_tiles
    m_tile = (gl.program_id(0) - place * m_tiles).to(gl.int64)
    first_m = m_tile * BLOCK_M
    program = programs - 1 - place
    turns = _turns(program, rounds)
    if turns == 0:
        return
    first_cut = whole * programs
    others = gl.maximum(parts - 1, 1)
    count_ptr += m_tile * rest
    partial_ptr += m_tile * (rest * others) * (BLOCK_M * BLOCK_N)

    row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, W_COPY))[:, None]
    byte = gl.arange(0, STEP_BYTES, gl.SliceLayout(0, W_COPY))[None, :]
    if not EVEN:
        byte += row * 0  # for the shape
    scale_row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, ABSMAX_COPY))[:, None]
    quarter = gl.arange(0, 4, gl.SliceLayout(0, ABSMAX_COPY))[None, :]
    x_ptr += m_tile * (steps * (2 * STEP_BYTES)).to(gl.int64) * BLOCK_M

    tile, start, stop = _span(program, 0, rounds, steps)
    first_n = tile * BLOCK_N
    last_row = N - 1 - first_n  # rows past N read the last row; their result is not stored
    w_ptrs = weight_ptr + first_n.to(gl.int64) * PAIRS + (gl.minimum(row, last_row) * PAIRS + byte)
    first_block, absmax_row = first_n.to(gl.int64) * B, gl.minimum(scale_row, last_row)
    weights = (w_smem, absmax_smem, w_ptrs, byte, absmax_ptr, first_block, absmax_row, quarter)
    value, nested = copy_first_weights(
        weights, nested_ptr, offset_ptr, code_ptr, PAIRS, B, start, stop, BLOCK_SIZE, EVEN
    )
    table, bank = fill_table(t0, t1, t2, t3, t4, t5, t6, t7)  # while the copies are on their way
    bank += table
    gdc_wait()  # for the tokens, and the counts
    copy_first_tokens(x_smem, x_ptr, start, BLOCK_M)

    total = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, SUMS)
    tile_before, start_before = tile, start
    turn = gl.to_tensor(0)
    while turn < turns:
        if turn > 0:  # while the first copies of this turn are on their way
            if start_before > 0:
                _store_part(total, partial_ptr, count_ptr, tile_before - first_cut, 0, others)
            else:
                store_tile(total, bias_ptr, out_ptr, first_m, tile_before * BLOCK_N, M, N)
        sums = multiply(
            weights, x_smem, x_ptr, value, nested, nested_ptr, offset_ptr, code_ptr, bank, PAIRS, B, start, stop,
            BLOCK_SIZE, EVEN, BLOCK_M, CHUNK,
        )  # fmt: skip
        total = sums[0]
        tile_before, start_before = tile, start
        turn += 1
        if turn < turns:
            barrier()  # nobody reads the tokens
            tile, start, stop = _span(program, turn, rounds, steps)
            first_n = tile * BLOCK_N
            last_row = N - 1 - first_n
            w_ptrs = weight_ptr + first_n.to(gl.int64) * PAIRS + (gl.minimum(row, last_row) * PAIRS + byte)
            first_block, absmax_row = first_n.to(gl.int64) * B, gl.minimum(scale_row, last_row)
            weights = (w_smem, absmax_smem, w_ptrs, byte, absmax_ptr, first_block, absmax_row, quarter)
            value, nested = copy_first_weights(
                weights, nested_ptr, offset_ptr, code_ptr, PAIRS, B, start, stop, BLOCK_SIZE, EVEN
            )
            copy_first_tokens(x_smem, x_ptr, start, BLOCK_M)

    if start > 0:
        part = gl.maximum(program // gl.maximum(rest, 1) - 1, 0) if parts > 1 else gl.to_tensor(0)
        _store_part(total, partial_ptr, count_ptr, tile - first_cut, part, others)
    else:
        if stop < steps:  # the last turn, so that the addresses of others take no registers beside these loads
            total = _add_others(total, partial_ptr, count_ptr, tile - first_cut, others)
        store_tile(total, bias_ptr, out_ptr, first_m, tile * BLOCK_N, M, N)


def linear_4bit_rounds(x: Tensor, packed: Packed4, bias: Tensor | None, out: Tensor, config: WgmmaConfig) -> None:
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous.

    K % 64 == 0, block_size >= 64, x and weight aligned to 16 bytes; any M.
    """
    assert config.programs is not None, "a configuration of a stack"
    (m, _), (n, pairs) = x.shape, packed.weight.shape
    m_tiles, steps = ceil_div(m, config.block_m), ceil_div(pairs, STEP_BYTES.value)
    rounds = rounds_of(ceil_div(n, config.block_n), steps, max(1, config.programs // m_tiles))
    cut = m_tiles * rounds.rest if rounds.others else 0
    partial = torch.empty(cut * rounds.others * config.block_m * config.block_n, device=x.device)
    count = torch.empty(cut, dtype=torch.int32, device=x.device)
    x_tiles = tile_tokens(x, config.block_m, steps * 2 * STEP_BYTES.value, count)
    launch(
        _linear_4bit_rounds_kernel, (rounds.programs * m_tiles,),
        x_tiles, packed.weight, packed.absmax, bias, *packed.nested, partial, count, out,
        m, n, pairs, packed.absmax.shape[-1], *rounds, *code_tables(packed.quant_type, x.dtype),
        BLOCK_SIZE=packed.block_size, EVEN=pairs % STEP_BYTES.value == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, CHUNK=loops_of(config.block_m)[1],
        options={"num_warps": config.warps, "maxnreg": config.registers, "launch_pdl": True},
    )  # fmt: skip
