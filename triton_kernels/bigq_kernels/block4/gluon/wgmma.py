"""A dozen to a hundred tokens for each weight of a 4-bit stack by Hopper's wgmma, with weights in registers, in Gluon.

- The weight is the operand that comes from registers, 64 rows a warp group. The tokens are the one in shared memory, in
  an order of K (`tile_tokens`) for which a lane reads 8 bytes of codes at once.
- While the tensor cores multiply a slice of 64 elements of K, the warps decode the next one: two slices of weights are
  in registers. Triton's own pipeline does not overlap the two.
- absmax is multiplied in after decoding, as 16 bits and a 16-bit rest. Scaling sums instead would take a second set of
  sums. The weight is rounded once more than `dequantize_4bit` rounds it, so outputs may differ in their last bits from
  those of another way.
- A tile of 64 tokens that has 32 or fewer runs a loop that multiplies 32. There are two loops, since a loop's number of
  tokens is a constant. The rows of a weight are seldom whole tiles.

`choose_grouped` says where this kernel runs: `bulk` begins later, so it takes the stacks with more rows or a longer K.
Gluon has no interpreter, so values are tested on a GPU only.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from bigq_kernels.block4.configs import WgmmaConfig
from bigq_kernels.block4.gluon.asm import run
from bigq_kernels.block4.gluon.groups import place_in_group
from bigq_kernels.block4.gluon.loops import wgmma_sums
from bigq_kernels.block4.gluon.operands import code_layout, decode_weights
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
from bigq_kernels.block4.tokens import tile_tokens
from bigq_kernels.groups import group_tokens
from bigq_kernels.launch import launch
from bigq_kernels.split_k import split_workspace
from bigq_kernels.tiles import ceil_div

__all__ = ["REGISTERS", "WARPS", "linear_4bit_wgmma"]

BLOCK_N = gl.constexpr(128)  # rows of the weight in a tile
WARPS = 8  # each has 16 of them
# The most of a thread: two programs share a multiprocessor, so one begins while the other multiplies. Tiles of 128
# tokens take more, and 323 us where tiles of 64 take 226, for 32 rows for each of 128 weights of 1536 x 2048 (H200).
REGISTERS = 128
LEAST_M = gl.constexpr(32)  # tokens of the smaller loop
STEP_BYTES = gl.constexpr(128)  # of a row in one stage of weights: 256 elements of K, four slices of 64
W_STAGES = gl.constexpr(2)  # a step is in registers once its first slice is decoded, and its stage is free then
# 0, but LLVM does not know. If it does, it counts steps in 64 bits: the loop for 32 tokens has 512 instructions instead
# of 503, and where K leaves a partial step, ptxas serializes every product.
ZERO_ASM = gl.constexpr("mov.b32 $0, 0;")


@gluon.jit
def _copy_weights(
    step, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr, row, part, PAIRS, B, nested_ptr, BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    """Start the copies of one step: STEP_BYTES of every row, and its four scales if these are plain.

    Behind a row's end nothing is copied. Its codes are then those of an earlier step, and meet tokens that are 0.
    """
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
def _store(total, bias_ptr, out_ptr, first_m, first_n, rows, N):
    """Store the first `rows` columns of sums [BLOCK_N, tokens], plus bias, to the rows from first_m of out [M, N]."""
    SUMS: gl.constexpr = total.type.layout
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [BLOCK_N // 8, 256 // BLOCK_N], [1, gl.num_warps()], [0, 1])
    if bias_ptr is not None:
        n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUMS))
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0)
        total += bias.to(gl.float32)[:, None]
    out = gl.convert_layout(total.to(out_ptr.dtype.element_ty), OUT)  # 16 bytes of an output row a store
    m = gl.arange(0, total.shape[1], gl.SliceLayout(0, OUT))[None, :]
    n = (first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT)))[:, None]
    gl.store(out_ptr + first_m * N + (m.to(gl.int64) * N + n), out, mask=(m < rows) & (n < N))


@gluon.jit
def _multiply(
    tile_of, place, bias_ptr, out_ptr, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr,
    SIZE: gl.constexpr,
):  # fmt: skip
    """Store the products of a tile of the weight and SIZE tokens.

    tile_of: where the tile's operands are. place: of the tile in the output. The copies of two steps of weights have
    been started.
    """
    (
        x_ptr, x_smem, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr, first_block, absmax_row, part, value, nested,
        nested_ptr, offset_ptr, code_ptr, table, bank, PAIRS, B, start, steps,
    ) = tile_of  # fmt: skip
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    SUMS: gl.constexpr = wgmma_sums(SIZE, WARPS)
    W_OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    CODES: gl.constexpr = code_layout(BLOCK_N, WARPS)
    SCALES: gl.constexpr = scale_layout(BLOCK_N, WARPS)
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    SLICE: gl.constexpr = BLOCK_M * 64
    token = gl.arange(0, SIZE, gl.SliceLayout(1, X_COPY))[:, None]
    first_ptrs = x_ptr + (token * 64 + gl.arange(0, 64, gl.SliceLayout(0, X_COPY))[None, :])
    for i in gl.static_range(2):
        copy_async(x_smem[i].slice(0, SIZE), first_ptrs + (start * 4 + i) * SLICE)
        async_copy.commit_group()
        async_copy.commit_group()  # as in the loop
    total = gl.full([BLOCK_N, SIZE], 0.0, gl.float32, SUMS)
    before = gl.full([BLOCK_N, 64], 0.0, DTYPE, W_OPERAND)
    for step in range(start, steps):
        for i in gl.static_range(4):
            # Triton's own pipelines do not fence copies for wgmma either. A fence waits for all copies in flight, which
            # would be the longest part of a slice.
            async_copy.wait_group(3)  # two groups a slice: its tokens, and weights
            barrier()  # the slice has landed for all, and nobody reads the stages that are filled next
            ahead = step * 4 + i + 2
            if ahead < steps * 4:
                copy_async(x_smem[(i + 2) % 4].slice(0, SIZE), first_ptrs + ahead * SLICE)
            async_copy.commit_group()
            if i == 2 and step + 2 < steps:
                _copy_weights(
                    step + 2, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr + first_block, absmax_row, part, PAIRS, B,
                    nested_ptr, BLOCK_SIZE, EVEN,
                )  # fmt: skip
            async_copy.commit_group()
            if i == 0:
                words = quarters(w_smem.index(step % W_STAGES).load(CODES))
                absmax = quarters(absmax_smem.index(step % W_STAGES).load(SCALES))
            if i == 3 and nested_ptr is not None:
                scales = scales_of(value, nested, nested_ptr, offset_ptr, code_ptr)
                absmax_smem.index((step + 2) % W_STAGES).store(scales)
                value, nested = load_scales(
                    absmax_ptr, first_block, absmax_row, gl.minimum(step + 3, steps - 1), part, B, nested_ptr,
                    BLOCK_SIZE, EVEN,
                )  # fmt: skip
            w = decode_weights(words[i], absmax[i], table, bank, DTYPE, W_OPERAND)
            total = warpgroup_mma(w, x_smem[i].slice(0, SIZE).permute((1, 0)), total, is_async=True)
            # Wait for the products of the slice before, which read `before`.
            total, _ = warpgroup_mma_wait(1, deps=[total, before])
            before = w
    total = warpgroup_mma_wait(0, deps=[total])
    first_m, first_n, rows, N = place
    _store(total, bias_ptr, out_ptr, first_m, first_n, rows, N)


@gluon.jit
def _linear_4bit_wgmma_kernel(
    x_ptr,  # [tiles, 4 * steps, BLOCK_M, 64] of `tile_tokens`, the kernel before
    weight_ptr,  # [E, N, PAIRS] uint8: element 2i in the high nibble
    absmax_ptr,  # [E, N, B] float32, or uint8 if nested
    bias_ptr,  # [E, N] or None
    nested_ptr,  # see load_scales
    offset_ptr,
    code_ptr,
    out_ptr,  # [M, N]
    groups_ptr,  # [tiles, 5] of `group_tokens`
    N,
    PAIRS,
    B,
    t0, t1, t2, t3, t4, t5, t6, t7,  # code_tables
    BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr,  # K divides into whole steps: no masks
    BLOCK_M: gl.constexpr,  # 32 or 64
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    ABSMAX_COPY: gl.constexpr = (  # 16 bytes a copy; nested ones come through registers, each by one thread
        gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
        if nested_ptr is None
        else gl.BlockedLayout([1, 2], [16, 2], [WARPS, 1], [1, 0])
    )
    # In all more than 48 KiB. With less Triton would not ask for more than that, and the table is beside it.
    w_smem = gl.allocate_shared_memory(
        gl.uint8, [W_STAGES, BLOCK_N, STEP_BYTES], gl.SwizzledSharedLayout(32, 1, 4, order=[1, 0])
    )
    absmax_smem = gl.allocate_shared_memory(
        gl.float32, [W_STAGES, BLOCK_N, 4], gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    )
    # Four stages of tokens, each a buffer of its own: of one buffer, each copy would wait for the reads of all stages.
    X_STAGE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    x_smem = (
        gl.allocate_shared_memory(DTYPE, [BLOCK_M, 64], X_STAGE),
        gl.allocate_shared_memory(DTYPE, [BLOCK_M, 64], X_STAGE),
        gl.allocate_shared_memory(DTYPE, [BLOCK_M, 64], X_STAGE),
        gl.allocate_shared_memory(DTYPE, [BLOCK_M, 64], X_STAGE),
    )

    gdc_wait()  # for the groups and the tokens
    n_tiles = gl.cdiv(N, BLOCK_N)
    weight, n_tile, m_tile, first_m, rows = place_in_group(groups_ptr, gl.program_id(0), n_tiles, BLOCK_M)
    if rows <= 0:  # behind the last tile
        return
    if bias_ptr is not None:
        bias_ptr += weight * N
    first_n = n_tile * BLOCK_N
    first_row = weight * N + first_n
    last_row = N - 1 - first_n  # rows past N read the last row; their result is not stored
    row = gl.minimum(gl.arange(0, BLOCK_N, gl.SliceLayout(1, W_COPY)), last_row)[:, None]
    byte = gl.arange(0, STEP_BYTES, gl.SliceLayout(0, W_COPY))[None, :]
    if not EVEN:
        byte += row * 0  # for the shape
    w_ptrs = weight_ptr + first_row * PAIRS + (row * PAIRS + byte)
    width = PAIRS * 2 if EVEN else gl.cdiv(PAIRS, STEP_BYTES) * (STEP_BYTES * 2)
    x_ptr += m_tile * width.to(gl.int64) * BLOCK_M
    first_block = first_row * B
    absmax_row = gl.minimum(gl.arange(0, BLOCK_N, gl.SliceLayout(1, ABSMAX_COPY)), last_row)[:, None]
    part = gl.arange(0, 4, gl.SliceLayout(0, ABSMAX_COPY))[None, :]

    steps = PAIRS // STEP_BYTES if EVEN else gl.cdiv(PAIRS, STEP_BYTES)
    # The loop runs at least once. Otherwise a second path initializes the sums, and ptxas serializes every product.
    start = run(ZERO_ASM, "=r,r", [t0])
    gl.assume(start < steps)
    for i in gl.static_range(2):
        if start + i < steps:
            _copy_weights(
                start + i, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr + first_block, absmax_row, part, PAIRS, B,
                nested_ptr, BLOCK_SIZE, EVEN,
            )  # fmt: skip
        async_copy.commit_group()
    # While the copies are on their way: a stack has many programs of few steps.
    table, bank = fill_table(t0, t1, t2, t3, t4, t5, t6, t7)
    if nested_ptr is not None:
        value, nested = load_scales(absmax_ptr, first_block, absmax_row, start, part, B, nested_ptr, BLOCK_SIZE, EVEN)
        for i in gl.static_range(2):  # the next ones are on their way while these are looked up
            value_before, nested_before = value, nested
            value, nested = load_scales(
                absmax_ptr, first_block, absmax_row, gl.minimum(start + i + 1, steps - 1), part, B, nested_ptr,
                BLOCK_SIZE, EVEN,
            )  # fmt: skip
            scales = scales_of(value_before, nested_before, nested_ptr, offset_ptr, code_ptr)
            absmax_smem.index((start + i) % W_STAGES).store(scales)
    else:
        value = 0
        nested = 0
    tile_of = (
        x_ptr, x_smem, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr, first_block, absmax_row, part, value, nested,
        nested_ptr, offset_ptr, code_ptr, table, bank, PAIRS, B, start, steps,
    )  # fmt: skip
    place = first_m, first_n, rows, N
    if BLOCK_M == LEAST_M:
        _multiply(tile_of, place, bias_ptr, out_ptr, BLOCK_SIZE, EVEN, BLOCK_M, BLOCK_M)
    elif rows <= LEAST_M:
        _multiply(tile_of, place, bias_ptr, out_ptr, BLOCK_SIZE, EVEN, BLOCK_M, LEAST_M)
    else:
        _multiply(tile_of, place, bias_ptr, out_ptr, BLOCK_SIZE, EVEN, BLOCK_M, BLOCK_M)


def linear_4bit_wgmma(
    x: Tensor, packed: Packed4, bias: Tensor | None, out: Tensor, config: WgmmaConfig, stops: Tensor
) -> None:
    """out [M, N] = each row of x [M, K] times its weight of packed [E, N, K/2] transposed, plus its bias of [E, N].

    All contiguous. K % 64 == 0, block_size >= 64, x and weight aligned to 16 bytes; any M. `stops` says where the rows
    of each weight end. Rows behind the last are zeroed.
    """
    e, n, pairs = packed.weight.shape
    steps = ceil_div(pairs, STEP_BYTES.value)
    _, count = split_workspace(0, 1, 0, x.device)
    groups = group_tokens(stops, e, config.block_m, count, out)
    x_tiles = tile_tokens(x, config.block_m, steps * 2 * STEP_BYTES.value, count, groups)
    launch(
        _linear_4bit_wgmma_kernel, (ceil_div(n, BLOCK_N.value) * len(groups),),
        x_tiles, packed.weight, packed.absmax, bias, *packed.nested, out, groups,
        n, pairs, packed.absmax.shape[-1], *code_tables(packed.quant_type, x.dtype),
        BLOCK_SIZE=packed.block_size, EVEN=pairs % STEP_BYTES.value == 0, BLOCK_M=config.block_m,
        options={"num_warps": WARPS, "maxnreg": REGISTERS, "launch_pdl": True},
    )  # fmt: skip
