"""Multiply by a 4-bit weight: decoded in registers for a few tokens, dequantized for cuBLAS for many.

The fused kernel is bound by instructions, not bytes: on an H200 the memory delivers 29 codes a clock to an SM that can
issue 4.4 instructions for each. Hence the shape of `_linear_4bit_kernel`:

- swapped operands: the weight is the 16-row side of the MMA, the tokens its 8-column side: 1 to 8 tokens cost the same;
- codes are looked up with PRMT straight into the operand's registers, and absmax scales the float32 sum of a block;
- each warp takes other blocks of K, as one batch of a batched dot, and the partial sums meet in the program's last
  instruction: K is split without atomics, workspace or second launch, and the sum has one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from bigq_kernels.dequantize_4bit import dequantize_4bit
from bigq_kernels.dequantize_absmax import dequantize_absmax
from bigq_kernels.quantize_absmax import nested_code
from bigq_kernels.tiles import NESTED_BLOCK_SIZE, decode_pair

__all__ = ["linear_4bit"]

MAX_FUSED_M = 64  # above, the bf16 GEMM of cuBLAS after one dequantization is faster


@triton.jit(do_not_specialize=["M"])  # a new number of tokens compiles nothing
def _linear_4bit_kernel(
    x_ptr,  # [M, K / 2] int32: elements 2i (low half) and 2i + 1 (high half) of a row of x
    weight_ptr,  # [N, K / 2] uint8: element 2i in the high nibble
    absmax_ptr,  # [N, B] float32, or uint8 if NESTED
    bias_ptr,  # [N] or None
    nested_ptr,  # [ceil(N * B / 256)] float32 or None
    offset_ptr,  # [1] float32 or None
    code_ptr,  # [256] float32 or None
    out_ptr,  # [M, N]
    M,
    N,
    PAIRS,  # K / 2: the row stride of x and weight
    B,
    QUANT_TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    EVEN_K: tl.constexpr,  # K divides into whole steps: no masks in the loop
    USE_PRMT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,  # slices of K, one a warp
    UNROLL: tl.constexpr,
):
    GROUP: tl.constexpr = min(BLOCK_SIZE, 64)  # elements of K in one dot; they share one absmax
    HALF: tl.constexpr = GROUP // 2
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    # Rows past N read the last row instead of taking a mask; their result is not stored.
    row = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_row).to(tl.int32))
    token = tl.arange(0, BLOCK_M)
    split = tl.arange(0, SPLIT)
    pair = split[:, None, None] * HALF + tl.arange(0, HALF)[None, None, :]  # [SPLIT, 1, HALF]
    in_tokens = (token < M)[None, :, None]

    weight_ptrs = weight_ptr + first_row * PAIRS + (row[None, :, None] * PAIRS + pair)
    x_ptrs = x_ptr + (token[None, :, None] * PAIRS + pair)
    first_block = first_row * B
    block_row = row[None, :] * B  # [1, BLOCK_N]

    total = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, tl.cdiv(PAIRS, HALF), SPLIT * UNROLL):
        for step in tl.static_range(UNROLL):
            group = start + step * SPLIT
            in_k = in_tokens
            block = block_row + (group + split[:, None]) * GROUP // BLOCK_SIZE  # [SPLIT, BLOCK_N]
            if EVEN_K:
                packed = tl.load(weight_ptrs + group * HALF, eviction_policy="evict_first")
                scale = tl.load(absmax_ptr + first_block + block)
            else:
                in_row = group * HALF + pair < PAIRS
                in_k = in_tokens & in_row
                packed = tl.load(weight_ptrs + group * HALF, mask=in_row, other=0, eviction_policy="evict_first")
                in_blocks = (group + split[:, None]) * HALF < PAIRS
                scale = tl.load(absmax_ptr + first_block + block, mask=in_blocks, other=0)
            if NESTED:
                index = first_block + block
                if not EVEN_K:
                    index = tl.where((group + split[:, None]) * HALF < PAIRS, index, 0)
                nested = tl.load(nested_ptr + index // NESTED_BLOCK_SIZE)
                scale = tl.load(code_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)
            x = tl.load(x_ptrs + group * HALF, mask=in_k, other=0).to(tl.uint32, bitcast=True)
            x_even = (x & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
            x_odd = (x >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
            high, low = decode_pair(packed, QUANT_TYPE, DTYPE, USE_PRMT)
            product = tl.dot(high, tl.permute(x_even, (0, 2, 1)))
            product = tl.dot(low, tl.permute(x_odd, (0, 2, 1)), product)
            total += product * scale[:, :, None]  # after the dot: once a block, and the decoded codes stay exact
    out = tl.sum(total, axis=0)  # [BLOCK_N, BLOCK_M]

    n = first_row + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + token.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_ptrs, out.to(DTYPE), mask=(token < M)[None, :] & (n < N)[:, None])


def _config(m: int, n: int, groups: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, SPLIT, UNROLL, stages) for m tokens, n rows and `groups` dots along K.

    More rows a program means less traffic of x from L2 and fewer programs; about 2000 warps fill 132 SMs.
    """
    block_m = max(8, triton.next_power_of_2(m))
    if block_m == 8:
        block_n, split, unroll, stages = (16, 8, 2, 3) if n <= 8192 else (32, 4, 2, 3)
    elif block_m <= 32:
        block_n, split, unroll, stages = (32, 8, 1, 3) if n <= 8192 else (32, 4, 1, 3)
    else:
        block_n, split, unroll, stages = 32, 4, 1, 2  # 64 rows would spill 592 bytes a thread
    while split > groups:
        split //= 2
    return block_m, block_n, split, unroll, stages


def _fuses(x: Tensor, m: int) -> bool:
    """Whether the fused kernel takes x: 16-bit, few tokens, rows of x and weight that are whole 16-byte vectors."""
    return 0 < m <= MAX_FUSED_M and x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] % 32 == 0


def linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
) -> Tensor:
    """x [..., K] times packed [N, ceil(K/2)] transposed, plus bias [N], in x's dtype; absmax is uint8 if nested."""
    n, k = weight.shape[0], x.shape[-1]
    m = x.numel() // k if k else 0
    if not _fuses(x, m) or n == 0:
        if nested_absmax is not None and nested_offset is not None:
            absmax = dequantize_absmax(absmax, nested_absmax, nested_offset)
        dense = dequantize_4bit(weight, absmax, quant_type, block_size, k, x.dtype)
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))

    rows = x.reshape(m, k).contiguous()
    if rows.storage_offset() % 2:
        rows = rows.clone()  # pairs are read as int32, which have to be aligned
    group = min(block_size, 64)
    groups = triton.cdiv(k, group)
    block_m, block_n, split, unroll, stages = _config(m, n, groups)
    nested = nested_absmax is not None
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _linear_4bit_kernel[(triton.cdiv(n, block_n),)](
            rows.view(torch.int32),
            weight.contiguous(),
            absmax.contiguous(),
            bias,
            nested_absmax,
            nested_offset,
            nested_code(x.device) if nested else None,
            out,
            m,
            n,
            k // 2,
            absmax.shape[1],
            QUANT_TYPE=quant_type,
            BLOCK_SIZE=block_size,
            NESTED=nested,
            EVEN_K=k % (group * split * unroll) == 0,
            USE_PRMT=x.is_cuda and torch.version.cuda is not None and not triton.knobs.runtime.interpret,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            SPLIT=split,
            UNROLL=unroll,
            num_warps=split,
            num_stages=stages,
        )
    return out
