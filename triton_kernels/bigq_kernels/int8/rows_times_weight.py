"""Rows of dY times the int8 weights of a stack, each row by its own: the gradient of x in a product with the stack.

A program takes up to BLOCK_M rows of one weight and a tile of K, and goes over N. Codes become weights in registers:
those of `dequantize_int8`, but for a rounding in float32. They go through shared memory to the tensor cores.
"""

import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.choice import GradientConfig
from bigq_kernels.gpu import Gpu
from bigq_kernels.groups import group_tokens, most_tiles, place_in_group
from bigq_kernels.launch import launch
from bigq_kernels.split_k import split_workspace
from bigq_kernels.tiles import ceil_div

__all__ = ["multiply_by_rows"]


@triton.jit
def _rows_times_weight_kernel(
    grad_ptr,  # [S, N]
    weight_ptr,  # [E, N, K] int8
    absmax_ptr,  # [E, N, 1] float32
    out_ptr,  # [S, K]
    groups_ptr,  # of `group_tokens`
    N,
    K,
    EVEN_N: tl.constexpr,  # N is whole steps
    EVEN_K: tl.constexpr,  # K is whole tiles
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    tl.static_assert(BLOCK_N >= 64)  # see the kernel of 4-bit weights
    if PDL:
        tl.extra.cuda.gdc_wait()
    k_tiles = tl.cdiv(K, BLOCK_K)
    weight, k_tile, _, first_m, M = place_in_group(groups_ptr, tl.program_id(0), k_tiles, BLOCK_M)
    if M <= 0:
        return
    token, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    column = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    in_m, in_k = (token < M)[:, None], (column < K)[None, :]
    grad_ptr += first_m * N
    weight_row = weight * N

    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, N, BLOCK_N):
        in_grad, own = in_m, n
        if not EVEN_N:
            in_grad = in_m & (start + n < N)[None, :]
            own = tl.minimum(n, N - 1 - start)  # its values are multiplied by zeros
        grad = tl.load(grad_ptr + start + (token[:, None] * N + n[None, :]), mask=in_grad, other=0)
        weight_ptrs = weight_ptr + (weight_row + start) * K + (own[:, None] * K + column[None, :])
        codes = tl.load(weight_ptrs) if EVEN_K else tl.load(weight_ptrs, mask=in_k, other=0)
        absmax = tl.load(absmax_ptr + weight_row + start + own)
        values = codes.to(tl.float32) * (absmax * (1.0 / 127.0))[:, None]
        total = tl.dot(grad, values.to(DTYPE), total)

    offset = token.to(tl.int64)[:, None] * K + column[None, :]
    tl.store(out_ptr + first_m * K + offset, total.to(DTYPE), mask=in_m & in_k)


def multiply_by_rows(
    grad: Tensor, weight: Tensor, absmax: Tensor, out: Tensor, config: GradientConfig, stops: Tensor
) -> None:
    """out [S, K] = grad [S, N] times int8 [E, N, K] with absmax [E, N, 1], each row by its own weight, all contiguous.

    Weight e multiplies the rows from stops[e - 1] (0 for the first) up to stops[e]; rows behind the last become zeros.
    """
    e, n, k = weight.shape
    pdl = Gpu.of(grad.device).pdl
    _, count = split_workspace(0, 1, 0, grad.device)
    groups = group_tokens(stops, e, config.block_m, count, out)
    tiles = most_tiles(len(grad), e, config.block_m) * ceil_div(k, config.block_k)
    launch(
        _rows_times_weight_kernel, (tiles,), grad, weight, absmax, out, groups, n, k,
        EVEN_N=n % config.block_n == 0, EVEN_K=k % config.block_k == 0, PDL=pdl,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        options={"num_warps": config.warps, "num_stages": config.stages, "launch_pdl": pdl},
    )  # fmt: skip
