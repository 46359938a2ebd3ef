"""3 to 32 tokens times a 4-bit weight, staged in shared memory and decoded into tensor-core operands, in Gluon.

- A stage holds 128 bytes of each row, which is a line of memory and 256 elements of K, and the tokens they meet, copied
  by cp.async. Triton's own pipeline of the same product waits for codes in registers.
- Which element of K comes first is free as long as both operands agree. A lane of the MMA takes 8 consecutive bytes of
  a row, 16 elements. So its codes are one read of 8 bytes, and its tokens two of 16 bytes that are operands as stored.
- One read of a table decodes a byte (`table`). absmax scales the sum of a block.
- The steps of all tiles, in their order, are cut into equal shares, one for each program that fits at once. The parts
  of a tile that several programs share are added in their order: by a kernel after this one (`parts`), or with a stack
  of weights by the last program to finish the tile.

Gluon promises no stability between releases of Triton: `choose` takes this kernel with those in GLUON_RELEASES, and
`mma` with others. Gluon has no interpreter, so values are tested on a GPU only.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bigq_kernels.block4.configs import StagedConfig
from bigq_kernels.block4.gluon.groups import place_in_group
from bigq_kernels.block4.gluon.operands import code_layout, decode_codes
from bigq_kernels.block4.gluon.scales import (
    add_parts,
    barrier,
    copy_async,
    load_scales,
    quarters,
    reinterpret,
    scale_layout,
    scales_of,
)
from bigq_kernels.block4.gluon.table import code_tables, fill_table
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.parts import add_parts_of_tiles
from bigq_kernels.gpu import Gpu
from bigq_kernels.groups import group_tokens, most_tiles
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div

__all__ = ["linear_4bit_staged"]

STEP_BYTES = gl.constexpr(128)  # of a row in one stage


@gluon.constexpr_function
def _token_layout(block_m):
    """[64, block_m] as the MMA reads what lies there as [block_m, 64]: 16 elements of a lane are contiguous.

    The last column basis holds the swizzle: odd tokens swap neighbouring units of 16 bytes.
    """
    bases = [[1, 0], [8, 0], [16, 0], [32, 0], [2, 0], [4, 0], [32, 1]]
    return gl.SharedLinearLayout(offset_bases=bases + [[0, 2 << i] for i in range(block_m.bit_length() - 2)])


@gluon.jit
def _place(groups_ptr, tile, n_tiles, N, M, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(weight, its first row of the tile, first row of x, rows of the tile) of a tile of results."""
    if groups_ptr is None:
        weight, n_tile, first_m, rows = gl.to_tensor(0).to(gl.int64), tile, gl.to_tensor(0).to(gl.int64), M
    else:
        weight, n_tile, _, first_m, rows = place_in_group(groups_ptr, tile, n_tiles, BLOCK_M)
    return weight, n_tile * BLOCK_N, first_m, rows


@gluon.jit
def _copy_weights(stage, step, w_smem, weight_ptr, place, row, byte, N, PAIRS, EVEN: gl.constexpr):
    """Start the copies of STEP_BYTES of every row of a tile. Rows past N read the last one; none is stored."""
    weight, first_n, _, _ = place
    w_ptrs = weight_ptr + ((weight * N + first_n) * PAIRS + step * STEP_BYTES)
    w_ptrs += gl.minimum(row, N - 1 - first_n) * PAIRS + byte
    if EVEN:
        copy_async(w_smem.index(stage), w_ptrs, eviction_policy="evict_first")
    else:
        copy_async(w_smem.index(stage), w_ptrs, mask=byte + (row * 0 + step * STEP_BYTES) < PAIRS)


@gluon.jit
def _copy_tokens(stage, step, x_smem, x_ptr, place, token, column, PAIRS, EVEN: gl.constexpr):
    """Start the copies of the tokens that a step's weights meet."""
    _, _, first_m, rows = place
    x_ptrs = x_ptr + (first_m * (PAIRS * 2) + step * (2 * STEP_BYTES)) + (token * (PAIRS * 2) + column)
    in_m = (token < rows) & (column >= 0)  # the second for the shape
    if not EVEN:
        in_m = in_m & (column + step * (2 * STEP_BYTES) < PAIRS * 2)
    copy_async(x_smem.index(stage), x_ptrs, mask=in_m)


@gluon.jit
def _next(tile, step, place, steps, is_more, groups_ptr, n_tiles, N, M, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(tile, step, place of the tile) after these. Behind the last unit the place stays what it is."""
    step += 1
    if step == steps:
        tile += 1
        step = 0
        if is_more:
            place = _place(groups_ptr, tile, n_tiles, N, M, BLOCK_M, BLOCK_N)
    return tile, step, place


@gluon.jit
def _program_of(unit, each, more):
    """The program that has a unit: the first `more` programs have each + 1 of them, the others `each`."""
    longer = more * (each + 1)
    return gl.where(unit < longer, unit // (each + 1), more + (unit - longer) // gl.maximum(each, 1))


@gluon.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _linear_4bit_staged_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, PAIRS] uint8: element 2i in the high nibble
    absmax_ptr,  # [N, B] float32, or uint8 if nested
    bias_ptr,  # [N] or None
    nested_ptr,  # see load_scales
    offset_ptr,
    code_ptr,
    partial_ptr,  # [programs, 2, BLOCK_N, BLOCK_M] float32
    count_ptr,  # of a stack, [tiles] int32, zeroed by the kernel before: how many programs have finished the tile
    out_ptr,  # [M, N]
    groups_ptr,  # of `group_tokens` for a stack of weights, or None
    M,
    N,
    PAIRS,
    B,
    t0, t1, t2, t3, t4, t5, t6, t7,  # code_tables
    BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr,  # K divides into whole steps: no masks in the loop
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    W_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    X_OPERAND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    SCALES: gl.constexpr = scale_layout(BLOCK_N, WARPS)
    # Triton asks for more than 48 KiB only where its own part is more, and the table is beside it.
    LEAST: gl.constexpr = (49168 - STAGES * BLOCK_M * 512) // (BLOCK_N * STEP_BYTES) + 1
    w_smem = gl.allocate_shared_memory(
        gl.uint8,
        [STAGES if STAGES > LEAST else LEAST, BLOCK_N, STEP_BYTES],
        gl.SwizzledSharedLayout(32, 1, 4, order=[1, 0]),
    )
    x_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 4 * BLOCK_M, 64], gl.SwizzledSharedLayout(8, 1, 2, order=[1, 0]))
    x_blocks = reinterpret(x_smem, DTYPE, [STAGES * 4, 64, BLOCK_M], _token_layout(BLOCK_M))

    table, bank = fill_table(t0, t1, t2, t3, t4, t5, t6, t7)
    row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, W_COPY))[:, None]
    byte = gl.arange(0, STEP_BYTES, gl.SliceLayout(0, W_COPY))[None, :]
    part = gl.arange(0, 4 * BLOCK_M, gl.SliceLayout(1, X_COPY))[:, None]  # 64 elements of a token
    token = part % BLOCK_M
    column = part // BLOCK_M * 64 + gl.arange(0, 64, gl.SliceLayout(0, X_COPY))[None, :]
    scale_row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, SCALES))[:, None]
    quarter = gl.arange(0, 4, gl.SliceLayout(0, SCALES))[None, :]
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA))[None, :]
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))[:, None]

    # The steps of all tiles, in their order, are cut into equal shares. So every multiprocessor has the same work, and
    # a tile belongs to one program or to several neighbours.
    steps = gl.cdiv(PAIRS, STEP_BYTES)
    n_tiles = gl.cdiv(N, BLOCK_N)
    tiles = n_tiles
    if groups_ptr is not None:
        if PDL:
            gdc_wait()
        tiles *= gl.load(groups_ptr + 4)
    program, programs = gl.program_id(0), gl.num_programs(0)
    each, more = tiles * steps // programs, tiles * steps % programs
    start = program * each + gl.minimum(program, more)
    stop = start + each + (program < more).to(gl.int32)
    if start >= stop:
        return

    first_tile, first_step = start // steps, start % steps
    place = _place(groups_ptr, first_tile, n_tiles, N, M, BLOCK_M, BLOCK_N)
    tile, step = first_tile, first_step
    copied = place
    for i in gl.static_range(STAGES - 1):
        if start + i < stop:
            _copy_weights(i, step, w_smem, weight_ptr, copied, row, byte, N, PAIRS, EVEN)
        is_more = start + i + 1 < stop
        tile, step, copied = _next(tile, step, copied, steps, is_more, groups_ptr, n_tiles, N, M, BLOCK_M, BLOCK_N)
    scaled_tile, scaled_step, scaled = first_tile, first_step, place
    value, nested = load_scales(
        absmax_ptr, (scaled[0] * N + scaled[1]) * B, gl.minimum(scale_row, N - 1 - scaled[1]), scaled_step, quarter, B,
        nested_ptr, BLOCK_SIZE, EVEN,
    )  # fmt: skip
    if PDL and groups_ptr is None:
        gdc_wait()  # for the tokens
        gdc_launch_dependents()  # the kernel that adds the parts; it waits for this one
    copied_tile, copied_step, copied = first_tile, first_step, place
    for i in gl.static_range(STAGES - 1):
        if start + i < stop:
            _copy_tokens(i, copied_step, x_smem, x_ptr, copied, token, column, PAIRS, EVEN)
        async_copy.commit_group()
        copied_tile, copied_step, copied = _next(
            copied_tile, copied_step, copied, steps, start + i + 1 < stop, groups_ptr, n_tiles, N, M, BLOCK_M, BLOCK_N
        )
    barrier()  # for the table

    zero = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, MMA)
    unit = start
    stage = 0
    while unit < stop:
        tile = unit // steps
        first_unit = tile * steps
        end = gl.minimum(stop, first_unit + steps)
        total = zero
        for at in range(unit, end):
            async_copy.wait_group(STAGES - 2)
            barrier()  # the copies of all threads have landed, and nobody reads the stage that is filled next
            if at + STAGES - 1 < stop:
                filled = stage - 1
                if filled < 0:
                    filled = STAGES - 1
                _copy_weights(filled, copied_step, w_smem, weight_ptr, copied, row, byte, N, PAIRS, EVEN)
                _copy_tokens(filled, copied_step, x_smem, x_ptr, copied, token, column, PAIRS, EVEN)
                copied_tile, copied_step, copied = _next(
                    copied_tile, copied_step, copied, steps, at + STAGES < stop, groups_ptr, n_tiles, N, M, BLOCK_M,
                    BLOCK_N,
                )  # fmt: skip
            async_copy.commit_group()
            absmax = quarters(scales_of(value, nested, nested_ptr, offset_ptr, code_ptr))
            if at + 1 < stop:
                scaled_tile, scaled_step, scaled = _next(
                    scaled_tile, scaled_step, scaled, steps, True, groups_ptr, n_tiles, N, M, BLOCK_M, BLOCK_N
                )
            value, nested = load_scales(
                absmax_ptr, (scaled[0] * N + scaled[1]) * B, gl.minimum(scale_row, N - 1 - scaled[1]), scaled_step,
                quarter, B, nested_ptr, BLOCK_SIZE, EVEN,
            )  # fmt: skip
            packed = quarters(w_smem.index(stage).load(code_layout(BLOCK_N, WARPS)))
            for i in gl.static_range(4):
                w = decode_codes(packed[i], table, bank, DTYPE, W_OPERAND)
                x = x_blocks.index(stage * 4 + i).load(X_OPERAND)
                scale = gl.convert_layout(absmax[i].reshape([BLOCK_N]), gl.SliceLayout(1, MMA), assert_trivial=True)
                total += mma_v2(w, x, zero) * scale[:, None]  # once a block, and the decoded codes stay exact
            stage += 1
            if stage == STAGES:
                stage = 0
        unit = end

        weight, first_n, first_m, rows = _place(groups_ptr, tile, n_tiles, N, M, BLOCK_M, BLOCK_N)
        in_m = (m < rows) & (n >= 0)  # the second for the shape
        first = _program_of(first_unit, each, more)
        parts = _program_of(first_unit + steps - 1, each, more) - first + 1
        has_all = parts == 1
        if parts > 1:
            is_later = (first * each + gl.minimum(first, more) < first_unit).to(gl.int32)  # the second of its sums
            if groups_ptr is None:
                slot = 2 * program + gl.where(program == first, is_later, 0)
                gl.store(partial_ptr + slot.to(gl.int64) * (BLOCK_N * BLOCK_M) + (m + n * BLOCK_M), total, mask=in_m)
            else:
                total, has_all = add_parts(
                    total, partial_ptr, m + n * BLOCK_M, in_m, count_ptr + tile, program - first, first, is_later, parts
                )
        if has_all:
            n_row = first_n + n
            if bias_ptr is not None:
                total += gl.load(bias_ptr + weight * N + n_row, mask=n_row < N, other=0.0).to(gl.float32)
            out_ptrs = out_ptr + ((first_m + m) * N + n_row)
            gl.store(out_ptrs, total.to(DTYPE), mask=in_m & (n_row < N))


def linear_4bit_staged(
    x: Tensor, packed: Packed4, bias: Tensor | None, out: Tensor, config: StagedConfig, stops: Tensor | None = None
) -> None:
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous.

    M <= 32, K % 32 == 0, block_size >= 64, x and weight aligned to 16 bytes. With `stops`, packed is [E, N, K/2] and
    bias [E, N], and each weight multiplies its rows, any number, of x.
    """
    m, (n, pairs) = x.shape[0], packed.weight.shape[-2:]
    tiles, steps = ceil_div(n, config.block_n), ceil_div(pairs, STEP_BYTES.value)
    if stops is not None:
        tiles *= most_tiles(m, len(packed.weight), config.block_m)
    programs = min(config.programs, tiles * steps)
    is_split = stops is not None or tiles * steps % (programs * steps) != 0
    pdl = Gpu.of(x.device).pdl
    partial = torch.empty(
        is_split * programs * 2 * config.block_n * config.block_m, dtype=torch.float32, device=x.device
    )
    count = torch.empty(0 if stops is None else tiles, dtype=torch.int32, device=x.device)
    token_groups = None
    if stops is not None:
        token_groups = group_tokens(stops, len(packed.weight), config.block_m, count, out)
    launch(
        _linear_4bit_staged_kernel, (programs,),
        x, packed.weight, packed.absmax, bias, *packed.nested, partial, count, out, token_groups,
        m, n, pairs, packed.absmax.shape[-1], *code_tables(packed.quant_type, x.dtype),
        BLOCK_SIZE=packed.block_size, EVEN=pairs % STEP_BYTES.value == 0, PDL=pdl,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages,
        options={"num_warps": config.warps, "maxnreg": config.registers, "launch_pdl": pdl},
    )  # fmt: skip
    if stops is None and is_split:
        add_parts_of_tiles(partial, bias, out, steps, programs, (config.block_n, config.block_m), pdl)
