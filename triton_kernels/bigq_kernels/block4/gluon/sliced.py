"""1 to 16 tokens times a 4-bit weight: K is shared by the warps of a program, and each keeps its tokens in registers.

- A slice is 256 elements of K. A warp has one or two of them, for all rows of its program. So its tokens are read once.
- The rows come in tiles of 16. A warp copies its 128 bytes of each row to a ring of its own (`rings`), and waits for no
  other warp until sums are added, every FLUSH tiles.
- Decoding and the order of K in a lane are those of `staged`: one read of a table decodes a byte.
- If K has more slices than the warps of a program have, several programs share K, and a kernel after this one adds
  their parts (`parts`).

`staged` reads tokens from shared memory again for every tile, has a barrier in each step, and half as many warps.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bigq_kernels.block4.configs import SlicedConfig
from bigq_kernels.block4.gluon.operands import code_layout, decode_codes
from bigq_kernels.block4.gluon.rings import (
    STAGE_NBYTES,
    commit_copies,
    copy_codes,
    read_codes,
    shared_address,
    store_sums,
    wait_for_copies,
)
from bigq_kernels.block4.gluon.scales import barrier, load_scales, quarters, scale_layout, scales_of
from bigq_kernels.block4.gluon.table import code_tables, fill_table
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.parts import add_parts_of_tiles
from bigq_kernels.gpu import Gpu
from bigq_kernels.launch import launch

__all__ = ["linear_4bit_sliced"]

ROWS = gl.constexpr(16)  # of a tile
STEP_BYTES = gl.constexpr(128)  # of a row, a slice


@gluon.constexpr_function
def _bits(size, dimension, rank):
    """The bases of a linear layout that count to `size` along a dimension."""
    return [[(1 << i) * (d == dimension) for d in range(rank)] for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def _copy_layout(warps):
    """[16 * warps, 8] pieces of 16 bytes: a warp has the 16 rows that it copies, its lanes 4 of them at a time."""
    lanes = _bits(8, 1, 2) + _bits(4, 0, 2)
    of_warps = [[16 * base, 0] for base, _ in _bits(warps, 0, 2)]
    return gl.DistributedLinearLayout(
        reg_bases=[[4, 0], [8, 0]], lane_bases=lanes, warp_bases=of_warps, block_bases=[], shape=[16 * warps, 8]
    )


@gluon.constexpr_function
def _token_layout(warps, block_m):
    """[warps, block_m, 256] elements: lane (g, c) has 16c to 16c + 15 of each 64 of token g, and of g + 8."""
    later_tokens = [[0, 8, 0]] if block_m > 8 else []
    return gl.DistributedLinearLayout(
        reg_bases=[*_bits(16, 2, 3), [0, 0, 64], [0, 0, 128], *later_tokens],
        lane_bases=[[0, 0, 16], [0, 0, 32], *_bits(8, 1, 3)],
        warp_bases=_bits(warps, 0, 3),
        block_bases=[],
        shape=[warps, block_m, 256],
    )


@gluon.constexpr_function
def _sum_layout(warps, numel):
    """[warps, numel] partial sums: a thread has all that are added to one."""
    places = _bits(numel, 1, 2) + [[0, 0]] * 10
    of_warps = warps.bit_length() - 1
    used = max(numel.bit_length() - 1, 5 + of_warps)
    return gl.DistributedLinearLayout(
        reg_bases=_bits(warps, 0, 2) + places[5 + of_warps : used],
        lane_bases=places[:5],
        warp_bases=places[5 : 5 + of_warps],
        block_bases=[],
        shape=[warps, numel],
    )


@gluon.constexpr_function
def _places(nbytes, place_nbytes):
    """How many places hold nbytes. Triton asks for more than 48 KiB only where its own part is more."""
    return -(-max(nbytes, 49168) // place_nbytes)


@gluon.jit
def _as_operand(x, OPERAND: gl.constexpr):
    """A quarter of the tokens [W, M, 64] in `_token_layout` as an operand [W, 64, M]: each lane keeps what it has.

    Element 16c + 4j + 2h + e is number 16j + 8h + 2c + e of K, as it is in `decode_codes`.
    """
    W: gl.constexpr = x.shape[0]
    M: gl.constexpr = x.shape[1]
    x = x.reshape([W, M, 4, 4, 2, 2]).permute((0, 3, 4, 2, 5, 1)).reshape([W, 64, M])
    return gl.convert_layout(x, OPERAND, assert_trivial=True)


@gluon.jit
def _as_operands(x, OPERAND: gl.constexpr):
    """Tokens [W, M, 256] in `_token_layout` as the operands of four quarters."""
    W: gl.constexpr = x.shape[0]
    M: gl.constexpr = x.shape[1]
    even, odd = gl.split(x.reshape([W, M, 2, 2, 64]).permute((0, 1, 4, 2, 3)))
    q0, q2 = gl.split(even)
    q1, q3 = gl.split(odd)
    return _as_operand(q0, OPERAND), _as_operand(q1, OPERAND), _as_operand(q2, OPERAND), _as_operand(q3, OPERAND)


@gluon.jit
def _place_in_ring(row, byte, BEGIN: gl.constexpr, STAGES: gl.constexpr):
    """Where a byte of the first stage lies in shared memory: row 16 * w + r is row r of the ring of warp w.

    Units of 32 bytes are swapped by the row, so that the reads of neighbouring rows meet no bank twice.
    """
    ring = BEGIN + row // ROWS * (STAGES * STAGE_NBYTES)
    return ring + row % ROWS * STEP_BYTES + (((byte // 32) ^ (row % 4)) * 32 + byte % 32)


@gluon.jit
def _copy(
    unit, stage, copy_to, weight_ptr, copy_from, step, stop_step, PAIRS, WARPS: gl.constexpr, COVERS: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """Start the copies of a unit, which is a tile and one of the COVERS slices of each warp."""
    cover = unit % COVERS
    ptrs = weight_ptr + (gl.to_tensor(unit) // COVERS * ROWS).to(gl.int64) * PAIRS + cover * (WARPS * STEP_BYTES)
    nbytes = gl.where(step + cover * WARPS < stop_step, 16, 0)
    four_rows = gl.to_tensor(PAIRS).to(gl.int64) * 4
    copy_codes(copy_to + stage * STAGE_NBYTES, ptrs + copy_from, four_rows, nbytes, not WHOLE)


@gluon.jit
def _load_scales(
    unit, absmax_ptr, nested_ptr, row, quarter, step, stop_step, first_tile, tiles, B, WARPS: gl.constexpr,
    COVERS: gl.constexpr, BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """What `scales_of` needs for a unit, or for the last one behind it."""
    unit = gl.minimum(unit, tiles * COVERS - 1)
    first = ((first_tile + unit // COVERS) * ROWS).to(gl.int64) * B
    step = gl.minimum(step + unit % COVERS * WARPS, stop_step - 1)
    return load_scales(absmax_ptr, first, row % ROWS, step, quarter, B, nested_ptr, BLOCK_SIZE, True)


@gluon.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _linear_4bit_sliced_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, PAIRS] uint8: element 2i in the high nibble
    absmax_ptr,  # [N, B] float32, or uint8 if nested
    bias_ptr,  # [N] or None
    nested_ptr,  # see load_scales
    offset_ptr,
    code_ptr,
    partial_ptr,  # [N / 16, SPLIT, 2, 16, BLOCK_M] float32 for `parts`, which reads the first of each two here
    out_ptr,  # [M, N]
    M,
    N,
    PAIRS,
    B,
    t0, t1, t2, t3, t4, t5, t6, t7,  # code_tables
    BLOCK_SIZE: gl.constexpr,
    WHOLE: gl.constexpr,  # every warp has COVERS slices: no masks
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    COVERS: gl.constexpr,  # slices of a warp
    SPLIT: gl.constexpr,  # programs that share the slices of K
    STAGES: gl.constexpr,
    FLUSH: gl.constexpr,  # tiles whose sums are added together
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    FLAT: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    W_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    COPY: gl.constexpr = _copy_layout(WARPS)
    CODES: gl.constexpr = code_layout(ROWS * WARPS, WARPS)
    SCALES: gl.constexpr = scale_layout(ROWS * WARPS, WARPS)
    TOKENS: gl.constexpr = _token_layout(WARPS, BLOCK_M)
    NUMEL: gl.constexpr = FLUSH * ROWS * BLOCK_M
    SUMS: gl.constexpr = _sum_layout(WARPS, NUMEL)
    RINGS_AT: gl.constexpr = 2 * WARPS * NUMEL * 4
    # Sums of tiles, in turns the first and the second; behind them the rings. It is all that Triton allocates, so it is
    # where its memory begins.
    sums = gl.allocate_shared_memory(
        gl.float32,
        [_places(RINGS_AT + WARPS * STAGES * STAGE_NBYTES, WARPS * NUMEL * 4), WARPS, NUMEL],
        gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]),
    )
    memory = shared_address(t0)

    # The programs of a split are neighbours. Its tiles are cut into equal shares.
    steps = PAIRS // STEP_BYTES
    of_split = gl.cdiv(steps, SPLIT)  # slices
    split = gl.program_id(0) % SPLIT
    first_step = split * of_split
    stop_step = gl.minimum(first_step + of_split, steps)
    share, shares = gl.program_id(0) // SPLIT, gl.num_programs(0) // SPLIT
    each, more = N // ROWS // shares, N // ROWS % shares
    first_tile = share * each + gl.minimum(share, more)
    tiles = each + (share < more).to(gl.int32)

    # Row 16 * w + r of what a program reads is row r of the tile and the slice of warp w.
    row = gl.arange(0, ROWS * WARPS, gl.SliceLayout(1, COPY))[:, None]
    piece = gl.arange(0, 8, gl.SliceLayout(0, COPY))[None, :]
    copy_step = first_step + row // ROWS
    copy_from = row % 4 * PAIRS + copy_step * STEP_BYTES + piece * 16
    copy_to = memory + _place_in_ring(row // ROWS * ROWS + row % 4, piece * 16, RINGS_AT, STAGES)
    weight_ptr += (first_tile * ROWS).to(gl.int64) * PAIRS
    for i in gl.static_range(STAGES - 1):
        if i < tiles * COVERS:
            _copy(i, i, copy_to, weight_ptr, copy_from, copy_step, stop_step, PAIRS, WARPS, COVERS, WHOLE)
        commit_copies(t0)
    table, bank = fill_table(t0, t1, t2, t3, t4, t5, t6, t7)

    scale_row = gl.arange(0, ROWS * WARPS, gl.SliceLayout(1, SCALES))[:, None]
    quarter = gl.arange(0, 4, gl.SliceLayout(0, SCALES))[None, :]
    scale_step = first_step + scale_row // ROWS
    value, nested = _load_scales(
        0, absmax_ptr, nested_ptr, scale_row, quarter, scale_step, stop_step, first_tile, tiles, B, WARPS, COVERS,
        BLOCK_SIZE,
    )  # fmt: skip
    if PDL:
        gdc_wait()  # for the tokens
        gdc_launch_dependents()

    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, TOKENS)))[:, None, None]
    token = gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(2, TOKENS)))[None, :, None]
    column = gl.arange(0, 2 * STEP_BYTES, gl.SliceLayout(0, gl.SliceLayout(1, TOKENS)))[None, None, :]
    operands = ()
    for i in gl.static_range(COVERS):
        step = first_step + i * WARPS + warp
        x_ptrs = x_ptr + (token * (PAIRS * 2) + step * (2 * STEP_BYTES) + column)
        x = gl.load(x_ptrs, mask=(token < M) & (step < stop_step) & (column >= 0), other=0.0)  # the last for the shape
        operands += _as_operands(x, gl.DotOperandLayout(1, MMA, 2))
    barrier()  # for the table

    code_row = gl.arange(0, ROWS * WARPS, gl.SliceLayout(1, CODES))[:, None]
    code_byte = gl.arange(0, STEP_BYTES, gl.SliceLayout(0, CODES))[None, :]
    read_from = memory + _place_in_ring(code_row // ROWS * ROWS + code_row % 8, code_byte // 8 * 8, RINGS_AT, STAGES)
    of_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
    n = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, MMA)))[None, None, :]
    sum_to = memory + (of_warp * NUMEL + m * (FLUSH * ROWS) + n) * 4
    out_m = gl.arange(0, NUMEL, gl.SliceLayout(0, SUMS)) // (FLUSH * ROWS)
    out_n = gl.arange(0, NUMEL, gl.SliceLayout(0, SUMS)) % (FLUSH * ROWS)

    zero = gl.full([WARPS, ROWS, BLOCK_M], 0.0, gl.float32, MMA)
    unit = 0  # a slice of a tile
    stage = 0
    turn = 0
    added = 0  # tiles
    for tile in range(0, tiles):
        total = zero
        for i in gl.static_range(COVERS):
            wait_for_copies(STAGES - 2, t0)
            if unit + STAGES - 1 < tiles * COVERS:
                filled = gl.where(stage == 0, STAGES - 1, stage - 1)  # every lane has read it
                _copy(
                    unit + STAGES - 1, filled, copy_to, weight_ptr, copy_from, copy_step, stop_step, PAIRS, WARPS,
                    COVERS, WHOLE,
                )  # fmt: skip
            commit_copies(t0)
            absmax = quarters(scales_of(value, nested, nested_ptr, offset_ptr, code_ptr))
            unit += 1
            value, nested = _load_scales(
                unit, absmax_ptr, nested_ptr, scale_row, quarter, scale_step, stop_step, first_tile, tiles, B, WARPS,
                COVERS, BLOCK_SIZE,
            )  # fmt: skip
            packed = quarters(read_codes(read_from + stage * STAGE_NBYTES))
            for q in gl.static_range(4):
                w = decode_codes(packed[q], table, bank, DTYPE, gl.DotOperandLayout(0, FLAT, 2))
                w = gl.convert_layout(w.reshape([WARPS, ROWS, 64]), W_OPERAND, assert_trivial=True)
                scale = absmax[q].reshape([WARPS, ROWS])
                scale = gl.convert_layout(scale, gl.SliceLayout(2, MMA), assert_trivial=True)[:, :, None]
                total += mma_v2(w, operands[4 * i + q], zero) * scale  # once a block, and the decoded codes stay exact
            stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        store_sums(sum_to + (turn * (WARPS * NUMEL) + (tile - added) * ROWS) * 4, total)
        if (tile - added == FLUSH - 1) | (tile == tiles - 1):
            barrier()
            result = gl.sum(sums.index(turn).load(SUMS), axis=0)
            in_tiles = (out_m < M) & (out_n < (tile + 1 - added) * ROWS)
            n_row = (first_tile + added) * ROWS + out_n
            if SPLIT == 1:
                if bias_ptr is not None:
                    result += gl.load(bias_ptr + n_row, mask=in_tiles, other=0.0).to(gl.float32)
                gl.store(out_ptr + (out_m.to(gl.int64) * N + n_row), result.to(DTYPE), mask=in_tiles)
            else:
                slot = (n_row // ROWS * SPLIT + split).to(gl.int64) * (2 * ROWS * BLOCK_M)
                gl.store(partial_ptr + (slot + n_row % ROWS * BLOCK_M + out_m), result, mask=in_tiles)
            turn = 1 - turn  # so that a warp does not overwrite what another adds
            added = tile + 1


def linear_4bit_sliced(x: Tensor, packed: Packed4, bias: Tensor | None, out: Tensor, config: SlicedConfig) -> None:
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous.

    M <= 16, K % 256 == 0, N % 16 == 0, block_size >= 64, x and weight aligned to 16 bytes.
    """
    m, (n, pairs) = x.shape[0], packed.weight.shape
    tiles, steps = n // ROWS.value, pairs // STEP_BYTES.value
    is_split = config.split > 1
    pdl = Gpu.of(x.device).pdl
    partial = torch.empty(is_split * tiles * config.split * 2 * ROWS.value * config.block_m, device=x.device)
    launch(
        _linear_4bit_sliced_kernel, (min(config.programs // config.split, tiles) * config.split,),
        x, packed.weight, packed.absmax, bias, *packed.nested, partial, out, m, n, pairs, packed.absmax.shape[-1],
        *code_tables(packed.quant_type, x.dtype),
        BLOCK_SIZE=packed.block_size, WHOLE=steps == config.split * config.warps * config.covers, PDL=pdl,
        BLOCK_M=config.block_m, COVERS=config.covers, SPLIT=config.split, STAGES=config.stages, FLUSH=config.flush,
        options={"num_warps": config.warps, "maxnreg": config.registers, "launch_pdl": pdl},
    )  # fmt: skip
    if is_split:
        tile = ROWS.value, config.block_m
        add_parts_of_tiles(partial, bias, out, config.split, tiles * config.split, tile, pdl)
