"""Steps of a tile of the wgmma kernels, in Gluon: their copies, the loop over them, and the store of the tile.

A step is STEP_BYTES of every row of a weight: 256 elements of K, four slices of 64, and the tokens that these meet.
`wgmma` and `wgmma_rounds` say which steps of which tiles a program does.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from bigq_kernels.block4.gluon.operands import code_layout, decode_weights
from bigq_kernels.block4.gluon.scales import (
    barrier,
    copy_async,
    halves,
    load_scales,
    quarters,
    scale_index,
    scale_layout,
    scales_of,
)

__all__ = [
    "STEP_BYTES",
    "allocate_stages",
    "copy_first_tokens",
    "copy_first_weights",
    "loops_of",
    "multiply",
    "scale_copy_layout",
    "store_tile",
    "sums_layout",
    "weight_copy_layout",
]

STEP_BYTES = gl.constexpr(128)  # of a row in one stage of weights
W_STAGES = gl.constexpr(2)  # a step is in registers once its first slice is decoded, and its stage is free then


@gluon.constexpr_function
def _power_of_2(size):
    """The largest in it."""
    return 1 << (size.bit_length() - 1)


@gluon.constexpr_function
def _copied(size):
    """The power of two that holds it."""
    return 1 << (size - 1).bit_length()


@gluon.constexpr_function
def sums_layout(tokens, warps):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, tokens, 16])


@gluon.constexpr_function
def weight_copy_layout(warps):
    return gl.BlockedLayout([1, 16], [4, 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def scale_copy_layout(nested, even, warps):
    """[rows, 4]: 16 bytes a copy, or 4 where the rows of absmax are not aligned: then of 8 rows at once, not of 32.

    Nested ones come through registers, each by one thread.
    """
    each, lanes = ([1, 2], [16, 2]) if nested else ([1, 4], [32, 1]) if even else ([1, 1], [8, 4])
    return gl.BlockedLayout(each, lanes, [warps, 1], [1, 0])


@gluon.jit
def allocate_stages(DTYPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Shared memory for (codes, scales, tokens): two stages of steps, and four of slices."""
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
    return w_smem, absmax_smem, x_smem


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
def copy_first_weights(
    weights, nested_ptr, offset_ptr, code_ptr, PAIRS, B, start, stop, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr
):
    """Start the copies of the first two steps of weights: what `load_scales` loaded for the third, for `multiply`.

    weights: (stages of codes, of scales, pointers to the codes of a tile, byte of the row, absmax_ptr, where the tile
    begins in it (int64), rows of the tile and quarters of a step in `scale_copy_layout`).
    """
    w_smem, absmax_smem, w_ptrs, byte, absmax_ptr, first_block, absmax_row, part = weights
    for i in gl.static_range(2):
        if start + i < stop:
            _copy_weights(
                start + i, w_smem, absmax_smem, w_ptrs, byte, absmax_ptr + first_block, absmax_row, part, PAIRS, B,
                nested_ptr, BLOCK_SIZE, EVEN,
            )  # fmt: skip
        async_copy.commit_group()
    value, nested = gl.to_tensor(0), gl.to_tensor(0)
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
    return value, nested


@gluon.jit
def _token_pointers(x_ptr, TOKENS: gl.constexpr):
    """Of a slice of tokens."""
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
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
def copy_first_tokens(x_smem, x_ptr, start, SIZE: gl.constexpr):
    """Start the copies of the first two slices of SIZE tokens. x_ptr: of the tile, whose slices follow each other."""
    COPIED: gl.constexpr = _copied(SIZE)
    SLICE: gl.constexpr = x_smem[0].shape[0] * 64
    x_ptrs = _token_pointers(x_ptr, COPIED)
    for i in gl.static_range(2):
        _copy_tokens(x_smem[i].slice(0, COPIED), x_ptrs + (start * 4 + i) * SLICE, SIZE)
        async_copy.commit_group()
        async_copy.commit_group()  # as in the loop


@gluon.jit
def multiply(
    weights, x_smem, x_ptr, value, nested, nested_ptr, offset_ptr, code_ptr, bank, PAIRS, B, start, stop,
    BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr, SIZE: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """The sums [rows, tokens] of the steps from `start` up to `stop`, whose first copies have started.

    SIZE: tokens, one or two powers of two, which are a result each. CHUNK: columns of a slice whose products are
    started together, see `loops_of`. bank: where the lane's entries of the table begin.
    """
    w_smem, absmax_smem, w_ptrs, byte, absmax_ptr, first_block, absmax_row, part = weights
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = x_smem[0].dtype
    BLOCK_N: gl.constexpr = w_ptrs.shape[0]
    FIRST: gl.constexpr = _power_of_2(SIZE)
    REST: gl.constexpr = SIZE - FIRST
    SUMS: gl.constexpr = sums_layout(FIRST, WARPS)
    W_OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    CODES: gl.constexpr = code_layout(BLOCK_N, WARPS)
    SCALES: gl.constexpr = scale_layout(BLOCK_N, WARPS)
    SLICE: gl.constexpr = x_smem[0].shape[0] * 64
    COPIED: gl.constexpr = _copied(SIZE)
    x_ptrs = _token_pointers(x_ptr, COPIED)
    # The loop runs at least once. Otherwise a second path initializes the sums, and ptxas serializes every product.
    gl.assume(start < stop)
    total = gl.full([BLOCK_N, FIRST], 0.0, gl.float32, SUMS)
    if REST > 0:
        REST_SUMS: gl.constexpr = sums_layout(REST, WARPS)
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
                _copy_tokens(x_smem[(i + 2) % 4].slice(0, COPIED), x_ptrs + ahead * SLICE, SIZE)
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
                    w = decode_weights(words[i], absmax[i], bank, DTYPE, W_OPERAND)
                elif c % 2 == 0:
                    both = decode_weights(halves(words[i])[c // 2], absmax[i], bank, DTYPE, W_OPERAND)
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
        return (warpgroup_mma_wait(0, deps=[total]),)


@gluon.jit
def store_tile(total, bias_ptr, out_ptr, first_m, first_n, M, N):
    """Store sums [rows, tokens] plus bias to out [M, N], from row first_m and column first_n. first_m is int64."""
    SUMS: gl.constexpr = total.type.layout
    BLOCK_N: gl.constexpr = total.shape[0]
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [BLOCK_N // 8, 256 // BLOCK_N], [1, gl.num_warps()], [0, 1])
    if bias_ptr is not None:
        bias_n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUMS))
        bias = gl.load(bias_ptr + bias_n, mask=bias_n < N, other=0.0)
        total += bias.to(gl.float32)[:, None]
    out = gl.convert_layout(total.to(out_ptr.dtype.element_ty), OUT)  # 16 bytes of an output row a store
    m = gl.arange(0, total.shape[1], gl.SliceLayout(0, OUT))[None, :]
    n = (first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT)))[:, None]
    gl.store(out_ptr + first_m * N + (m.to(gl.int64) * N + n), out, mask=(first_m + m < M) & (n < N))


def loops_of(block_m: int) -> tuple[int, int]:
    """(tokens of the smallest loop of tiles of block_m tokens, columns of K whose products it starts together).

    Two tiles of 8 weights of 28672 x 4096 with 128 rows each take 968 us with 64 columns, 930 with 32 and 915 with 16.
    Smaller tiles leave a tensor core less to do than the decoding of their weight does: 28.1 us with 64 columns and
    29.8 with 32 (64 tokens, 14336 x 4096, H200).
    """
    return max(block_m // 4, 32), 16 if block_m >= 128 else 64
