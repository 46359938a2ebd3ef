"""One or two tokens times a 4-bit weight, by byte dot products: the kernel behind `linear_4bit` that memory limits.

- A thread takes the same 32, 64 or 96 columns of every row of its program. So each program splits the tokens into
  integers itself, once, and keeps them in registers. That is about 290 instructions for 32 elements, as many as 2 to 3
  rows take. There is one launch and no workspace. `dot_bytes.py` has the arithmetic.
- On Hopper the kernel may start before the one ahead of it has ended. It then reads the first codes and waits for the
  tokens. So a kernel that lets the next one start early must not write a weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.block4.absmax import load_absmax
from bigq_kernels.block4.configs import Dp4aConfig
from bigq_kernels.block4.dot_bytes import BYTE_TABLES, dot_codes, split_token
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.gpu import Gpu
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div

__all__ = ["linear_4bit_dp4a"]

MAX_EARLY_NBYTES = 64 << 20  # H100, early or not: 5.6 and 6.6 us at 4096 x 4096, but 69 and 61 at 8192 x 28672
CHUNK = tl.constexpr(32)  # elements of K in one 16-byte load of codes; they share one scale of the token


@triton.jit
def _load_token(x_ptr, chunk, mask):
    """[C, 4, 8] elements of some chunks, each chunk in one thread."""
    x_ptrs = x_ptr + chunk[:, None] * CHUNK + tl.arange(0, 8)[None, :]
    x0 = tl.load(x_ptrs, mask=mask[:, None], other=0.0)
    x1 = tl.load(x_ptrs + 8, mask=mask[:, None], other=0.0)
    x2 = tl.load(x_ptrs + 16, mask=mask[:, None], other=0.0)
    x3 = tl.load(x_ptrs + 24, mask=mask[:, None], other=0.0)
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.permute(tl.reshape(x, (chunk.shape[0], 8, 4)), (0, 2, 1))


@triton.jit
def _load_rows(
    pointers,
    first,
    N,
    CHUNKS,
    B,
    BLOCK_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COVERS: tl.constexpr,
):
    """Of BLOCK_N rows, for each cover: words int32 [BLOCK_N, BLOCK_C, 4], then absmax [BLOCK_N, BLOCK_C]."""
    weight_ptr, absmax_ptr, nested_ptr, offset_ptr, code_ptr = pointers
    words, absmax = tl.tuple([]), tl.tuple([])
    row = tl.minimum(tl.arange(0, BLOCK_N), N - 1)
    weight_ptr += first.to(tl.int64) * (CHUNKS * 4)
    for c in tl.static_range(COVERS):
        # The shapes of these loads leave Triton one way to lay them out: lanes along a row, all rows in each thread.
        column = c * (4 * BLOCK_C) + tl.arange(0, 4 * BLOCK_C)
        in_k = None if EVEN_K else (column < CHUNKS * 4)[None, :]
        offsets = row[:, None] * (CHUNKS * 4) + column[None, :]
        word = tl.load(weight_ptr + offsets, mask=in_k, eviction_policy="evict_first")
        words += (tl.reshape(word, (BLOCK_N, BLOCK_C, 4)),)
        place = tl.arange(0, BLOCK_N * BLOCK_C)
        chunk = tl.minimum(c * BLOCK_C + place % BLOCK_C, CHUNKS - 1)
        index = tl.minimum(place // BLOCK_C, N - 1) * B + chunk * CHUNK // BLOCK_SIZE
        scale = load_absmax(absmax_ptr, first.to(tl.int64) * B, index, nested_ptr, offset_ptr, code_ptr)
        absmax += (tl.reshape(scale, (BLOCK_N, BLOCK_C)),)
    return words, absmax


@triton.jit(do_not_specialize=["BLOCKS"])
def _linear_4bit_dp4a_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, CHUNKS, 4] int32: 8 codes each
    absmax_ptr,  # [N, B] float32, or uint8 if nested
    bias_ptr,  # [N] or None
    nested_ptr,  # see load_absmax
    offset_ptr,
    code_ptr,
    out_ptr,  # [M, N]
    ids_ptr,  # [S] of a stack of weights: which one multiplies each row of out; or None
    N,
    CHUNKS,
    B,
    E,  # weights of the stack
    repeat,  # rows of out that read one row of x
    BLOCKS,  # of rows that a program takes
    t0, t1, t2, t3, t4, t5, t6, t7,  # BYTE_TABLES: eight arguments, since the interpreter takes no tuple
    QUANT_TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_C times COVERS is all of K, and no more: no masks
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,  # the kernel after may start meanwhile
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,  # a chunk a thread
    COVERS: tl.constexpr,  # chunks that a thread takes of each row
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tables = (t0, t1, t2, t3, t4, t5, t6, t7)
    # The last blocks start early enough to be whole. A row that is computed twice gets the same bits.
    last = tl.maximum(N - BLOCK_N, 0)
    row = tl.minimum(tl.arange(0, BLOCK_N), N - 1)
    n_tile = tl.program_id(0)
    base = 0  # the first row of the weight in a stack
    tokens = CHUNKS  # the chunks of x that are read: none where no weight multiplies the row, whose result is 0
    if ids_ptr is not None:
        if PDL:
            tl.extra.cuda.gdc_wait()
        n_tiles = tl.cdiv(N, BLOCKS * BLOCK_N)
        out_row = n_tile // n_tiles
        n_tile = n_tile % n_tiles
        weight = tl.load(ids_ptr + out_row).to(tl.int64)
        tokens = tl.where((weight >= 0) & (weight < E), CHUNKS, 0)
        base = tl.minimum(tl.maximum(weight, 0), E - 1) * N
        x_ptr += (out_row // repeat).to(tl.int64) * CHUNKS * CHUNK
        out_ptr += out_row.to(tl.int64) * N
        if bias_ptr is not None:
            bias_ptr += base
    first = tl.minimum(n_tile * (BLOCKS * BLOCK_N), last)
    pointers = (weight_ptr, absmax_ptr, nested_ptr, offset_ptr, code_ptr)
    words, absmax = _load_rows(pointers, base + first, N, CHUNKS, B, BLOCK_SIZE, EVEN_K, BLOCK_N, BLOCK_C, COVERS)
    if PDL and ids_ptr is None:
        tl.extra.cuda.gdc_wait()  # the first codes are on their way while another kernel makes x
    planes, scales, excesses = tl.tuple([]), tl.tuple([]), tl.tuple([])
    for c in tl.static_range(COVERS):
        chunk = c * BLOCK_C + tl.arange(0, BLOCK_C)
        for m in tl.static_range(M):
            x = _load_token(x_ptr + m * CHUNKS * CHUNK, chunk, chunk < tokens)
            plane, scale, excess = split_token(x, USE_ASM)
            planes += plane
            scales += (scale,)
            excesses += (excess,)

    for block in range(BLOCKS):
        after = tl.minimum(first + BLOCK_N, last)
        next_words, next_absmax = words, absmax
        if block + 1 < BLOCKS:
            next_words, next_absmax = _load_rows(
                pointers, base + after, N, CHUNKS, B, BLOCK_SIZE, EVEN_K, BLOCK_N, BLOCK_C, COVERS
            )
        total = tl.zeros((BLOCK_N, BLOCK_C, M), tl.float32)
        for c in tl.static_range(COVERS):
            dots = dot_codes(words[c], tables, planes[4 * M * c : 4 * M * (c + 1)], QUANT_TYPE, USE_ASM, M)
            products = tl.tuple([])
            for m in tl.static_range(M):
                dot = tl.sum(dots[m], axis=2) - excesses[M * c + m]
                products += (dot.to(tl.float32) * (absmax[c] * scales[M * c + m]),)
            total += products[0][:, :, None] if M == 1 else tl.join(products[0], products[1])
        out = tl.sum(total, axis=1)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + first + row).to(tl.float32)[:, None]
        if ids_ptr is not None:
            out = tl.where(tokens > 0, out, 0.0)  # not 0 times a scale, which may be infinite
        out_ptrs = out_ptr + tl.arange(0, M)[None, :] * N + (first + row)[:, None]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty))
        words, absmax = next_words, next_absmax
        first = after


def linear_4bit_dp4a(
    x: Tensor, packed: Packed4, bias: Tensor | None, out: Tensor, config: Dp4aConfig, ids: Tensor | None = None
) -> None:
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous.

    M <= 2, K % 32 == 0 and K <= MAX_DP4A_K. With `ids` [S], packed is [E, N, K/2], bias [E, N] and out [S, N]: row i is
    row i // (S / M) of x, for any M, times the weight ids[i], and 0 if there is no such weight.
    """
    m, k = x.shape
    n, chunks = packed.weight.shape[-2], k // CHUNK.value
    gpu = Gpu.of(x.device)
    programs = ceil_div(n, config.block_n * config.blocks)
    weights, repeat, read_nbytes = 1, 1, packed.weight.nbytes
    if ids is not None:
        weights, repeat = len(packed.weight), len(ids) // m
        read_nbytes = read_nbytes // weights * len(ids)
        programs, m = programs * len(ids), 1
    launch(
        _linear_4bit_dp4a_kernel, (programs,),
        x, packed.weight.view(torch.int32), packed.absmax, bias, *packed.nested, out, ids,
        n, chunks, packed.absmax.shape[-1], weights, repeat, config.blocks, *BYTE_TABLES[packed.quant_type],
        QUANT_TYPE=packed.quant_type, BLOCK_SIZE=packed.block_size, EVEN_K=chunks % (32 * config.warps) == 0,
        USE_ASM=gpu.ptx, PDL=gpu.pdl, EARLY=gpu.pdl and read_nbytes <= MAX_EARLY_NBYTES,
        M=m, BLOCK_N=config.block_n, BLOCK_C=32 * config.warps, COVERS=ceil_div(chunks, 32 * config.warps),
        options={"num_warps": config.warps, "num_stages": 1, "maxnreg": config.registers, "launch_pdl": gpu.pdl},
    )  # fmt: skip
