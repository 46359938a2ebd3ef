"""3 to 32 tokens times a 4-bit weight, staged in shared memory and decoded into tensor-core operands, in Gluon.

- A stage holds 128 bytes of each row, which is a line of memory and 256 elements of K, and the tokens they meet, copied
  by cp.async two stages deep. Triton's own pipeline of the same product waits for codes in registers.
- Which element of K comes first is free as long as both operands agree. A lane of the MMA takes 8 consecutive bytes of
  a row, 16 elements. So its codes are one read of 8 bytes, and its tokens two of 16 bytes that are operands as stored.
- One table lookup decodes a word of 8 codes into four registers of two values. absmax scales the sum of a block.
- K is split over programs (`staged_config`). The last to finish a tile adds the partial sums in their order.

Gluon promises no stability between releases of Triton: `choose` takes this kernel with those in GLUON_RELEASES, and
`mma` with others. Gluon has no interpreter, so values are tested on a GPU only.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_wait

from bigq_kernels.block4.configs import StagedConfig
from bigq_kernels.block4.gluon.groups import place_in_group
from bigq_kernels.block4.gluon.operands import code_layout, code_tables, decode_words
from bigq_kernels.block4.gluon.scales import (
    add_splits,
    barrier,
    copy_async,
    load_scales,
    quarters,
    reinterpret,
    scale_layout,
    scales_of,
)
from bigq_kernels.block4.groups import group_tokens, most_tiles
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.gpu import Gpu
from bigq_kernels.launch import launch
from bigq_kernels.split_k import split_workspace, zero_counts
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
def _copy_weights(step, w_smem, w_ptrs, byte, PAIRS, STAGES: gl.constexpr, EVEN: gl.constexpr):
    """Start the copies of STEP_BYTES of every row."""
    w_ptrs += step * STEP_BYTES
    if EVEN:
        copy_async(w_smem.index(step % STAGES), w_ptrs, eviction_policy="evict_first")
    else:
        in_row = byte + step * STEP_BYTES < PAIRS
        copy_async(w_smem.index(step % STAGES), w_ptrs, mask=in_row)


@gluon.jit
def _copy_tokens(step, x_smem, x_ptrs, in_m, column, PAIRS, STAGES: gl.constexpr, EVEN: gl.constexpr):
    """Start the copies of the tokens that a step's weights meet."""
    if not EVEN:
        in_m = in_m & (column + step * (2 * STEP_BYTES) < PAIRS * 2)
    copy_async(x_smem.index(step % STAGES), x_ptrs + step * (2 * STEP_BYTES), mask=in_m)


@gluon.jit(do_not_specialize=["M", "steps_per_split"])  # a new number of tokens compiles nothing
def _linear_4bit_staged_kernel(
    x_ptr,  # [M, K]
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
    QUANT_TYPE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr,  # K divides into whole steps: no masks in the loop
    PDL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SPLIT: gl.constexpr,
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
    w_smem = gl.allocate_shared_memory(
        gl.uint8, [STAGES, BLOCK_N, STEP_BYTES], gl.SwizzledSharedLayout(32, 1, 4, order=[1, 0])
    )
    x_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 4 * BLOCK_M, 64], gl.SwizzledSharedLayout(8, 1, 2, order=[1, 0]))
    x_blocks = reinterpret(x_smem, DTYPE, [STAGES * 4, 64, BLOCK_M], _token_layout(BLOCK_M))

    tile = gl.program_id(0).to(gl.int64)  # of all results; n_tile is that of the weight's rows
    split = gl.program_id(1)
    n_tile, first_weight_row = tile, tile * BLOCK_N
    if groups_ptr is not None:
        if PDL:
            gdc_wait()
        n_tiles = gl.cdiv(N, BLOCK_N)
        weight, n_tile, m_tile, first_m, M = place_in_group(groups_ptr, gl.program_id(0), n_tiles, BLOCK_M)
        if M <= 0:
            return
        tile = m_tile * n_tiles + n_tile
        first_weight_row = weight * N + n_tile * BLOCK_N
        x_ptr += first_m * (PAIRS * 2)
        out_ptr += first_m * N
        if bias_ptr is not None:
            bias_ptr += weight * N
    first_row = n_tile * BLOCK_N
    last_row = (N - 1 - first_row).to(gl.int32)  # rows past N read the last row; their result is not stored
    row = gl.minimum(gl.arange(0, BLOCK_N, gl.SliceLayout(1, W_COPY)), last_row)[:, None]
    byte = gl.arange(0, STEP_BYTES, gl.SliceLayout(0, W_COPY))[None, :] + row * 0
    w_ptrs = weight_ptr + first_weight_row * PAIRS + (row * PAIRS + byte)
    part = gl.arange(0, 4 * BLOCK_M, gl.SliceLayout(1, X_COPY))[:, None]  # 64 elements of a token
    token = part % BLOCK_M
    column = part // BLOCK_M * 64 + gl.arange(0, 64, gl.SliceLayout(0, X_COPY))[None, :]
    x_ptrs = x_ptr + (token * (PAIRS * 2) + column)
    in_m = (token < M) & (column >= 0)  # the second for the shape
    absmax_row = gl.minimum(gl.arange(0, BLOCK_N, gl.SliceLayout(1, SCALES)), last_row)[:, None]
    quarter = gl.arange(0, 4, gl.SliceLayout(0, SCALES))[None, :]
    first_block = first_weight_row * B

    start = split * steps_per_split
    stop = gl.minimum(start + steps_per_split, gl.cdiv(PAIRS, STEP_BYTES))
    for i in gl.static_range(STAGES - 1):
        if start + i < stop:
            _copy_weights(start + i, w_smem, w_ptrs, byte, PAIRS, STAGES, EVEN)
    value, nested = load_scales(absmax_ptr, first_block, absmax_row, start, quarter, B, nested_ptr, BLOCK_SIZE, EVEN)
    if PDL and groups_ptr is None:
        gdc_wait()  # for the tokens, and the counts
    for i in gl.static_range(STAGES - 1):
        if start + i < stop:
            _copy_tokens(start + i, x_smem, x_ptrs, in_m, column, PAIRS, STAGES, EVEN)
        async_copy.commit_group()
    zero = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, MMA)
    total = zero
    for step in range(start, stop):
        async_copy.wait_group(STAGES - 2)
        barrier()  # the copies of all threads have landed, and nobody reads the stage that is filled next
        if step + STAGES - 1 < stop:
            _copy_weights(step + STAGES - 1, w_smem, w_ptrs, byte, PAIRS, STAGES, EVEN)
            _copy_tokens(step + STAGES - 1, x_smem, x_ptrs, in_m, column, PAIRS, STAGES, EVEN)
        async_copy.commit_group()
        absmax = quarters(scales_of(value, nested, nested_ptr, offset_ptr, code_ptr))
        ahead = gl.minimum(step + 1, stop - 1)
        value, nested = load_scales(
            absmax_ptr, first_block, absmax_row, ahead, quarter, B, nested_ptr, BLOCK_SIZE, EVEN
        )
        packed = w_smem.index(step % STAGES).load(code_layout(BLOCK_N, WARPS))
        w = decode_words(packed, t0, t1, t2, t3, t4, t5, t6, t7, QUANT_TYPE, DTYPE, W_OPERAND)
        for i in gl.static_range(4):
            x = x_blocks.index(step % STAGES * 4 + i).load(X_OPERAND)
            scale = gl.convert_layout(absmax[i].reshape([BLOCK_N]), gl.SliceLayout(1, MMA), assert_trivial=True)
            total += mma_v2(w[i], x, zero) * scale[:, None]  # once a block, and the decoded codes stay exact

    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA))[None, :]
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
    in_m = (m < M) & (n >= 0)[:, None]  # the second for the shape
    partial_ptrs = partial_ptr + tile * (SPLIT * BLOCK_M * BLOCK_N) + (m + n[:, None] * BLOCK_M)
    is_last = True
    if SPLIT > 1:
        total, is_last = add_splits(total, partial_ptrs, count_ptr + tile, split, in_m, SPLIT)
    if is_last:
        if bias_ptr is not None:
            total += gl.load(bias_ptr + first_row + n, mask=n <= last_row, other=0.0).to(gl.float32)[:, None]
        out_ptrs = out_ptr + first_row + m.to(gl.int64) * N + n[:, None]
        gl.store(out_ptrs, total.to(DTYPE), mask=in_m & (n <= last_row)[:, None])


def linear_4bit_staged(
    x: Tensor, packed: Packed4, bias: Tensor | None, out: Tensor, config: StagedConfig, stops: Tensor | None = None
) -> None:
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous.

    M <= 32, K % 32 == 0, block_size >= 64, x and weight aligned to 16 bytes. With `stops`, packed is [E, N, K/2] and
    bias [E, N], and each weight multiplies its rows, any number, of x.
    """
    m, (n, pairs) = x.shape[0], packed.weight.shape[-2:]
    tiles = ceil_div(n, config.block_n)
    if stops is not None:
        tiles *= most_tiles(m, len(packed.weight), config.block_m)
    split = config.split
    pdl = Gpu.of(x.device).pdl
    partial, count = split_workspace(tiles, split, config.block_m * config.block_n, x.device)
    token_groups = None
    if stops is None:
        zero_counts(count, pdl)
    else:
        token_groups = group_tokens(stops, len(packed.weight), config.block_m, count, out)
    launch(
        _linear_4bit_staged_kernel, (tiles, split),
        x, packed.weight, packed.absmax, bias, *packed.nested, partial, count, out, token_groups,
        m, n, pairs, packed.absmax.shape[-1], config.steps_per_split, *code_tables(packed.quant_type, x.dtype),
        QUANT_TYPE=packed.quant_type, BLOCK_SIZE=packed.block_size, EVEN=pairs % STEP_BYTES.value == 0, PDL=pdl,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=split, STAGES=config.stages,
        options={"num_warps": config.warps, "maxnreg": config.registers, "launch_pdl": pdl},
    )  # fmt: skip
