"""Dozens to hundreds of tokens times a 4-bit weight by Hopper's wgmma, with weights decoded into registers, in Gluon.

- The weight is the operand that comes from registers, 64 rows a warp group. The tokens are the one in shared memory, in
  an order of K (`tile_tokens`) for which a lane reads 8 bytes of codes at once.
- While the tensor cores multiply a slice of 64 elements of K, the warps decode the next one: two slices of weights are
  in registers. Triton's own pipeline does not overlap the two.
- absmax is multiplied in after decoding, as 16 bits and a 16-bit rest. Scaling sums instead would take a second set of
  sums, for which 128 tokens and more leave no registers. The weight is rounded once more than `dequantize_4bit` rounds
  it, so outputs may differ in their last bits from those of another way.
- A tile of fewer tokens than BLOCK_M runs a loop that multiplies fewer. There are up to four loops, since a loop's
  number of tokens is a constant. The rows of a weight of a stack, or a prompt, are seldom whole tiles.
- A weight whose tiles do not fill a GPU, or leave much of it idle in their last round, is multiplied by `wgmma_rounds`.

`choose` says where this kernel runs. Gluon has no interpreter, so values are tested on a GPU only.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from bigq_kernels.block4.configs import WgmmaConfig
from bigq_kernels.block4.gluon.groups import place_in_group
from bigq_kernels.block4.gluon.table import code_tables, fill_table
from bigq_kernels.block4.gluon.wgmma_rounds import linear_4bit_rounds
from bigq_kernels.block4.gluon.wgmma_steps import (
    STEP_BYTES,
    allocate_stages,
    copy_first_tokens,
    copy_first_weights,
    loops_of,
    multiply,
    scale_copy_layout,
    store_tile,
    weight_copy_layout,
)
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.tokens import tile_tokens
from bigq_kernels.groups import group_tokens, most_tiles
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div

__all__ = ["linear_4bit_wgmma"]


@gluon.constexpr_function
def _sizes(block_m, least):
    """The numbers of tokens that a tile has a loop for, ascending: one or two powers of two, multiples of `least`."""
    return tuple(size for size in range(least, block_m + 1, least) if size.bit_count() <= 2)


@gluon.constexpr_function
def _rest_of(sizes):
    return sizes[1:]


@gluon.jit
def _multiply(tile_of, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr, SIZE: gl.constexpr, CHUNK: gl.constexpr):
    """Multiply SIZE tokens of a tile, and store the output.

    tile_of: what the kernel knows of the tile. It has started the copies of two steps of weights.
    """
    (
        weights, x_smem, x_ptr, value, nested, nested_ptr, offset_ptr, code_ptr, bias_ptr, out_ptr, bank, first_m,
        first_n, M, N, PAIRS, B, steps,
    ) = tile_of  # fmt: skip
    copy_first_tokens(x_smem, x_ptr, 0, SIZE)
    sums = multiply(
        weights, x_smem, x_ptr, value, nested, nested_ptr, offset_ptr, code_ptr, bank, PAIRS, B, 0, steps, BLOCK_SIZE,
        EVEN, SIZE, CHUNK,
    )  # fmt: skip
    store_tile(sums[0], bias_ptr, out_ptr, first_m, first_n, M, N)
    if len(sums) == 2:
        store_tile(sums[1], bias_ptr, out_ptr, first_m + sums[0].shape[1], first_n, M, N)


@gluon.jit
def _multiply_least(
    rows, SIZES: gl.constexpr, tile_of, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr, CHUNK: gl.constexpr
):
    """`_multiply` with the least of SIZES that holds `rows`, or with the last.

    Branches in a row instead of nested ones take ptxas 60 registers more, and make it serialize products.
    """
    if len(SIZES) == 1:  # noqa: SIM114, for this is decided when it is compiled
        _multiply(tile_of, BLOCK_SIZE, EVEN, SIZES[0], CHUNK)
    elif rows <= SIZES[0]:
        _multiply(tile_of, BLOCK_SIZE, EVEN, SIZES[0], CHUNK)
    else:
        _multiply_least(rows, _rest_of(SIZES), tile_of, BLOCK_SIZE, EVEN, CHUNK)


@gluon.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _linear_4bit_wgmma_kernel(
    x_ptr,  # [cdiv(M, BLOCK_M), 4 * steps, BLOCK_M, 64] of `tile_tokens`, the kernel before
    weight_ptr,  # [N, PAIRS] uint8: element 2i in the high nibble
    absmax_ptr,  # [N, B] float32, or uint8 if nested
    bias_ptr,  # [N] or None
    nested_ptr,  # see load_scales
    offset_ptr,
    code_ptr,
    out_ptr,  # [M, N]
    groups_ptr,  # of `group_tokens` for a stack of weights, or None
    M,
    N,
    PAIRS,
    B,
    t0, t1, t2, t3, t4, t5, t6, t7,  # code_tables
    BLOCK_SIZE: gl.constexpr,
    EVEN: gl.constexpr,  # K divides into whole steps: no masks
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    LEAST_M: gl.constexpr,  # tokens of the smallest loop: a tile of fewer than BLOCK_M takes the least that holds them
    CHUNK: gl.constexpr,  # columns of a slice whose products are started together
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    W_COPY: gl.constexpr = weight_copy_layout(WARPS)
    ABSMAX_COPY: gl.constexpr = scale_copy_layout(nested_ptr is not None, EVEN, WARPS)
    w_smem, absmax_smem, x_smem = allocate_stages(DTYPE, BLOCK_M, BLOCK_N)

    n_tiles = gl.cdiv(N, BLOCK_N)
    tile = gl.program_id(0)
    if groups_ptr is None:
        # Programs of one tile of the weight follow each other, so it is read once. Tiles of the last tokens, which take
        # less time, come after all others.
        whole = M // BLOCK_M
        is_last_m = tile >= whole * n_tiles
        m_tile = gl.where(is_last_m, whole, tile % gl.maximum(whole, 1)).to(gl.int64)
        first_m = m_tile * BLOCK_M
        first_n = gl.where(is_last_m, tile - whole * n_tiles, tile // gl.maximum(whole, 1)) * BLOCK_N
        first_row = first_n.to(gl.int64)
    else:
        gdc_wait()
        weight, n_tile, m_tile, first_m, M = place_in_group(groups_ptr, tile, n_tiles, BLOCK_M)
        if M <= 0:
            return
        first_n = n_tile * BLOCK_N
        first_row = weight * N + first_n
        if bias_ptr is not None:
            bias_ptr += weight * N
        M += first_m  # the row of x after the last
    last_row = N - 1 - first_n  # rows past N read the last row; their result is not stored
    row = gl.minimum(gl.arange(0, BLOCK_N, gl.SliceLayout(1, W_COPY)), last_row)[:, None]
    byte = gl.arange(0, STEP_BYTES, gl.SliceLayout(0, W_COPY))[None, :]
    if not EVEN:
        byte += row * 0  # for the shape
    w_ptrs = weight_ptr + first_row * PAIRS + (row * PAIRS + byte)
    steps = PAIRS // STEP_BYTES if EVEN else gl.cdiv(PAIRS, STEP_BYTES)
    x_ptr += m_tile * (steps * (2 * STEP_BYTES)).to(gl.int64) * BLOCK_M
    first_block = first_row * B
    absmax_row = gl.minimum(gl.arange(0, BLOCK_N, gl.SliceLayout(1, ABSMAX_COPY)), last_row)[:, None]
    part = gl.arange(0, 4, gl.SliceLayout(0, ABSMAX_COPY))[None, :]

    weights = (w_smem, absmax_smem, w_ptrs, byte, absmax_ptr, first_block, absmax_row, part)
    value, nested = copy_first_weights(weights, nested_ptr, offset_ptr, code_ptr, PAIRS, B, 0, steps, BLOCK_SIZE, EVEN)
    table, bank = fill_table(t0, t1, t2, t3, t4, t5, t6, t7)  # while the copies are on their way
    if groups_ptr is None:
        gdc_wait()  # for the tokens
    SIZES: gl.constexpr = _sizes(BLOCK_M, LEAST_M)
    tile_of = (
        weights, x_smem, x_ptr, value, nested, nested_ptr, offset_ptr, code_ptr, bias_ptr, out_ptr, table + bank,
        first_m, first_n, M, N, PAIRS, B, steps,
    )  # fmt: skip
    _multiply_least(M - first_m, SIZES, tile_of, BLOCK_SIZE, EVEN, CHUNK)


def linear_4bit_wgmma(
    x: Tensor, packed: Packed4, bias: Tensor | None, out: Tensor, config: WgmmaConfig, stops: Tensor | None = None
) -> None:
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous.

    K % 64 == 0, block_size >= 64, x and weight aligned to 16 bytes; any M. With `stops`, packed is [E, N, K/2] and
    bias [E, N], and each weight multiplies its rows of x.
    """
    if config.programs is not None:
        assert stops is None, "a configuration of one weight"
        linear_4bit_rounds(x, packed, bias, out, config)
        return
    (m, _), (n, pairs), e = x.shape, packed.weight.shape[-2:], len(packed.weight)
    m_tiles = ceil_div(m, config.block_m) if stops is None else most_tiles(m, e, config.block_m)
    least, chunk = loops_of(config.block_m)
    count = torch.empty(0, dtype=torch.int32, device=x.device)  # no sums are partial
    groups = None if stops is None else group_tokens(stops, e, config.block_m, count, out)
    x_tiles = tile_tokens(x, config.block_m, ceil_div(pairs, STEP_BYTES.value) * 2 * STEP_BYTES.value, count, groups)
    launch(
        _linear_4bit_wgmma_kernel, (ceil_div(n, config.block_n) * m_tiles,),
        x_tiles, packed.weight, packed.absmax, bias, *packed.nested, out, groups,
        m, n, pairs, packed.absmax.shape[-1], *code_tables(packed.quant_type, x.dtype),
        BLOCK_SIZE=packed.block_size, EVEN=pairs % STEP_BYTES.value == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, LEAST_M=least, CHUNK=chunk,
        options={"num_warps": config.warps, "maxnreg": config.registers, "launch_pdl": True},
    )  # fmt: skip
