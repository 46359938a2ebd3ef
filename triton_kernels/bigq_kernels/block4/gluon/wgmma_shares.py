"""Prototype: the wgmma kernel with equal shares of steps, and tokens as they are stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bigq_kernels.block4.gluon.operands import BF16_SCALE_ASM, F16_SCALE_ASM, _as_operand, code_layout
from bigq_kernels.block4.gluon.scales import (
    barrier,
    copy_async,
    load_scales,
    quarters,
    scale_index,
    scale_layout,
    scales_of,
)
from bigq_kernels.block4.gluon.table import code_tables, fill_table
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.parts import add_parts_of_tiles
from bigq_kernels.block4.tokens import tile_tokens
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div

STEP_BYTES = gl.constexpr(128)  # of a row in one stage of weights: 256 elements of K, four slices of 64
W_STAGES = gl.constexpr(2)


def _bytes_asm(scaled):
    """PTX from bytes $2 and $3 to their entries, at base $4 (and $5), times scales $6/$7, rests $8/$9."""
    lines = []
    for i in range(2):
        lines += [f"mad.lo.u32 at, ${2 + i}, 128, ${4 + i};", f"ld.shared.b32 ${i}, [at];"]
        lines += [f"mul.rn.{scaled}x2 rest, ${i}, ${8 + i};", f"fma.rn.{scaled}x2 ${i}, ${i}, ${6 + i}, rest;"]
    return "{\n.reg .b32 at, rest;\n" + "\n".join(lines) + "\n}"


def _words_asm(scaled):
    """As `lookup_asm` with a scale, but $5 is the lane's bank in the table."""
    lines = []
    for byte in range(4):
        lines += [f"prmt.b32 at, $4, 0, 0x444{byte};", "mad.lo.u32 at, at, 128, $5;", f"ld.shared.b32 ${byte}, [at];"]
        lines += [f"mul.rn.{scaled}x2 rest, ${byte}, $13;", f"fma.rn.{scaled}x2 ${byte}, ${byte}, $9, rest;"]
    return "{\n.reg .b32 at, rest;\n" + "\n".join(lines) + "\n}"


BF16_WORDS_ASM = gl.constexpr(_words_asm("bf16"))
F16_WORDS_ASM = gl.constexpr(_words_asm("f16"))
BF16_BYTES_ASM = gl.constexpr(_bytes_asm("bf16"))
F16_BYTES_ASM = gl.constexpr(_bytes_asm("f16"))


@gluon.constexpr_function
def byte_layout(block_n, warps):
    """[block_n, 32] bytes: lane (g, c) of a warp holds bytes c, c + 4, .. of rows g and g + 8."""
    rows = [[16 << i, 0] for i in range((block_n // 16).bit_length() - 1)]
    of_warps = warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], [0, 16], *rows[of_warps:]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=rows[:of_warps],
        block_bases=[],
        shape=[block_n, 32],
    )


@gluon.constexpr_function
def _two(dtype):
    return dtype, dtype


@gluon.jit
def _decode_bytes(packed, absmax, base, DTYPE: gl.constexpr, OPERAND: gl.constexpr):
    """Bytes [N, 32] in `byte_layout` -> an operand [N, 64] of weights, in the order of K of memory."""
    N: gl.constexpr = packed.shape[0]
    ASM: gl.constexpr = F16_BYTES_ASM if gl.float16 == DTYPE else BF16_BYTES_ASM
    SCALE_ASM: gl.constexpr = F16_SCALE_ASM if gl.float16 == DTYPE else BF16_SCALE_ASM
    ROWS: gl.constexpr = gl.SliceLayout(1, packed.type.layout)
    near, rest = gl.inline_asm_elementwise(
        SCALE_ASM,
        "=&r,=&r,r",
        [gl.convert_layout(absmax.reshape([N]), ROWS, assert_trivial=True).to(gl.int32, bitcast=True)],
        dtype=_two(gl.int32),
        is_pure=True,
        pack=1,
    )
    wide = packed.to(gl.int32)
    zero = wide * 0
    v0, v1 = gl.inline_asm_elementwise(
        ASM,
        "=&r,=&r,r,r,r,r,r,r,r,r",
        [wide, base + zero, near[:, None] + zero, rest[:, None] + zero],
        dtype=_two(DTYPE),
        is_pure=True,
        pack=2,
    )
    values = gl.join(v0, v1).reshape([N // 16, 2, 8, 32, 2]).permute((0, 4, 2, 3, 1)).reshape([N, 64])
    return gl.convert_layout(values, OPERAND, assert_trivial=True)


@gluon.jit
def _decode_words(packed, absmax, base, DTYPE: gl.constexpr, OPERAND: gl.constexpr):
    N: gl.constexpr = packed.shape[0]
    ASM: gl.constexpr = F16_WORDS_ASM if gl.float16 == DTYPE else BF16_WORDS_ASM
    SCALE_ASM: gl.constexpr = F16_SCALE_ASM if gl.float16 == DTYPE else BF16_SCALE_ASM
    ROWS: gl.constexpr = gl.SliceLayout(1, packed.type.layout)
    near, rest = gl.inline_asm_elementwise(
        SCALE_ASM,
        "=&r,=&r,r",
        [gl.convert_layout(absmax.reshape([N]), ROWS, assert_trivial=True).to(gl.int32, bitcast=True)],
        dtype=_two(gl.int32),
        is_pure=True,
        pack=1,
    )
    zero = packed.to(gl.int32) * 0
    v0, v1 = gl.inline_asm_elementwise(
        ASM,
        "=&r,=&r,=&r,=&r,r" + ",r" * 12,
        [packed, base, near[:, None] + zero, rest[:, None] + zero],
        dtype=_two(DTYPE),
        is_pure=True,
        pack=4,
    )
    return _as_operand(v0, v1, OPERAND)


@gluon.jit
def _copy_weights(
    step, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr, row, part, PAIRS, B, nested_ptr, BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    stage = step % W_STAGES
    w_ptrs += step * STEP_BYTES
    if EVEN:
        copy_async(w_smem.index(stage), w_ptrs, eviction_policy="evict_first")
    else:
        copy_async(w_smem.index(stage), w_ptrs, mask=byte + step * STEP_BYTES < PAIRS)
    if nested_ptr is None:
        index = scale_index(row * B, step, part, B, BLOCK_SIZE, EVEN)
        copy_async(absmax_smem.index(stage), absmax_ptr + index)


@gluon.jit
def _copy_tokens(x_smem, slice, x_ptrs, column, PAIRS, BLOCK_M: gl.constexpr, NATURAL: gl.constexpr, EVEN: gl.constexpr):
    """Start the copies of slice `slice` of K into a stage."""
    if NATURAL:
        if EVEN:
            copy_async(x_smem, x_ptrs + slice * 64)
        else:
            copy_async(x_smem, x_ptrs + slice * 64, mask=column + slice * 64 < PAIRS * 2)
    else:
        copy_async(x_smem, x_ptrs + slice * (BLOCK_M * 64))


@gluon.jit
def _as_stored(total):
    """A tile of sums as [BLOCK_M / 8, 8 * BLOCK_N]: of a row each lane has 16 bytes, and those of a warp are neighbours."""
    N: gl.constexpr = total.shape[0]
    M: gl.constexpr = total.shape[1]
    return total.reshape([N // 16, 2, 8, M // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([M // 8, N * 8])


@gluon.jit
def _place_of(stored):
    LAYOUT: gl.constexpr = stored.type.layout
    ROW: gl.constexpr = stored.shape[1]
    at = gl.arange(0, stored.shape[0], gl.SliceLayout(1, LAYOUT))[:, None] * ROW
    return at + gl.arange(0, ROW, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def _as_tile(stored, N: gl.constexpr, LAYOUT: gl.constexpr):
    M: gl.constexpr = stored.shape[0] * 8
    tile = stored.reshape([M // 8, N // 16, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5)).reshape([N, M])
    return gl.convert_layout(tile, LAYOUT, assert_trivial=True)


@gluon.jit
def _share_of(unit, each, more):
    """The share that has a unit: the first `more` shares have each + 1 of them, the others `each`."""
    longer = more * (each + 1)
    return gl.where(unit < longer, unit // (each + 1), more + (unit - longer) // gl.maximum(each, 1))


@gluon.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _linear_4bit_shares_kernel(
    x_ptr,  # NATURAL: [M, K]; otherwise of `tile_tokens`
    weight_ptr,
    absmax_ptr,
    bias_ptr,
    nested_ptr,
    offset_ptr,
    code_ptr,
    partial_ptr,  # inline: [programs, BLOCK_N, BLOCK_M] float32; of the parts kernel: [programs, 2, ...]
    count_ptr,  # [n_tiles, m_tiles] int32, zero: parts that are stored
    out_ptr,  # [M, N]
    M,
    N,
    PAIRS,
    B,
    t0, t1, t2, t3, t4, t5, t6, t7,  # code_tables
    BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr,  # K divides into whole steps: no masks
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NATURAL: gl.constexpr,
    PARTS: gl.constexpr,  # a kernel after this one adds parts
    WHOLE: gl.constexpr,  # each program has one whole tile
    EARLY: gl.constexpr,  # the next kernel may start
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 16]
    )
    W_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    CODES: gl.constexpr = code_layout(BLOCK_N, WARPS)
    BYTES: gl.constexpr = byte_layout(BLOCK_N, WARPS)
    SCALES: gl.constexpr = scale_layout(BLOCK_N, WARPS)
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ABSMAX_COPY: gl.constexpr = (  # 16 bytes a copy; nested ones come through registers, each by one thread
        gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
        if nested_ptr is None
        else gl.BlockedLayout([1, 2], [16, 2], [WARPS, 1], [1, 0])
    )
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [BLOCK_N // 8, 256 // BLOCK_N], [1, WARPS], [0, 1])
    # Triton asks for more than 48 KiB only where its own part is more, and the table is beside it.
    LEAST: gl.constexpr = (49168 - BLOCK_M * 512) // (BLOCK_N * STEP_BYTES) + 1
    W_SMEM: gl.constexpr = (
        gl.SwizzledSharedLayout(16, 1, 8, order=[1, 0]) if NATURAL else gl.SwizzledSharedLayout(32, 1, 4, order=[1, 0])
    )
    w_smem = gl.allocate_shared_memory(
        gl.uint8, [W_STAGES if W_STAGES > LEAST else LEAST, BLOCK_N, STEP_BYTES], W_SMEM
    )
    absmax_smem = gl.allocate_shared_memory(
        gl.float32, [W_STAGES, BLOCK_N, 4], gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    )
    X_STAGE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    x_smem = (
        gl.allocate_shared_memory(DTYPE, [BLOCK_M, 64], X_STAGE),
        gl.allocate_shared_memory(DTYPE, [BLOCK_M, 64], X_STAGE),
        gl.allocate_shared_memory(DTYPE, [BLOCK_M, 64], X_STAGE),
        gl.allocate_shared_memory(DTYPE, [BLOCK_M, 64], X_STAGE),
    )

    table, bank = fill_table(t0, t1, t2, t3, t4, t5, t6, t7)
    m_tiles = gl.cdiv(M, BLOCK_M)
    steps = gl.cdiv(PAIRS, STEP_BYTES)
    program = gl.program_id(0)
    shares = gl.num_programs(0) // m_tiles  # of the steps of one tile of tokens
    m_tile = (program % m_tiles).to(gl.int64)
    # The first programs have the last shares: who waits for a part, waits for a program that started before it.
    share = shares - 1 - program // m_tiles
    first_m = m_tile * BLOCK_M
    units = gl.cdiv(N, BLOCK_N) * steps
    each, more = units // shares, units % shares
    unit = share * each + gl.minimum(share, more)
    last = unit + each + (share < more).to(gl.int32)

    row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, W_COPY))[:, None]
    byte = gl.arange(0, STEP_BYTES, gl.SliceLayout(0, W_COPY))[None, :]
    if not EVEN:
        byte += row * 0  # for the shape
    token = gl.arange(0, BLOCK_M, gl.SliceLayout(1, X_COPY))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, X_COPY))[None, :]
    if NATURAL:
        column += token * 0
        x_ptrs = x_ptr + first_m * (PAIRS * 2) + (gl.minimum(token, M - 1 - m_tile.to(gl.int32) * BLOCK_M) * (PAIRS * 2) + column)
    else:
        width = steps * (STEP_BYTES * 2)
        x_ptrs = x_ptr + m_tile * width.to(gl.int64) * BLOCK_M + (token * 64 + column)
    scale_row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, ABSMAX_COPY))[:, None]
    part = gl.arange(0, 4, gl.SliceLayout(0, ABSMAX_COPY))[None, :]

    n_tile = unit // steps
    start = unit % steps
    stop = gl.minimum(start + (last - unit), steps)
    first_n = n_tile * BLOCK_N
    first_row = first_n.to(gl.int64)
    last_row = N - 1 - first_n  # rows past N read the last row; their result is not stored
    w_ptrs = weight_ptr + first_row * PAIRS + (gl.minimum(row, last_row) * PAIRS + byte)
    absmax_row = gl.minimum(scale_row, last_row)
    first_block = first_row * B
    for i in gl.static_range(2):
        if start + i < stop:
            _copy_weights(
                start + i, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr + first_block, absmax_row, part, PAIRS, B,
                nested_ptr, BLOCK_SIZE, EVEN,
            )  # fmt: skip
        async_copy.commit_group()
    if nested_ptr is not None:
        value, nested = load_scales(absmax_ptr, first_block, absmax_row, start, part, B, nested_ptr, BLOCK_SIZE, EVEN)
        for i in gl.static_range(2):  # the next ones are on their way while these are looked up
            value_before, nested_before = value, nested
            value, nested = load_scales(
                absmax_ptr, first_block, absmax_row, gl.minimum(start + i + 1, stop - 1), part, B, nested_ptr,
                BLOCK_SIZE, EVEN,
            )  # fmt: skip
            scales = scales_of(value_before, nested_before, nested_ptr, offset_ptr, code_ptr)
            absmax_smem.index((start + i) % W_STAGES).store(scales)
    gdc_wait()  # for the tokens, and the counts
    if PARTS or EARLY:
        gdc_launch_dependents()
    for i in gl.static_range(2):
        _copy_tokens(x_smem[i], start * 4 + i, x_ptrs, column, PAIRS, BLOCK_M, NATURAL, EVEN)
        async_copy.commit_group()
        async_copy.commit_group()  # as in the loop

    more_parts = True
    while more_parts:
        gl.assume(start < stop)
        total = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, MMA)
        w_before = gl.full([BLOCK_N, 64], 0.0, DTYPE, W_OPERAND)
        for step in range(start, stop):
            for i in gl.static_range(4):
                async_copy.wait_group(3)  # two groups a slice: its tokens, and weights
                barrier()  # the slice has landed for all, and nobody reads the stages that are filled next
                ahead = step * 4 + i + 2
                if ahead < stop * 4:
                    _copy_tokens(x_smem[(i + 2) % 4], ahead, x_ptrs, column, PAIRS, BLOCK_M, NATURAL, EVEN)
                async_copy.commit_group()
                if i == (3 if NATURAL else 2) and step + 2 < stop:
                    _copy_weights(
                        step + 2, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr + first_block, absmax_row, part, PAIRS,
                        B, nested_ptr, BLOCK_SIZE, EVEN,
                    )  # fmt: skip
                async_copy.commit_group()
                if i == 0:
                    absmax = quarters(absmax_smem.index(step % W_STAGES).load(SCALES))
                if NATURAL:
                    if i % 2 == 0:
                        stage = w_smem.index(step % W_STAGES)
                        two = (
                            stage.slice(i * 32, 32, dim=1).load(BYTES),
                            stage.slice(i * 32 + 32, 32, dim=1).load(BYTES),
                        )
                    w = _decode_bytes(two[i % 2], absmax[i], table + bank, DTYPE, W_OPERAND)
                else:
                    if i == 0:
                        words = quarters(w_smem.index(step % W_STAGES).load(CODES))
                    w = _decode_words(words[i], absmax[i], table + bank, DTYPE, W_OPERAND)
                if i == 3 and nested_ptr is not None:
                    scales = scales_of(value, nested, nested_ptr, offset_ptr, code_ptr)
                    absmax_smem.index((step + 2) % W_STAGES).store(scales)
                    value, nested = load_scales(
                        absmax_ptr, first_block, absmax_row, gl.minimum(step + 3, stop - 1), part, B, nested_ptr,
                        BLOCK_SIZE, EVEN,
                    )  # fmt: skip
                total = warpgroup_mma(w, x_smem[i].permute((1, 0)), total, is_async=True)
                total, _ = warpgroup_mma_wait(1, deps=[total, w_before])  # the product before, which read w_before
                w_before = w
        total = warpgroup_mma_wait(0, deps=[total])

        this_tile, this_start, this_stop = n_tile, start, stop
        unit += stop - start
        more_parts = unit < last
        if WHOLE:
            more_parts = False
        else:
            if more_parts:
                barrier()  # nobody reads the tokens
                n_tile = unit // steps
                start = 0
                stop = gl.minimum(last - unit, steps)
                first_n = n_tile * BLOCK_N
                first_row = first_n.to(gl.int64)
                last_row = N - 1 - first_n
                w_ptrs = weight_ptr + first_row * PAIRS + (gl.minimum(row, last_row) * PAIRS + byte)
                absmax_row = gl.minimum(scale_row, last_row)
                first_block = first_row * B
                for i in gl.static_range(2):
                    if start + i < stop:
                        _copy_weights(
                            start + i, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr + first_block, absmax_row, part,
                            PAIRS, B, nested_ptr, BLOCK_SIZE, EVEN,
                        )  # fmt: skip
                    async_copy.commit_group()
                if nested_ptr is not None:
                    value, nested = load_scales(
                        absmax_ptr, first_block, absmax_row, start, part, B, nested_ptr, BLOCK_SIZE, EVEN
                    )
                    for i in gl.static_range(2):
                        value_before, nested_before = value, nested
                        value, nested = load_scales(
                            absmax_ptr, first_block, absmax_row, gl.minimum(start + i + 1, stop - 1), part, B,
                            nested_ptr, BLOCK_SIZE, EVEN,
                        )  # fmt: skip
                        scales = scales_of(value_before, nested_before, nested_ptr, offset_ptr, code_ptr)
                        absmax_smem.index((start + i) % W_STAGES).store(scales)
                for i in gl.static_range(2):
                    _copy_tokens(x_smem[i], start * 4 + i, x_ptrs, column, PAIRS, BLOCK_M, NATURAL, EVEN)
                    async_copy.commit_group()
                    async_copy.commit_group()  # as in the loop

        has_tile = True
        if not WHOLE:
            numel: gl.constexpr = BLOCK_M * BLOCK_N
            if PARTS:
                first = _share_of(this_tile * steps, each, more)
                if this_start > 0 or this_stop < steps:
                    has_tile = False
                    is_later = (first * each + gl.minimum(first, more) < this_tile * steps).to(gl.int32)
                    slot = 2 * share + gl.where(share == first, is_later, 0)
                    tile_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA))[None, :]
                    tile_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))[:, None]
                    in_tile = (first_m + tile_m < M) & (tile_n >= 0)
                    gl.store(
                        partial_ptr + slot.to(gl.int64) * numel + (tile_m + tile_n * BLOCK_M), total, mask=in_tile
                    )
            else:
                # Of a share only the first part may have its tile's beginning elsewhere.
                if this_start > 0:
                    has_tile = False
                    stored = _as_stored(total)
                    gl.store(partial_ptr + program.to(gl.int64) * numel + _place_of(stored), stored)
                    barrier()  # the whole program has stored, then one thread publishes it
                    gl.atomic_add(count_ptr + this_tile * m_tiles + program % m_tiles, 1, sem="release", scope="gpu")
                elif this_stop < steps:
                    last_share = _share_of(this_tile * steps + steps - 1, each, more)
                    stored = _as_stored(total)
                    at = _place_of(stored)
                    others = last_share - share
                    tile_count = count_ptr + this_tile * m_tiles + program % m_tiles
                    arrived = gl.atomic_add(tile_count, 0, sem="acquire", scope="gpu")
                    while arrived < others:
                        arrived = gl.atomic_add(tile_count, 0, sem="acquire", scope="gpu")
                    UNROLL: gl.constexpr = 128 * 32 * WARPS // numel
                    for begin in range(0, others, UNROLL):
                        for i in gl.static_range(UNROLL):
                            place = program - (begin + i + 1) * m_tiles
                            here = (at >= 0) & (begin + i < others)
                            # .cg reads L2: another program wrote this after our L1 may have cached it.
                            stored += gl.load(
                                partial_ptr + place.to(gl.int64) * numel + at, mask=here, other=0.0,
                                cache_modifier=".cg",
                            )  # fmt: skip
                    total = _as_tile(stored, BLOCK_N, MMA)
        if has_tile:
            this_n = this_tile * BLOCK_N
            if bias_ptr is not None:
                bias_n = this_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
                bias = gl.load(bias_ptr + bias_n, mask=bias_n < N, other=0.0)
                total += bias.to(gl.float32)[:, None]
            out = gl.convert_layout(total.to(DTYPE), OUT)  # 16 bytes of an output row a store
            m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))[None, :]
            n = (this_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT)))[:, None]
            gl.store(out_ptr + first_m * N + (m.to(gl.int64) * N + n), out, mask=(first_m + m < M) & (n < N))


@triton.jit(do_not_specialize=["numel"])
def _zero_kernel(ptr, numel, BLOCK: tl.constexpr):
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    for start in range(0, numel, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(ptr + at, tl.zeros((BLOCK,), tl.int32), mask=at < numel)


def linear_shares(x: Tensor, packed: Packed4, bias, out: Tensor, *, block_m, block_n, warps, registers, programs,
                  natural, parts=False, early=False) -> None:
    """programs: of all tiles of tokens."""
    m, _ = x.shape
    n, pairs = packed.weight.shape[-2:]
    m_tiles, n_tiles = ceil_div(m, block_m), ceil_div(n, block_n)
    steps = ceil_div(pairs, STEP_BYTES.value)
    if programs == "whole":
        shares = n_tiles
    elif isinstance(programs, tuple):
        shares = n_tiles * programs[0]
    else:
        shares = max(1, min(programs // m_tiles, n_tiles * steps))
    is_split = n_tiles * steps % (shares * steps) != 0
    count = torch.empty(n_tiles * m_tiles if is_split and not parts else 0, dtype=torch.int32, device=x.device)
    partial = torch.empty(is_split * (1 + parts) * shares * m_tiles * block_m * block_n, device=x.device)
    if natural:
        x_tiles = x
        if is_split and not parts:
            launch(_zero_kernel, (1,), count, count.numel(), BLOCK=512, options={"launch_pdl": True, "num_warps": 4})
    else:
        x_tiles = tile_tokens(x, block_m, steps * 2 * STEP_BYTES.value, count)
    launch(
        _linear_4bit_shares_kernel, (shares * m_tiles,),
        x_tiles, packed.weight, packed.absmax, bias, *packed.nested, partial, count, out,
        m, n, pairs, packed.absmax.shape[-1], *code_tables(packed.quant_type, x.dtype),
        BLOCK_SIZE=packed.block_size, EVEN=pairs % STEP_BYTES.value == 0,
        BLOCK_M=block_m, BLOCK_N=block_n, NATURAL=natural, PARTS=bool(parts), WHOLE=shares == n_tiles, EARLY=early,
        options={"num_warps": warps, "maxnreg": registers, "launch_pdl": True},
    )  # fmt: skip
    if is_split and parts:
        assert m_tiles == 1
        add_parts_of_tiles(partial, bias, out, steps, shares, (block_n, block_m), True)
