"""LLM.int8(): outlier columns of x in its own dtype, the rest in int8, both summed by one GEMM kernel.

Which columns are outliers is known on the device only. They are compacted there into an index list and a count, and the
GEMM reads its second loop's bound from that count: no host synchronization, static shapes, capturable in a CUDA graph.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.launch import launch
from bigq_kernels.tiles import absmax_bits, ceil_div, encode_int8, int8_inverse, next_power_of_2

__all__ = ["linear_int8"]

MAX_SCAN_ROWS = 16  # rows of x one program scans for outliers; more are first reduced to this many


@triton.jit
def _quantize_few_rows_kernel(
    x_ptr,  # [M, K], M <= BLOCK_M
    codes_ptr,  # [M, K] int8
    scale_ptr,  # [M] float32
    index_ptr,  # [K] int32: the outlier columns, ascending
    count_ptr,  # [1] int32
    M,
    K,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All of what the three kernels below do, in one launch: each program quantizes a row and scans all rows."""
    program = tl.program_id(0)
    row = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    x_row_ptr = x_ptr + program * K
    largest = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_row_ptr + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, absmax_bits(tl.where(tl.abs(x) >= threshold, 0.0, x)))
    scale = tl.max(largest, axis=0).to(tl.float32, bitcast=True)  # NaN stays NaN here and makes the row NaN
    inverse = int8_inverse(scale)
    count = 0
    for start in range(0, K, BLOCK_K):
        column = start + columns
        in_k = column < K
        mask = (row < M)[:, None] & in_k[None, :]
        rows = tl.load(x_ptr + row[:, None] * K + column[None, :], mask=mask, other=0.0).to(tl.float32)
        found = tl.max((tl.abs(rows) >= threshold).to(tl.int32), axis=0)
        x = tl.load(x_row_ptr + column, mask=in_k, other=0.0).to(tl.float32)
        tl.store(codes_ptr + program * K + column, encode_int8(tl.where(found != 0, 0.0, x), inverse), mask=in_k)
        if program == 0:
            position = count + tl.cumsum(found, axis=0) - found
            tl.store(index_ptr + position, column, mask=found != 0)
            count += tl.sum(found, axis=0)
    tl.store(scale_ptr + program, scale)
    if program == 0:
        tl.store(count_ptr, count)


@triton.jit
def _reduce_outliers_kernel(
    x_ptr, partial_ptr, M, K, threshold, rows_per_split, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """partial [MAX_SCAN_ROWS, K]: Inf where a column has an outlier in that slice of the rows, else 0."""
    split = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    found = tl.zeros((BLOCK_K,), tl.int32)
    stop = min(M, (split + 1) * rows_per_split)
    for start in range(split * rows_per_split, stop, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        mask = (row < stop)[:, None] & (column < K)[None, :]
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * K + column[None, :], mask=mask, other=0.0).to(tl.float32)
        found |= tl.max((tl.abs(x) >= threshold).to(tl.int32), axis=0)
    value = tl.where(found != 0, float("inf"), 0.0).to(partial_ptr.dtype.element_ty)
    tl.store(partial_ptr + split.to(tl.int64) * K + column, value, mask=column < K)


@triton.jit
def _compact_outliers_kernel(
    x_ptr,  # [M, K], M <= BLOCK_M
    is_outlier_ptr,  # [K] uint8
    index_ptr,  # [K] int32: the outlier columns, ascending
    count_ptr,  # [1] int32
    M,
    K,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.arange(0, BLOCK_M)
    count = 0
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        mask = (row < M)[:, None] & (column < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * K + column[None, :], mask=mask, other=0.0).to(tl.float32)
        found = tl.max((tl.abs(x) >= threshold).to(tl.int32), axis=0)
        position = count + tl.cumsum(found, axis=0) - found
        tl.store(index_ptr + position, column, mask=found != 0)
        tl.store(is_outlier_ptr + column, found.to(tl.uint8), mask=column < K)
        count += tl.sum(found, axis=0)
    tl.store(count_ptr, count)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # [M, K]
    is_outlier_ptr,  # [K] uint8 or None
    codes_ptr,  # [M, K] int8
    scale_ptr,  # [M] float32
    K,
    threshold,
    OUTLIERS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * K
    codes_ptr += row * K
    columns = tl.arange(0, BLOCK_K)
    largest = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
        if OUTLIERS:
            x = tl.where(tl.abs(x) >= threshold, 0.0, x)
        largest = tl.maximum(largest, absmax_bits(x))
    scale = tl.max(largest, axis=0).to(tl.float32, bitcast=True)  # NaN stays NaN here and makes the row NaN
    inverse = int8_inverse(scale)
    for start in range(0, K, BLOCK_K):
        mask = start + columns < K
        x = tl.load(x_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        if OUTLIERS:
            x = tl.where(tl.load(is_outlier_ptr + start + columns, mask=mask, other=0) != 0, 0.0, x)
        tl.store(codes_ptr + start + columns, encode_int8(x, inverse), mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _linear_int8_kernel(
    codes_ptr,  # [M, K] int8: x
    scale_ptr,  # [M] float32
    weight_ptr,  # [N, K] int8
    absmax_ptr,  # [N, 1] float32
    bias_ptr,  # [N] or None
    x_ptr,  # [M, K]
    index_ptr,  # [K] int32 or None
    count_ptr,  # [1] int32 or None
    out_ptr,  # [M, N]
    M,
    N,
    K,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_OUTLIERS: tl.constexpr,
    GROUP_M: tl.constexpr,  # tiles of M that share their tiles of N in L2
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    m = ((first_m + tile % (GROUP_M * tiles_n) % group_m) * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
    n = (tile % (GROUP_M * tiles_n) // group_m * BLOCK_N).to(tl.int64) + tl.arange(0, BLOCK_N)
    # Rows past the end read the last row, or nothing in the loop: 16 copies of one token would load one cache line.
    x_row = tl.minimum(m, M - 1)[:, None] * K
    in_m = (m < M)[:, None]
    weight_row = tl.minimum(n, N - 1)[:, None] * K

    k = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            codes = tl.load(codes_ptr + x_row + start + k, mask=in_m, other=0)
            weight = tl.load(weight_ptr + weight_row + start + k)
        else:
            codes = tl.load(codes_ptr + x_row + start + k, mask=in_m & (start + k < K), other=0)
            weight = tl.load(weight_ptr + weight_row + start + k, mask=start + k < K, other=0)
        total = tl.dot(codes, weight.T, total, out_dtype=tl.int32)
    scale = tl.load(scale_ptr + m, mask=m < M, other=0.0)
    absmax = tl.load(absmax_ptr + n, mask=n < N, other=0.0)
    out = total.to(tl.float32) * (scale[:, None] * absmax[None, :]) * (1.0 / (127.0 * 127.0))

    if index_ptr is not None:
        count = tl.load(count_ptr)
        for start in range(0, count, BLOCK_OUTLIERS):
            outlier = start + tl.arange(0, BLOCK_OUTLIERS)
            in_list = (outlier < count)[None, :]
            column = tl.load(index_ptr + outlier, mask=outlier < count, other=0)[None, :]
            x = tl.load(x_ptr + x_row + column, mask=in_list, other=0.0)
            weight = tl.load(weight_ptr + weight_row + column, mask=in_list, other=0).to(tl.float32)
            dense = (weight * absmax[:, None] * (1.0 / 127.0)).to(x.dtype)
            out = tl.dot(x, dense.T, out, input_precision="ieee")

    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def _config(m: int, n: int, dtype: torch.dtype, outliers: bool) -> tuple[int, int, int, int, int, int | None]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, most registers a thread).

    Few tokens are bound by bytes in flight, many by the tensor cores.
    """
    if m <= 16:
        return 16, 64 if n > 8192 else 32, 256, 4, 4, None  # 128 programs at N = 4096, each with 48 KiB in flight
    if dtype == torch.float32 and outliers:
        return 64, 32, 128, 4, 4, None  # the float32 product has no tensor core: a larger tile spills
    if m <= 64:
        return 64, 64 if n > 8192 else 32, 128, 4, 4, None
    if m <= 256 or n <= 2048:
        return 128, 64, 128, 4, 4, None
    if m > 1024:
        return 128, 128, 128, 8, 3, 128  # two programs an SM: 384 us at 4096 x 14336 x 4096, 460 for the tile below
    return 128, 256, 128, 8, 3, None


@cache
def _rounded(threshold: float, dtype: torch.dtype) -> float:
    """The threshold as torch compares it: rounded to the dtype of x."""
    return torch.tensor(threshold, dtype=dtype, device="cpu").item()


def _find_outliers(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """(is_outlier uint8 [K], index int32 [K] of which the first count are set, count int32 [1]) of x [M, K]."""
    m, k = x.shape
    is_outlier = torch.empty(k, dtype=torch.uint8, device=x.device)
    index = torch.empty(k, dtype=torch.int32, device=x.device)
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    partial = torch.empty(MAX_SCAN_ROWS, k, dtype=x.dtype, device=x.device)
    grid = (ceil_div(k, 256), MAX_SCAN_ROWS)
    rows = ceil_div(m, MAX_SCAN_ROWS)
    _reduce_outliers_kernel[grid](x, partial, m, k, threshold, rows, BLOCK_M=16, BLOCK_K=256)
    block_k = min(1024, next_power_of_2(max(k, 16)))
    _compact_outliers_kernel[(1,)](
        partial, is_outlier, index, count, MAX_SCAN_ROWS, k, threshold, MAX_SCAN_ROWS, BLOCK_K=block_k, num_warps=8
    )
    return is_outlier, index, count


def _quantize_tokens(
    x: Tensor, codes: Tensor, scale: Tensor, threshold: float
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Fill codes [M, K] and scale [M] from x, and return the (index, count) of its outlier columns if asked for."""
    m, k = x.shape
    block_k = next_power_of_2(max(k, 16))
    if threshold > 0 and m <= MAX_SCAN_ROWS:
        index = torch.empty(k, dtype=torch.int32, device=x.device)
        count = torch.empty(1, dtype=torch.int32, device=x.device)
        block_m = next_power_of_2(m)
        launch(
            _quantize_few_rows_kernel,
            (m,),
            x,
            codes,
            scale,
            index,
            count,
            m,
            k,
            threshold,
            BLOCK_M=block_m,
            BLOCK_K=min(4096, 16384 // block_m, block_k),
            options={"num_warps": 8, "enable_fp_fusion": False},  # see encode_int8
        )
        return index, count
    outliers = _find_outliers(x, threshold) if threshold > 0 else (None, None, None)
    launch(
        _quantize_rows_kernel,
        (m,),
        x,
        outliers[0],
        codes,
        scale,
        k,
        threshold,
        OUTLIERS=threshold > 0,
        BLOCK_K=min(4096, block_k),
        options={"enable_fp_fusion": False},  # see encode_int8
    )
    return outliers[1:]


def linear_int8(x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """x [..., K] times int8 [N, K] transposed, plus bias [N], in x's dtype; threshold 0 means no outliers."""
    n, k = weight.shape
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    m = out.numel() // n
    rows = x.reshape(m, k).contiguous()
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    block_m, block_n, block_k, warps, stages, registers = _config(m, n, x.dtype, threshold > 0)
    with torch.cuda.device_of(x):
        index, count = _quantize_tokens(rows, codes, scale, _rounded(threshold, x.dtype))
        launch(
            _linear_int8_kernel,
            (ceil_div(m, block_m) * ceil_div(n, block_n),),
            codes,
            scale,
            weight.contiguous(),
            absmax.contiguous(),
            bias,
            rows,
            index,
            count,
            out,
            m,
            n,
            k,
            EVEN_K=k % block_k == 0,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_OUTLIERS=32,
            GROUP_M=8,
            options={"num_warps": warps, "num_stages": stages, "maxnreg": registers},
        )
    return out
