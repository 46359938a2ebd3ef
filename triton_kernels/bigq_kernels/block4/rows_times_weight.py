"""Rows of dY times the 4-bit weights of a stack, each row by its own: the gradient of x in a product with the stack.

dX[s, k] is the sum over n of dY[s, n] * W[e, n, k]. So the scales of W's rows stand inside of the sum.

- A program takes up to BLOCK_M rows of one weight and a tile of K, and goes over N. Without rows it ends at once.
- Codes are decoded and scaled in registers, two to an instruction, and go through shared memory to the tensor cores.
  High nibbles are the even elements of K and low nibbles the odd ones: two products.
- A code times its scale is rounded once to the dtype of dY. The scale is the sum of two numbers of that dtype, and the
  code is one of that dtype, as in the forward pass.
"""

import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.block4.absmax import load_absmax
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.choice import GradientConfig
from bigq_kernels.gpu import Gpu
from bigq_kernels.groups import group_tokens, most_tiles, place_in_group
from bigq_kernels.launch import launch
from bigq_kernels.split_k import split_workspace
from bigq_kernels.tiles import ceil_div, code_table, decode_pair, lookup

__all__ = ["multiply_by_rows"]


def _scaled_asm(dtype: str) -> str:
    """PTX: four values ($2, $3) times scales that are sums, of $4 and $5 and of $6 and $7, rounded once.

    Each value has a scale of its own: Triton does not say that the four come from one row.
    """
    lines = [
        f"fma.rn.{dtype}x2 least, ${i + 2}, ${i + 6}, zero;\nfma.rn.{dtype}x2 ${i}, ${i + 2}, ${i + 4}, least;"
        for i in range(2)
    ]  # zero is -0.0, which makes the first a product: sm_80 has no other one of bfloat16
    return "{\n.reg .b32 least, zero;\nmov.b32 zero, 0x80008000;\n" + "\n".join(lines) + "\n}"


_BF16_SCALED = tl.constexpr(_scaled_asm("bf16"))
_FP16_SCALED = tl.constexpr(_scaled_asm("f16"))


@triton.jit
def _scaled(value, near, rest):
    ASM: tl.constexpr = _BF16_SCALED if value.dtype.is_bf16() else _FP16_SCALED
    args = [value, near, rest]
    return tl.inline_asm_elementwise(ASM, "=&r,=&r,r,r,r,r,r,r", args, dtype=value.dtype, is_pure=True, pack=4)


@triton.jit
def _weights(packed, absmax, QUANT_TYPE: tl.constexpr, DTYPE: tl.constexpr, USE_PRMT: tl.constexpr):
    """(values of the high nibbles, of the low nibbles) of a uint8 tile, times the absmax of each row, in DTYPE."""
    if USE_PRMT:
        high, low = decode_pair(packed, QUANT_TYPE, DTYPE, USE_PRMT)
        MOST: tl.constexpr = 65504.0 if tl.float16 == DTYPE else 3.38e38  # that DTYPE has
        near = tl.minimum(tl.maximum(absmax, -MOST), MOST).to(DTYPE)
        rest = (absmax - near.to(tl.float32)).to(DTYPE)
        near, rest = tl.broadcast_to(near[:, None], packed.shape), tl.broadcast_to(rest[:, None], packed.shape)
        return _scaled(high, near, rest), _scaled(low, near, rest)
    else:
        table = code_table(QUANT_TYPE).to(DTYPE).to(tl.float32)
        high, low = lookup(table, packed >> 4), lookup(table, packed & 15)
        return (high * absmax[:, None]).to(DTYPE), (low * absmax[:, None]).to(DTYPE)


@triton.jit
def _rows_times_weight_kernel(
    grad_ptr,  # [S, N]
    weight_ptr,  # [E, N, PAIRS] uint8: element 2i in the high nibble
    absmax_ptr,  # [E, N, B] float32, or uint8 if nested
    nested_ptr,  # see load_absmax
    offset_ptr,
    code_ptr,
    out_ptr,  # [S, K]
    groups_ptr,  # of `group_tokens`
    N,
    K,
    PAIRS,
    B,
    QUANT_TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EVEN_N: tl.constexpr,  # N is whole steps
    EVEN_K: tl.constexpr,  # K is whole groups
    USE_PRMT: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,  # of K in a tile
):
    GROUP: tl.constexpr = min(BLOCK_SIZE, 64)  # elements of K that share a scale
    HALF: tl.constexpr = GROUP // 2
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    tl.static_assert(BLOCK_N >= 64)  # with 16, Triton 3.6 multiplies wrong rows: a lane takes 8 of mma.sync's operand
    if PDL:
        tl.extra.cuda.gdc_wait()
    k_tiles = tl.cdiv(K, GROUPS * GROUP)
    weight, k_tile, _, first_m, M = place_in_group(groups_ptr, tl.program_id(0), k_tiles, BLOCK_M)
    if M <= 0:
        return
    index = tl.arange(0, BLOCK_N * GROUPS)  # a row of the tile is a group of a row of the weight
    row = index // GROUPS
    group = tl.minimum(k_tile * GROUPS + index % GROUPS, tl.cdiv(K, GROUP) - 1)  # behind K nothing is stored
    byte = group[:, None] * HALF + tl.arange(0, HALF)[None, :]
    token, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    grad_ptr += first_m * N
    in_m = (token < M)[:, None]
    weight_row = weight * N

    even = tl.zeros((BLOCK_M, GROUPS * HALF), tl.float32)
    odd = tl.zeros((BLOCK_M, GROUPS * HALF), tl.float32)
    for start in range(0, N, BLOCK_N):
        in_grad, own = in_m, row
        if not EVEN_N:
            in_grad = in_m & (start + n < N)[None, :]
            own = tl.minimum(row, N - 1 - start)  # its values are multiplied by zeros
        grad = tl.load(grad_ptr + start + (token[:, None] * N + n[None, :]), mask=in_grad, other=0)
        weight_ptrs = weight_ptr + (weight_row + start) * PAIRS + (own[:, None] * PAIRS + byte)
        packed = tl.load(weight_ptrs) if EVEN_K else tl.load(weight_ptrs, mask=byte < PAIRS, other=0)
        place = own * B + (group if BLOCK_SIZE == GROUP else group * GROUP // BLOCK_SIZE)
        absmax = load_absmax(absmax_ptr, (weight_row + start) * B, place, nested_ptr, offset_ptr, code_ptr)
        high, low = _weights(packed, absmax, QUANT_TYPE, DTYPE, USE_PRMT)
        even = tl.dot(grad, high.reshape(BLOCK_N, GROUPS * HALF), even)
        odd = tl.dot(grad, low.reshape(BLOCK_N, GROUPS * HALF), odd)

    column = k_tile * (GROUPS * GROUP) + tl.arange(0, GROUPS * GROUP)
    both = tl.join(even, odd).reshape(BLOCK_M, GROUPS * GROUP).to(DTYPE)
    mask = in_m & (column < K)[None, :]
    tl.store(out_ptr + first_m * K + (token[:, None] * K + column[None, :]), both, mask=mask)


def multiply_by_rows(grad: Tensor, packed: Packed4, out: Tensor, config: GradientConfig, stops: Tensor) -> None:
    """out [S, K] = grad [S, N] times packed [E, N, K/2], each row by its own weight, all contiguous; K % 32 == 0.

    Weight e multiplies the rows from stops[e - 1] (0 for the first) up to stops[e]; rows behind the last become zeros.
    """
    n, k = grad.shape[1], out.shape[1]
    pairs, group = packed.weight.shape[2], min(packed.block_size, 64)
    gpu = Gpu.of(grad.device)
    groups = config.block_k // group
    _, count = split_workspace(0, 1, 0, grad.device)
    token_groups = group_tokens(stops, len(packed.weight), config.block_m, count, out)
    tiles = most_tiles(len(grad), len(packed.weight), config.block_m) * ceil_div(k, config.block_k)
    launch(
        _rows_times_weight_kernel, (tiles,),
        grad, packed.weight, packed.absmax, *packed.nested, out, token_groups, n, k, pairs, packed.absmax.shape[-1],
        QUANT_TYPE=packed.quant_type, BLOCK_SIZE=packed.block_size,
        EVEN_N=n % config.block_n == 0, EVEN_K=k % group == 0, USE_PRMT=gpu.ptx, PDL=gpu.pdl,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUPS=groups,
        options={"num_warps": config.warps, "num_stages": config.stages, "launch_pdl": gpu.pdl},
    )  # fmt: skip
