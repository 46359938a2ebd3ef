"""A few tokens for LLM.int8() as three int8 rows each: the codes, and the outlier columns as a high and a low byte.

All three go through one integer product. So outlier columns need no list and no gathering, and the weight is read once.
The two bytes hold 15 bits of the token's largest outlier. An Inf in x makes its row NaN. Up to 64 Ki numbers, such as
16 tokens of 4096, this is one launch, with a program a token. Beyond, it is two with a program for 256 columns: one for
the scales, one for the codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.int8.tokens import zero_arrivals
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ROUND_MAGIC, absmax_bits, ceil_div, encode_int8, int8_inverse, next_power_of_2

__all__ = ["quantize_planes"]

MAX_ONE_LAUNCH_NUMEL = 16 * 4096  # 5.8 us; 16 tokens of 14336, where a program a token reads half a MB, 19.6
MAX_ONE_LAUNCH_K = 16384
BLOCK_K = 256  # columns of a program where there are more


@triton.jit
def _largest(x, found, threshold, AXIS: tl.constexpr):
    """Bits of the largest regular element and of the largest in outlier columns; NaN stays NaN."""
    regular = absmax_bits(tl.where(tl.abs(x) >= threshold, 0.0, x))
    return tl.max(regular, axis=AXIS), tl.max(absmax_bits(tl.where(found, x, 0.0)), axis=AXIS)


@triton.jit
def _plane_codes(x, inverse):
    """(hi, lo) int8, so that hi * 128 + lo is x * inverse * 128 rounded: 15 bits of the largest value."""
    scaled = x * inverse * 128.0
    scaled = tl.where(tl.abs(scaled) <= 16257.0, scaled, 0.0)  # beside Inf; its scale makes the row NaN
    code = ((scaled + ROUND_MAGIC) - ROUND_MAGIC).to(tl.int32)
    hi = (code + 64) >> 7
    return hi.to(tl.int8), (code - hi * 128).to(tl.int8)


@triton.jit
def _store_planes(codes_ptr, offset, x, found, mask, plane, inverse, outlier_inverse):
    hi, lo = _plane_codes(tl.where(found, x, 0.0), outlier_inverse)
    tl.store(codes_ptr + offset, encode_int8(tl.where(found, 0.0, x), inverse), mask=mask)
    tl.store(codes_ptr + plane + offset, hi, mask=mask)
    tl.store(codes_ptr + 2 * plane + offset, lo, mask=mask)


@triton.jit
def _store_scales(scale_ptr, token, scale, outlier_scale, mask, M):
    """NaN is in one of the two and makes the row NaN."""
    tl.store(scale_ptr + token, scale, mask=mask)
    tl.store(scale_ptr + M + token, outlier_scale, mask=mask)
    tl.store(scale_ptr + 2 * M + token, outlier_scale * (1.0 / 128.0), mask=mask)


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
    BLOCK_K: tl.constexpr,  # at least K
    PDL: tl.constexpr,
):
    """One program a token, which reads the others too for their outliers."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    zero_arrivals(arrived_ptr, tiles)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_K)
    mask = column < K
    x = tl.load(x_ptr + row * K + column, mask=mask, other=0.0).to(tl.float32)
    found = tl.abs(x) >= threshold
    for token in tl.static_range(TOKENS):  # unrolled: a loop would wait for one load after another
        other = tl.load(x_ptr + token * K + column, mask=mask & (tl.full((BLOCK_K,), token, tl.int32) < M), other=0.0)
        found |= tl.abs(other.to(tl.float32)) >= threshold
    regular, outlier = _largest(x, found, threshold, 0)
    scale, outlier_scale = regular.to(tl.float32, bitcast=True), outlier.to(tl.float32, bitcast=True)
    inverse, outlier_inverse = int8_inverse(scale), int8_inverse(outlier_scale)
    _store_planes(codes_ptr, row * K + column, x, found, mask, M * K, inverse, outlier_inverse)
    _store_scales(scale_ptr, row, scale, outlier_scale, row < M, M)


@triton.jit
def _load_tokens(x_ptr, M, K, threshold, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr):
    """This program's columns of all tokens in float32, which of them hold an outlier, their offsets and mask."""
    token = tl.arange(0, TOKENS)[:, None]
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    offset, mask = token * K + column, (token < M) & (column < K)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    found = tl.max((tl.abs(x) >= threshold).to(tl.int32), axis=0) != 0
    return x, found[None, :], offset, mask


@triton.jit(do_not_specialize=["M"])
def _find_largest_kernel(
    x_ptr,  # [M, K]
    largest_ptr,  # [2, programs, TOKENS] int32: see _largest, of each program's columns
    arrived_ptr,  # see zero_arrivals
    M,
    K,
    threshold,
    tiles,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    zero_arrivals(arrived_ptr, tiles)
    x, found, _, _ = _load_tokens(x_ptr, M, K, threshold, TOKENS, BLOCK_K)
    regular, outlier = _largest(x, found, threshold, 1)
    largest_ptr += tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tl.store(largest_ptr, regular)
    tl.store(largest_ptr + tl.num_programs(0) * TOKENS, outlier)


@triton.jit(do_not_specialize=["M"])
def _quantize_columns_kernel(
    x_ptr,  # see _quantize_planes_kernel
    codes_ptr,
    scale_ptr,
    largest_ptr,  # see _find_largest_kernel
    M,
    K,
    threshold,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,  # at least as many as there are
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    x, found, offset, mask = _load_tokens(x_ptr, M, K, threshold, TOKENS, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.arange(0, TOKENS)
    program = tl.arange(0, PROGRAMS)[:, None]
    programs = tl.num_programs(0)
    largest_ptr += program * TOKENS + token[None, :]
    regular = tl.max(tl.load(largest_ptr, mask=program < programs, other=0), axis=0)
    outlier = tl.max(tl.load(largest_ptr + programs * TOKENS, mask=program < programs, other=0), axis=0)
    scale, outlier_scale = regular.to(tl.float32, bitcast=True), outlier.to(tl.float32, bitcast=True)
    inverse, outlier_inverse = int8_inverse(scale)[:, None], int8_inverse(outlier_scale)[:, None]
    _store_planes(codes_ptr, offset, x, found, mask, M * K, inverse, outlier_inverse)
    _store_scales(scale_ptr, token, scale, outlier_scale, token < tl.where(tl.program_id(0) == 0, M, 0), M)


def quantize_planes(x: Tensor, threshold: float, arrived: Tensor | None, pdl: bool) -> tuple[Tensor, Tensor]:
    """Codes int8 [3, M, K] and scales [3, M] of a few tokens; x is the sum of codes * scale / 127.

    The first plane has 0 in every outlier column, the other two hold only those: the high and the low byte. `arrived`
    is zeroed.
    """
    m, k = x.shape
    tokens, tiles = next_power_of_2(max(m, 4)), 0 if arrived is None else arrived.numel()
    codes = torch.empty(3, m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(3, m, dtype=torch.float32, device=x.device)
    if k <= MAX_ONE_LAUNCH_K and tokens * k <= MAX_ONE_LAUNCH_NUMEL:
        launch(
            _quantize_planes_kernel, (m,),
            x, codes, scale, arrived, m, k, threshold, tiles,
            TOKENS=tokens, BLOCK_K=next_power_of_2(max(k, 32)), PDL=pdl,
            # maxnreg: a cap that none reaches. Without one the compiler keeps to 40 registers and four loads in flight.
            # enable_fp_fusion: see encode_int8.
            options={"num_warps": 16, "maxnreg": 128, "enable_fp_fusion": False, "launch_pdl": pdl},
        )  # fmt: skip
        return codes, scale
    programs = ceil_div(k, BLOCK_K)
    largest = torch.empty(2, programs, tokens, dtype=torch.int32, device=x.device)
    launch(
        _find_largest_kernel, (programs,),
        x, largest, arrived, m, k, threshold, tiles,
        TOKENS=tokens, BLOCK_K=BLOCK_K, PDL=pdl,
        options={"num_warps": 8, "launch_pdl": pdl},
    )  # fmt: skip
    launch(
        _quantize_columns_kernel, (programs,),
        x, codes, scale, largest, m, k, threshold,
        TOKENS=tokens, BLOCK_K=BLOCK_K, PROGRAMS=next_power_of_2(programs), PDL=pdl,
        options={"num_warps": 8, "enable_fp_fusion": False, "launch_pdl": pdl},
    )  # fmt: skip
    return codes, scale
