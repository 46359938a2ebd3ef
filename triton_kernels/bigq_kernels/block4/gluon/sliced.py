"""1 to 16 tokens times a 4-bit weight: K is shared by the warps of a program, and each keeps its tokens in registers.

- A slice is 192 or 256 elements of K. A warp has one or two of them, for all rows of its program. So its tokens are
  read once.
- The rows come in tiles of 16 for each warp that has the same slice. A warp copies its bytes of each row to a ring of
  its own (`rings`), and waits for no other warp until sums are added, every FLUSH tiles.
- Decoding and the order of K in a lane are those of `staged`: one read of a table decodes a byte.
- If K has more slices than the warps of a program have, several programs share K, and a kernel after this one adds
  their parts (`row_parts`).
- With a stack of weights, a program has the tiles of one weight after the other, and reads tokens for each (`runs`).

`staged` reads tokens from shared memory again for every tile, has a barrier in each step, and half as many warps.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bigq_kernels.block4.configs import SlicedConfig
from bigq_kernels.block4.gluon.lane_scales import lane_scales_of, load_lane_scales
from bigq_kernels.block4.gluon.operands import decode_codes
from bigq_kernels.block4.gluon.rings import (
    STAGE_NBYTES,
    commit_copies,
    copy_codes,
    place_in_ring,
    read_codes,
    shared_address,
    store_sums,
    wait_for_copies,
)
from bigq_kernels.block4.gluon.runs import count_entries, next_tile, place_of_tile, tokens_of_run
from bigq_kernels.block4.gluon.scales import barrier, load_scales, quarters, scale_layout, scales_of
from bigq_kernels.block4.gluon.slices import copy_layout, lane_layout, quarter_layout, sum_layout, token_layout
from bigq_kernels.block4.gluon.table import code_tables, fill_table
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.row_parts import add_parts_of_rows
from bigq_kernels.gpu import Gpu
from bigq_kernels.groups import group_tokens, most_tiles
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div

__all__ = ["linear_4bit_sliced"]

ROWS = gl.constexpr(16)  # of a tile of one warp


@gluon.constexpr_function
def _places(nbytes, place_nbytes):
    """How many places hold nbytes. Triton asks for more than 48 KiB only where its own part is more."""
    return -(-max(nbytes, 49168) // place_nbytes)


@gluon.jit
def _as_operand(x, OPERAND: gl.constexpr):
    """A quarter of the tokens [W, M, 64] in `token_layout` as an operand [W, 64, M]: each lane keeps what it has.

    Element 16c + 4j + 2h + e is number 16j + 8h + 2c + e of K, as it is in `decode_codes`.
    """
    W: gl.constexpr = x.shape[0]
    M: gl.constexpr = x.shape[1]
    x = x.reshape([W, M, 4, 4, 2, 2]).permute((0, 3, 4, 2, 5, 1)).reshape([W, 64, M])
    return gl.convert_layout(x, OPERAND, assert_trivial=True)


@gluon.jit
def _copy(
    stage, place, copies, OF_SPLIT, PAIRS, COVER: gl.constexpr, COVER_BYTES: gl.constexpr, SLICE_BYTES: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Start the copies of a unit, which is a tile and one of the slices of each warp.

    copies: (where in shared memory, weight_ptr, where behind the tile's first row, and at which byte of a split).
    """
    _, _, row, split = place
    copy_to, weight_ptr, copy_from, copy_byte = copies
    split_byte = split * OF_SPLIT * SLICE_BYTES
    stop_byte = gl.minimum(split_byte + OF_SPLIT * SLICE_BYTES, PAIRS)
    first_byte = split_byte + COVER * COVER_BYTES
    ptrs = weight_ptr + (row * PAIRS + first_byte) + copy_from
    nbytes = gl.where(copy_byte + first_byte < stop_byte, 16, 0)
    four_rows = gl.to_tensor(PAIRS).to(gl.int64) * 4
    copy_codes(copy_to + stage * STAGE_NBYTES, ptrs, four_rows, nbytes, MASKED)


@gluon.jit
def _load_scales(
    place, scales, OF_SPLIT, steps, B, COVER: gl.constexpr, K_WARPS: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    QUARTERS: gl.constexpr, EVEN: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """What `scales_of` needs for a unit. A warp without a slice there takes those of the last one.

    scales: (absmax_ptr, nested_ptr, row of a tile [N, 1], slice of a cover [N, 1], quarter of it [1, 4]).
    """
    _, _, row, split = place
    absmax_ptr, nested_ptr, scale_row, step, quarter = scales
    step = split * OF_SPLIT + COVER * K_WARPS + step
    step = gl.minimum(step, gl.minimum(split * OF_SPLIT + OF_SPLIT, steps) - 1)
    if SPREAD:
        return load_lane_scales(absmax_ptr, row * B, scale_row, step, quarter, B, nested_ptr, BLOCK_SIZE, QUARTERS)
    else:
        gl.static_assert(QUARTERS == 4)
        return load_scales(absmax_ptr, row * B, scale_row, step, quarter, B, nested_ptr, BLOCK_SIZE, EVEN)


@gluon.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _linear_4bit_sliced_kernel(
    x_ptr,  # [M, K]; if SINGLE [M / repeat, K]
    weight_ptr,  # [N, PAIRS] uint8: element 2i in the high nibble; of a stack [E, N, PAIRS], and so the next two
    absmax_ptr,  # [N, B] float32, or uint8 if nested
    bias_ptr,  # [N] or None
    nested_ptr,  # see load_scales
    offset_ptr,
    code_ptr,
    partial_ptr,  # [SPLIT, M, N] float32 for `row_parts`
    out_ptr,  # [M, N]
    route_ptr,  # of a stack, see `runs`; or None
    M,
    N,
    PAIRS,
    B,
    E,  # weights
    repeat,  # rows of the output that read one row of x
    t0, t1, t2, t3, t4, t5, t6, t7,  # code_tables
    BLOCK_SIZE: gl.constexpr,
    WHOLE: gl.constexpr,  # every warp has COVERS slices: no masks
    EVEN: gl.constexpr,  # K is whole slices
    SPREAD: gl.constexpr,  # the scales of a slice are loaded once for a warp, see `lane_scales`
    PDL: gl.constexpr,
    SINGLE: gl.constexpr,  # each row of the output is a tile of tokens
    BLOCK_M: gl.constexpr,
    QUARTERS: gl.constexpr,  # of 64 elements, of a slice
    COVERS: gl.constexpr,  # slices of a warp
    ABREAST: gl.constexpr,  # tiles of 16 rows that the warps have at once
    SPLIT: gl.constexpr,  # programs that share the slices of K
    STAGES: gl.constexpr,
    FLUSH: gl.constexpr,  # tiles whose sums are added together
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    K_WARPS: gl.constexpr = WARPS // ABREAST  # that share K, neighbours
    TILE: gl.constexpr = ROWS * ABREAST  # rows of the weight
    SLICE_BYTES: gl.constexpr = 32 * QUARTERS
    COVER_BYTES: gl.constexpr = K_WARPS * SLICE_BYTES
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    FLAT: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    W_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    COPY: gl.constexpr = copy_layout(WARPS)
    CODES: gl.constexpr = quarter_layout(WARPS)
    SCALES: gl.constexpr = lane_layout(WARPS) if SPREAD else scale_layout(ROWS * WARPS, WARPS)
    TOKENS: gl.constexpr = token_layout(WARPS, BLOCK_M)
    NUMEL: gl.constexpr = FLUSH * TILE * BLOCK_M
    SUMS: gl.constexpr = sum_layout(K_WARPS, WARPS, NUMEL)
    RINGS_AT: gl.constexpr = 2 * K_WARPS * NUMEL * 4
    MASKED: gl.constexpr = not WHOLE or QUARTERS < 4
    # Sums of tiles, in turns the first and the second; behind them the rings. It is all that Triton allocates, so it is
    # where its memory begins.
    sums = gl.allocate_shared_memory(
        gl.float32,
        [_places(RINGS_AT + WARPS * STAGES * STAGE_NBYTES, K_WARPS * NUMEL * 4), K_WARPS, NUMEL],
        gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]),
    )
    memory = shared_address(t0)
    steps = gl.cdiv(PAIRS, SLICE_BYTES)
    of_split = gl.cdiv(steps, SPLIT)  # slices
    n_tiles = N // TILE
    stack = (route_ptr, n_tiles, N, E)
    if route_ptr is None:
        # The programs of a split are neighbours. Its tiles are cut into equal shares.
        split = gl.program_id(0) % SPLIT
        share, shares = gl.program_id(0) // SPLIT, gl.num_programs(0) // SPLIT
        tiles = n_tiles
    else:
        table, bank = fill_table(t0, t1, t2, t3, t4, t5, t6, t7)
        if PDL:
            gdc_wait()
        share, shares = gl.program_id(0), gl.num_programs(0)
        tiles = count_entries(route_ptr, M, SINGLE) * (SPLIT * n_tiles)
    each, more = tiles // shares, tiles % shares
    first = share * each + gl.minimum(share, more)
    stop = first + each + (share < more).to(gl.int32)
    if route_ptr is None:
        place = first, gl.to_tensor(0), (first * TILE).to(gl.int64), split
        first_run, runs = 0, 1
    else:
        if first >= stop:
            return
        place = place_of_tile(first, stack, TILE, SPLIT, SINGLE)
        first_run, runs = first // n_tiles, (stop - 1) // n_tiles - first // n_tiles + 1

    # Row 16 * w + r of what a program reads is row r of the tile and the slice of warp w.
    row = gl.arange(0, ROWS * WARPS, gl.SliceLayout(1, COPY))[:, None]
    piece = gl.arange(0, 8, gl.SliceLayout(0, COPY))[None, :]
    copy_byte = row // ROWS % K_WARPS * SLICE_BYTES + piece * 16
    copies = (
        memory + place_in_ring(RINGS_AT, row // ROWS * ROWS + row % 4, piece * 16, STAGES),
        weight_ptr,
        (row // ROWS // K_WARPS * ROWS + row % 4) * PAIRS + copy_byte,
        gl.where(piece * 16 < SLICE_BYTES, copy_byte, PAIRS),  # behind every stop
    )
    copied = place
    for i in gl.static_range(STAGES - 1):
        if copied[0] < stop:
            _copy(i, copied, copies, of_split, PAIRS, i % COVERS, COVER_BYTES, SLICE_BYTES, MASKED)
        commit_copies(t0)
        if i % COVERS == COVERS - 1:
            copied = next_tile(copied, stop, stack, TILE, SPLIT, SINGLE)
    if route_ptr is None:
        table, bank = fill_table(t0, t1, t2, t3, t4, t5, t6, t7)

    scale_row = gl.arange(0, ROWS * WARPS, gl.SliceLayout(1, SCALES))[:, None]
    quarter = gl.arange(0, 4, gl.SliceLayout(0, SCALES))[None, :]
    row_of_tile = scale_row // ROWS // K_WARPS * ROWS + scale_row % ROWS
    scales = (absmax_ptr, nested_ptr, row_of_tile, scale_row // ROWS % K_WARPS, quarter)
    scaled = place
    value, nested = _load_scales(scaled, scales, of_split, steps, B, 0, K_WARPS, BLOCK_SIZE, QUARTERS, EVEN, SPREAD)
    if PDL and route_ptr is None:
        gdc_wait()  # for the tokens
        gdc_launch_dependents()

    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, TOKENS)))[:, None, None]
    token = gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(2, TOKENS)))[None, :, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, TOKENS)))[None, None, :]
    column = warp % K_WARPS * (2 * SLICE_BYTES) + column
    code_row = gl.arange(0, ROWS * WARPS, gl.SliceLayout(1, CODES))[:, None]
    code_byte = gl.arange(0, 32, gl.SliceLayout(0, CODES))[None, :]
    read_from = gl.tuple([])
    for q in gl.static_range(QUARTERS):
        at = place_in_ring(RINGS_AT, code_row // ROWS * ROWS + code_row % 8, 32 * q + code_byte // 8 * 8, STAGES)
        read_from += (memory + at,)
    of_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
    n = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, MMA)))[None, None, :]
    sum_to = memory + (of_warp % K_WARPS * NUMEL + m * (FLUSH * TILE) + of_warp // K_WARPS * ROWS + n) * 4
    out_m = gl.arange(0, NUMEL, gl.SliceLayout(0, SUMS)) // (FLUSH * TILE)
    out_n = gl.arange(0, NUMEL, gl.SliceLayout(0, SUMS)) % (FLUSH * TILE)

    zero = gl.full([WARPS, ROWS, BLOCK_M], 0.0, gl.float32, MMA)
    stage = 0
    turn = 0
    begin = first
    for run in range(0, runs):  # without a stack there is one, and no loop
        if route_ptr is None:
            end, first_n, run_split = stop, begin * TILE, split
            weight, first_x, first_out, x_rows, out_rows = 0, gl.to_tensor(0).to(gl.int64), gl.to_tensor(0), M, M
        else:
            end = gl.minimum(stop, (first_run + run + 1) * n_tiles)
            first_n, run_split = begin % n_tiles * TILE, (first_run + run) % SPLIT
            weight, first_x, first_out, x_rows, out_rows = tokens_of_run(
                first_run + run, stack, repeat, BLOCK_M, SPLIT, SINGLE
            )
        first_column = run_split * of_split * (2 * SLICE_BYTES)
        stop_column = gl.minimum(first_column + of_split * (2 * SLICE_BYTES), 2 * PAIRS)
        operands = gl.tuple([])
        for i in gl.static_range(COVERS * QUARTERS):
            k = first_column + i // QUARTERS * (2 * COVER_BYTES) + i % QUARTERS * 64 + column
            x_ptrs = x_ptr + first_x * (PAIRS * 2) + (token * (PAIRS * 2) + k)
            x = gl.load(x_ptrs, mask=(token < x_rows) & (k < stop_column), other=0.0)
            operands += (_as_operand(x, gl.DotOperandLayout(1, MMA, 2)),)
        if run == 0:
            barrier()  # for the table

        added = begin  # tiles
        for tile in range(begin, end):
            total = zero
            for i in gl.static_range(COVERS):
                if SPREAD:
                    if (i == COVERS - 1) & (tile + 1 < stop):
                        scaled = next_tile(scaled, stop, stack, TILE, SPLIT, SINGLE)
                    next_value, next_nested = _load_scales(
                        scaled, scales, of_split, steps, B, (i + 1) % COVERS, K_WARPS, BLOCK_SIZE, QUARTERS, EVEN,
                        SPREAD,
                    )  # fmt: skip
                wait_for_copies(STAGES - 2, t0)
                if copied[0] < stop:
                    filled = gl.where(stage == 0, STAGES - 1, stage - 1)  # every lane has read it
                    _copy(
                        filled, copied, copies, of_split, PAIRS, (i + STAGES - 1) % COVERS, COVER_BYTES, SLICE_BYTES,
                        MASKED,
                    )  # fmt: skip
                commit_copies(t0)
                if (i + STAGES) % COVERS == 0:
                    copied = next_tile(copied, stop, stack, TILE, SPLIT, SINGLE)
                if SPREAD:
                    absmax = scales_of(value, nested, nested_ptr, offset_ptr, code_ptr)
                    value, nested = next_value, next_nested
                else:
                    absmax = quarters(scales_of(value, nested, nested_ptr, offset_ptr, code_ptr))
                    if (i == COVERS - 1) & (tile + 1 < stop):
                        scaled = next_tile(scaled, stop, stack, TILE, SPLIT, SINGLE)
                    value, nested = _load_scales(
                        scaled, scales, of_split, steps, B, (i + 1) % COVERS, K_WARPS, BLOCK_SIZE, QUARTERS, EVEN,
                        SPREAD,
                    )  # fmt: skip
                packed = gl.tuple([])
                for q in gl.static_range(QUARTERS):
                    packed += (read_codes(read_from[q] + stage * STAGE_NBYTES),)
                for q in gl.static_range(QUARTERS):
                    w = decode_codes(packed[q], table, bank, DTYPE, gl.DotOperandLayout(0, FLAT, 2))
                    w = gl.convert_layout(w.reshape([WARPS, ROWS, 64]), W_OPERAND, assert_trivial=True)
                    if SPREAD:
                        scale = lane_scales_of(absmax, q, BLOCK_M, MMA)
                    else:
                        scale = absmax[q].reshape([WARPS, ROWS])
                        scale = gl.convert_layout(scale, gl.SliceLayout(2, MMA), assert_trivial=True)[:, :, None]
                    # once a block, and the decoded codes stay exact
                    total += mma_v2(w, operands[QUARTERS * i + q], zero) * scale
                stage = gl.where(stage == STAGES - 1, 0, stage + 1)
            store_sums(sum_to + (turn * (K_WARPS * NUMEL) + (tile - added) * TILE) * 4, total)
            if (tile - added == FLUSH - 1) | (tile == end - 1):
                barrier()
                result = gl.sum(sums.index(turn).load(SUMS), axis=0)
                if SINGLE:
                    result = gl.where(out_m < x_rows, result, 0.0)  # not 0 times a scale, which may be infinite
                in_tiles = (out_m < out_rows) & (out_n < (tile + 1 - added) * TILE)
                n_row = first_n + (added - begin) * TILE + out_n
                out_place = (first_out + out_m.to(gl.int64)) * N + n_row
                if SPLIT == 1:
                    if bias_ptr is not None:
                        in_bias = in_tiles & (out_m < x_rows)  # none for a row of no weight
                        result += gl.load(bias_ptr + weight * N + n_row, mask=in_bias, other=0.0).to(gl.float32)
                    gl.store(out_ptr + out_place, result.to(DTYPE), mask=in_tiles)
                else:
                    gl.store(partial_ptr + (run_split.to(gl.int64) * M * N + out_place), result, mask=in_tiles)
                turn = 1 - turn  # so that a warp does not overwrite what another adds
                added = tile + 1
        begin = end


def linear_4bit_sliced(
    x: Tensor, packed: Packed4, bias: Tensor | None, out: Tensor, config: SlicedConfig, route: Tensor | None = None
) -> None:
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous.

    M <= 16, K % 32 == 0, N % (16 * config.abreast) == 0, block_size >= 64, x and weight aligned to 16 bytes.

    With `route`, packed is [E, N, K/2] and bias [E, N]. Then x has any number of rows, sorted by weight, and `route` is
    where those of each weight end, int32 [E]. If config.single, row i of out [S, N] is row i // (S / M) of x times the
    weight route[i], and 0 if there is no such weight.
    """
    s, (n, pairs), weights = x.shape[0], packed.weight.shape[-2:], 1
    tiles, steps = n // (ROWS.value * config.abreast), ceil_div(pairs, 32 * config.quarters)
    gpu, is_split, entries = Gpu.of(x.device), config.split > 1, s
    if route is None:
        programs = min(config.programs // config.split, tiles) * config.split
    else:
        weights = len(packed.weight)
        if config.single:
            entries = s = len(route)
        else:
            entries = most_tiles(s, weights, config.block_m)
            no_counts = torch.empty(0, dtype=torch.int32, device=x.device)
            route = group_tokens(route, weights, config.block_m, no_counts, out)
        programs = min(config.programs, entries * config.split * tiles)
    partial = torch.empty(is_split * config.split, s, n, dtype=torch.float32, device=x.device)
    even = pairs % (32 * config.quarters) == 0
    whole = even and steps == config.split * config.warps // config.abreast * config.covers
    # Every lane loads its own scales, or one for four. Where a warp has two slices: 153 and 146 us for 16 tokens of
    # Mixtral's gate_up, nested 48 and 40 for a token of 28672 x 8192, but 40 and 43 if not nested. With one slice the
    # next scales are moved where they are read, which waits for them: nested 12.0 and 12.7 for 4 tokens of 14336 x 4096
    # (H200). Only the whole scales of a slice of 256 are one load.
    nested = packed.nested[0] is not None
    spread = route is not None or config.quarters < 4 or not even or (config.covers > 1 and nested)
    launch(
        _linear_4bit_sliced_kernel, (programs,),
        x, packed.weight, packed.absmax, bias, *packed.nested, partial, out, route, s, n, pairs,
        packed.absmax.shape[-1], weights, s // len(x), *code_tables(packed.quant_type, x.dtype),
        BLOCK_SIZE=packed.block_size, WHOLE=whole, EVEN=even, SPREAD=spread,
        PDL=gpu.pdl, SINGLE=config.single,
        BLOCK_M=config.block_m, QUARTERS=config.quarters, COVERS=config.covers,
        ABREAST=config.abreast, SPLIT=config.split, STAGES=config.stages, FLUSH=config.flush,
        options={"num_warps": config.warps, "maxnreg": config.registers, "launch_pdl": gpu.pdl},
    )  # fmt: skip
    if is_split:
        add_parts_of_rows(partial, bias, out, config.split, route, weights, entries, config.block_m, config.single)
