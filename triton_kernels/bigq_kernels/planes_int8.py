"""A few tokens for LLM.int8() as three int8 rows each: the codes, and the outlier columns in 15 bits, high and low.

All three go through one integer product, so that outliers cost no gather: the weight streams by once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.launch import launch
from bigq_kernels.tiles import ROUND_MAGIC, absmax_bits, encode_int8, int8_inverse, next_power_of_2
from bigq_kernels.tokens_int8 import zero_arrivals

__all__ = ["quantize_planes"]


@triton.jit
def _load_with_outliers(x_ptr, row, column, M, K, threshold, TOKENS: tl.constexpr):
    """One tile of a row in float32, and which of its columns hold an outlier of any token."""
    x = tl.load(x_ptr + row * K + column, mask=column < K, other=0.0).to(tl.float32)
    found = tl.abs(x) >= threshold
    for token in tl.static_range(TOKENS):  # unrolled: a loop would wait for one load after another
        other = tl.load(x_ptr + token * K + column, mask=(column < K) & (token < M), other=0.0)
        found |= tl.abs(other.to(tl.float32)) >= threshold
    return x, found


@triton.jit
def _plane_codes(x, inverse):
    """(hi, lo) int8, so that hi * 128 + lo is x * inverse * 128 rounded: 15 bits of the largest value."""
    scaled = x * inverse * 128.0
    scaled = tl.where(tl.abs(scaled) <= 16257.0, scaled, 0.0)  # beside Inf; its scale makes the row NaN
    code = ((scaled + ROUND_MAGIC) - ROUND_MAGIC).to(tl.int32)
    hi = (code + 64) >> 7
    return hi.to(tl.int8), (code - hi * 128).to(tl.int8)


@triton.jit
def _store_planes(codes_ptr, column, x, found, plane, K, inverse, outlier_inverse):
    hi, lo = _plane_codes(tl.where(found, x, 0.0), outlier_inverse)
    tl.store(codes_ptr + column, encode_int8(tl.where(found, 0.0, x), inverse), mask=column < K)
    tl.store(codes_ptr + plane + column, hi, mask=column < K)
    tl.store(codes_ptr + 2 * plane + column, lo, mask=column < K)


@triton.jit(do_not_specialize=["M"])
def _quantize_planes_kernel(
    x_ptr,  # [M, K]
    codes_ptr,  # [3, M, K] int8: outside the outlier columns; inside them, hi and lo
    scale_ptr,  # [3, M] float32
    arrived_ptr,  # see zero_arrivals
    M,
    K,
    threshold,
    tiles,
    TOKENS: tl.constexpr,  # at least M
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    zero_arrivals(arrived_ptr, tiles)
    plane = M * K
    codes_ptr += row * K
    column = tl.arange(0, BLOCK_K)
    x, found = _load_with_outliers(x_ptr, row, column, M, K, threshold, TOKENS)  # kept: most rows are one tile
    regular = absmax_bits(tl.where(tl.abs(x) >= threshold, 0.0, x))
    outlier = absmax_bits(tl.where(found, x, 0.0))
    for start in range(BLOCK_K, K, BLOCK_K):
        more, found_more = _load_with_outliers(x_ptr, row, start + column, M, K, threshold, TOKENS)
        regular = tl.maximum(regular, absmax_bits(tl.where(tl.abs(more) >= threshold, 0.0, more)))
        outlier = tl.maximum(outlier, absmax_bits(tl.where(found_more, more, 0.0)))
    # NaN stays NaN here and makes the row NaN
    scale = tl.max(regular, axis=0).to(tl.float32, bitcast=True)
    outlier_scale = tl.max(outlier, axis=0).to(tl.float32, bitcast=True)
    inverse, outlier_inverse = int8_inverse(scale), int8_inverse(outlier_scale)
    _store_planes(codes_ptr, column, x, found, plane, K, inverse, outlier_inverse)
    for start in range(BLOCK_K, K, BLOCK_K):
        more, found_more = _load_with_outliers(x_ptr, row, start + column, M, K, threshold, TOKENS)
        _store_planes(codes_ptr, start + column, more, found_more, plane, K, inverse, outlier_inverse)
    tl.store(scale_ptr + row, scale)
    tl.store(scale_ptr + M + row, outlier_scale)
    tl.store(scale_ptr + 2 * M + row, outlier_scale * (1.0 / 128.0))


def quantize_planes(
    x: Tensor, threshold: float, tokens: int, arrived: Tensor | None, pdl: bool
) -> tuple[Tensor, Tensor]:
    """Codes int8 [3, M, K] and scales [3, M] of at most `tokens` tokens; x is the sum of codes * scale / 127.

    The first plane has 0 in every outlier column, the other two hold only those: the high and the low byte.
    `arrived` is zeroed.
    """
    m, k = x.shape
    block_k = min(65536 // tokens, 8192, next_power_of_2(max(k, 16)))  # 16384 spills registers
    codes = torch.empty(3, m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(3, m, dtype=torch.float32, device=x.device)
    launch(
        _quantize_planes_kernel,
        (m,),
        x,
        codes,
        scale,
        arrived,
        m,
        k,
        threshold,
        0 if arrived is None else arrived.numel(),
        TOKENS=tokens,
        BLOCK_K=block_k,
        PDL=pdl,
        options={"num_warps": 16, "enable_fp_fusion": False},  # see encode_int8
    )
    return codes, scale
