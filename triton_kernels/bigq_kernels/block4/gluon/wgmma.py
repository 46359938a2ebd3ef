"""Dozens to hundreds of tokens times a 4-bit weight by Hopper's wgmma, with weights decoded into registers, in Gluon.

- The weight is the operand that comes from registers, 64 rows a warp group. The tokens are the one in shared memory, in
  an order of K (`tile_tokens`) for which a lane reads 8 bytes of codes at once.
- While the tensor cores multiply a slice of 64 elements of K, the warps decode the next one: two slices of weights are
  in registers. Triton's own pipeline does not overlap the two.
- absmax is multiplied in after decoding, as 16 bits and a 16-bit rest. Scaling sums instead would take a second set of
  sums, for which 128 tokens and more leave no registers. The weight is rounded once more than `dequantize_4bit` rounds
  it, so outputs may differ in their last bits from those of another way.
- A tile of a stack with fewer tokens than BLOCK_M runs a loop that multiplies fewer. There are up to four loops, since
  a loop's number of tokens is a constant. The rows of a weight are seldom whole tiles.
- K is split over programs where tiles are too few. The last to finish a tile adds the partial sums in their order.

`choose` says where this kernel runs. Gluon has no interpreter, so values are tested on a GPU only.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from bigq_kernels.block4.configs import WgmmaConfig
from bigq_kernels.block4.gluon.groups import place_of_program
from bigq_kernels.block4.gluon.loops import loop_sizes, power_of_2, rest_of, wgmma_sums
from bigq_kernels.block4.gluon.operands import code_layout, decode_weights
from bigq_kernels.block4.gluon.scales import (
    add_tile_splits,
    barrier,
    copy_async,
    halves,
    load_scales,
    quarters,
    scale_index,
    scale_layout,
    scales_of,
)
from bigq_kernels.block4.gluon.table import code_tables, fill_table
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.tokens import tile_tokens
from bigq_kernels.groups import group_tokens, most_tiles
from bigq_kernels.launch import launch
from bigq_kernels.split_k import even_splits, split_workspace
from bigq_kernels.tiles import ceil_div

__all__ = ["linear_4bit_wgmma", "loops_of"]

STEP_BYTES = gl.constexpr(128)  # of a row in one stage of weights: 256 elements of K, four slices of 64
W_STAGES = gl.constexpr(2)  # a step is in registers once its first slice is decoded, and its stage is free then


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
def _token_pointers(x_ptr, TOKENS: gl.constexpr, X_COPY: gl.constexpr):
    """Of a slice of tokens."""
    token = gl.arange(0, TOKENS, gl.SliceLayout(1, X_COPY))[:, None]
    return x_ptr + (token * 64 + gl.arange(0, 64, gl.SliceLayout(0, X_COPY))[None, :])


@gluon.jit
def _copy_tokens(x_smem, x_ptrs, SIZE: gl.constexpr):
    if x_smem.shape[0] == SIZE:
        copy_async(x_smem, x_ptrs)
    else:
        X_COPY: gl.constexpr = x_ptrs.type.layout
        token = gl.arange(0, x_smem.shape[0], gl.SliceLayout(1, X_COPY))[:, None]
        column = gl.arange(0, 64, gl.SliceLayout(0, X_COPY))[None, :]
        copy_async(x_smem, x_ptrs, mask=(token < SIZE) & (column >= 0))


@gluon.jit
def _store(total, bias_ptr, out_ptr, first_m, first_n, M, N, OUT: gl.constexpr):
    """Store sums [BLOCK_N, tokens] plus bias to the rows from first_m of out [M, N]."""
    SUMS: gl.constexpr = total.type.layout
    BLOCK_N: gl.constexpr = total.shape[0]
    if bias_ptr is not None:
        n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUMS))
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0)
        total += bias.to(gl.float32)[:, None]
    out = gl.convert_layout(total.to(out_ptr.dtype.element_ty), OUT)  # 16 bytes of an output row a store
    m = gl.arange(0, total.shape[1], gl.SliceLayout(0, OUT))[None, :]
    n = (first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT)))[:, None]
    gl.store(out_ptr + first_m * N + (m.to(gl.int64) * N + n), out, mask=(first_m + m < M) & (n < N))


@gluon.jit
def _products(
    tile_of, start, stop, DTYPE: gl.constexpr, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, SIZE: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """The sums over steps from start to stop of a tile of the weight and SIZE tokens, in one or two parts.

    tile_of: where the tile's operands are. The copies of two steps of weights have been started.
    """
    (
        x_ptr, x_smem, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr, first_block, absmax_row, part, value, nested,
        nested_ptr, offset_ptr, code_ptr, table, bank, PAIRS, B,
    ) = tile_of  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    FIRST: gl.constexpr = power_of_2(SIZE)
    REST: gl.constexpr = SIZE - FIRST
    SUMS: gl.constexpr = wgmma_sums(FIRST, WARPS)
    W_OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    CODES: gl.constexpr = code_layout(BLOCK_N, WARPS)
    SCALES: gl.constexpr = scale_layout(BLOCK_N, WARPS)
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    SLICE: gl.constexpr = BLOCK_M * 64
    COPIED: gl.constexpr = FIRST if REST == 0 else 2 * FIRST
    first_ptrs = _token_pointers(x_ptr, COPIED, X_COPY)
    for i in gl.static_range(2):
        _copy_tokens(x_smem[i].slice(0, COPIED), first_ptrs + (start * 4 + i) * SLICE, SIZE)
        async_copy.commit_group()
        async_copy.commit_group()  # as in the loop
    total = gl.full([BLOCK_N, FIRST], 0.0, gl.float32, SUMS)
    if REST > 0:
        REST_SUMS: gl.constexpr = wgmma_sums(REST, WARPS)
        rest = gl.full([BLOCK_N, REST], 0.0, gl.float32, REST_SUMS)
    CHUNKS: gl.constexpr = 64 // CHUNK
    before = (gl.full([BLOCK_N, CHUNK], 0.0, DTYPE, W_OPERAND),) * CHUNKS
    for step in range(start, stop):
        for i in gl.static_range(4):
            # Triton's own pipelines do not fence copies for wgmma either. A fence waits for all copies in flight, which
            # would be the longest part of a slice.
            async_copy.wait_group(3)  # two groups a slice: its tokens, and weights
            barrier()  # the slice has landed for all, and nobody reads the stages that are filled next
            ahead = step * 4 + i + 2
            if ahead < stop * 4:
                _copy_tokens(x_smem[(i + 2) % 4].slice(0, COPIED), first_ptrs + ahead * SLICE, SIZE)
            async_copy.commit_group()
            if i == 2 and step + 2 < stop:
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
                    absmax_ptr, first_block, absmax_row, gl.minimum(step + 3, stop - 1), part, B, nested_ptr,
                    BLOCK_SIZE, EVEN,
                )  # fmt: skip
            for c in gl.static_range(CHUNKS):
                if CHUNKS == 1:
                    w = decode_weights(words[i], absmax[i], table, bank, DTYPE, W_OPERAND)
                elif c % 2 == 0:
                    both = decode_weights(halves(words[i])[c // 2], absmax[i], table, bank, DTYPE, W_OPERAND)
                    two = gl.split(both.reshape([BLOCK_N, 2, 16]).permute((0, 2, 1)))
                    w = gl.convert_layout(two[0], W_OPERAND, assert_trivial=True)
                else:
                    w = gl.convert_layout(two[1], W_OPERAND, assert_trivial=True)
                x = x_smem[i].slice(c * CHUNK, CHUNK, dim=1)
                total = warpgroup_mma(w, x.slice(0, FIRST).permute((1, 0)), total, is_async=True)
                # Wait for the products of a slice before, which read before[0].
                if REST > 0:
                    w_rest = gl.convert_layout(w, gl.DotOperandLayout(0, REST_SUMS, 2), assert_trivial=True)
                    rest = warpgroup_mma(w_rest, x.slice(FIRST, REST).permute((1, 0)), rest, is_async=True)
                    total, rest, _ = warpgroup_mma_wait(2 * CHUNKS, deps=[total, rest, before[0]])
                else:
                    total, _ = warpgroup_mma_wait(CHUNKS, deps=[total, before[0]])
                before = before[1:] + (w,)  # noqa: RUF005, Gluon knows no starred tuple
    if REST > 0:
        return warpgroup_mma_wait(0, deps=[total, rest])
    else:
        total = warpgroup_mma_wait(0, deps=[total])
        return total, total


@gluon.jit
def _multiply(
    tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT: gl.constexpr, SIZE: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """The `_products` of a tile, the sum of splits, and the output. place: of the tile, see the kernel."""
    tile, split, first_m, first_n, M, N, start, stop = place
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    total, rest = _products(tile_of, start, stop, DTYPE, BLOCK_SIZE, EVEN, BLOCK_M, BLOCK_N, SIZE, CHUNK)
    FIRST: gl.constexpr = total.shape[1]
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [BLOCK_N // 8, 256 // BLOCK_N], [1, gl.num_warps()], [0, 1])
    is_last = True
    if SPLIT > 1:
        total, is_last = add_tile_splits(total, tile, split, first_m, M, partial_ptr, count_ptr, BLOCK_M, SPLIT)
    if is_last:
        _store(total, bias_ptr, out_ptr, first_m, first_n, M, N, OUT)
        if SIZE > FIRST:
            _store(rest, bias_ptr, out_ptr, first_m + FIRST, first_n, M, N, OUT)


@gluon.jit
def _multiply_least(
    rows, SIZES: gl.constexpr, tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr, BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """`_multiply` with the least of SIZES that holds `rows`, or with the last.

    Branches in a row instead of nested ones take ptxas 60 registers more, and make it serialize products.
    """
    if len(SIZES) == 1:  # noqa: SIM114, for this is decided when it is compiled
        _multiply(
            tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr, BLOCK_SIZE, EVEN, BLOCK_M, BLOCK_N, SPLIT,
            SIZES[0], CHUNK,
        )  # fmt: skip
    elif rows <= SIZES[0]:
        _multiply(
            tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr, BLOCK_SIZE, EVEN, BLOCK_M, BLOCK_N, SPLIT,
            SIZES[0], CHUNK,
        )  # fmt: skip
    else:
        _multiply_least(
            rows, rest_of(SIZES), tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr, BLOCK_SIZE, EVEN,
            BLOCK_M, BLOCK_N, SPLIT, CHUNK,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "steps_per_split"])  # a new number of tokens compiles nothing
def _linear_4bit_wgmma_kernel(
    x_ptr,  # [cdiv(M, BLOCK_M), 4 * steps, BLOCK_M, 64] of `tile_tokens`, the kernel before
    weight_ptr,  # [N, PAIRS] uint8: element 2i in the high nibble
    absmax_ptr,  # [N, B] float32, or uint8 if nested
    bias_ptr,  # [N] or None
    nested_ptr,  # see load_scales
    offset_ptr,
    code_ptr,
    partial_ptr,  # [tiles, SPLIT, BLOCK_N, BLOCK_M] float32
    count_ptr,  # [tiles] int32, zero once the kernel before has ended: how many programs have finished the tile
    out_ptr,  # [M, N]
    groups_ptr,  # of `group_tokens` for a stack of weights, or None
    M,
    N,
    PAIRS,
    B,
    steps_per_split,
    t0, t1, t2, t3, t4, t5, t6, t7,  # code_tables
    BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr,  # K divides into whole steps: no masks
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SPLIT: gl.constexpr,
    LEAST_M: gl.constexpr,  # tokens of the smallest loop: a tile of fewer than BLOCK_M takes the least that holds them
    CHUNK: gl.constexpr,  # columns of a slice whose products are started together
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    ABSMAX_COPY: gl.constexpr = (  # 16 bytes a copy; nested ones come through registers, each by one thread
        gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
        if nested_ptr is None
        else gl.BlockedLayout([1, 2], [16, 2], [WARPS, 1], [1, 0])
    )
    # Triton asks for more than 48 KiB only where its own part is more, and the table is beside it.
    LEAST: gl.constexpr = (49168 - BLOCK_M * 512) // (BLOCK_N * STEP_BYTES) + 1
    w_smem = gl.allocate_shared_memory(
        gl.uint8,
        [W_STAGES if W_STAGES > LEAST else LEAST, BLOCK_N, STEP_BYTES],
        gl.SwizzledSharedLayout(32, 1, 4, order=[1, 0]),
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

    if groups_ptr is None:
        table, bank = fill_table(t0, t1, t2, t3, t4, t5, t6, t7)
    tile, m_tile, first_m, first_n, weight, M = place_of_program(groups_ptr, M, N, BLOCK_M, BLOCK_N)
    first_row = weight * N + first_n
    if groups_ptr is not None:
        if first_m >= M:
            return
        if bias_ptr is not None:
            bias_ptr += weight * N
    split = gl.program_id(1)
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

    start = split * steps_per_split
    stop = gl.minimum(start + steps_per_split, PAIRS // STEP_BYTES if EVEN else gl.cdiv(PAIRS, STEP_BYTES))
    # The loop runs at least once. Otherwise a second path initializes the sums, and ptxas serializes every product.
    gl.assume(start < stop)
    for i in gl.static_range(2):
        if start + i < stop:
            _copy_weights(
                start + i, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr + first_block, absmax_row, part, PAIRS, B,
                nested_ptr, BLOCK_SIZE, EVEN,
            )  # fmt: skip
        async_copy.commit_group()
    if groups_ptr is not None:  # while the copies are on their way: a stack has many programs of few steps
        table, bank = fill_table(t0, t1, t2, t3, t4, t5, t6, t7)
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
    else:
        value = 0
        nested = 0
    if groups_ptr is None:
        gdc_wait()  # for the tokens, and the counts
    tile_of = (
        x_ptr, x_smem, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr, first_block, absmax_row, part, value, nested,
        nested_ptr, offset_ptr, code_ptr, table, bank, PAIRS, B,
    )  # fmt: skip
    place = tile, split, first_m, first_n, M, N, start, stop
    _multiply_least(
        M - first_m, loop_sizes(BLOCK_M, LEAST_M, SPLIT), tile_of, place, bias_ptr, partial_ptr, count_ptr, out_ptr,
        BLOCK_SIZE, EVEN, BLOCK_M, BLOCK_N, SPLIT, CHUNK,
    )  # fmt: skip


def loops_of(block_m: int, *, is_stack: bool) -> tuple[int, int]:
    """(tokens of the smallest loop of tiles of block_m tokens, columns of K whose products it starts together).

    A linear has one loop: 300 tokens of 14336 x 4096 take 102 us with four of them, and 100 with one (H200). Two tiles
    of 8 weights of 28672 x 4096 with 128 rows each take 968 us with 64 columns, 930 with 32 and 915 with 16. Smaller
    tiles leave a tensor core less to do than decoding does: 226 us with 64 columns and 230 with 32, for 32 rows for
    each of 128 weights of 1536 x 2048.
    """
    return (max(block_m // 4, 32), 16 if block_m >= 128 else 64) if is_stack else (block_m, 64)


def linear_4bit_wgmma(
    x: Tensor, packed: Packed4, bias: Tensor | None, out: Tensor, config: WgmmaConfig, stops: Tensor | None = None
) -> None:
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous.

    K % 64 == 0, block_size >= 64, x and weight aligned to 16 bytes; any M. With `stops`, packed is [E, N, K/2] and
    bias [E, N], and each weight multiplies its rows of x.
    """
    m, _ = x.shape
    n, pairs = packed.weight.shape[-2:]
    m_tiles = ceil_div(m, config.block_m) if stops is None else most_tiles(m, len(packed.weight), config.block_m)
    tiles = ceil_div(n, config.block_n) * m_tiles
    steps = ceil_div(pairs, STEP_BYTES.value)
    steps_per_split, split = even_splits(steps, config.split, least=1)
    partial, count = split_workspace(tiles, split, config.block_m * config.block_n, x.device)
    least, chunk = loops_of(config.block_m, is_stack=stops is not None)
    groups = None
    if stops is not None:
        groups = group_tokens(stops, len(packed.weight), config.block_m, count, out)
    x_tiles = tile_tokens(x, config.block_m, steps * 2 * STEP_BYTES.value, count, groups)
    launch(
        _linear_4bit_wgmma_kernel, (tiles, split),
        x_tiles, packed.weight, packed.absmax, bias, *packed.nested, partial, count, out, groups,
        m, n, pairs, packed.absmax.shape[-1], steps_per_split, *code_tables(packed.quant_type, x.dtype),
        BLOCK_SIZE=packed.block_size, EVEN=pairs % STEP_BYTES.value == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split,
        LEAST_M=least, CHUNK=chunk,
        options={"num_warps": config.warps, "maxnreg": config.registers, "launch_pdl": True},
    )  # fmt: skip
