"""One or two tokens times a 4-bit weight, by byte dot products: the kernel behind `linear_4bit` that is bound by bytes.

A GPU delivers codes faster than its logic pipe looks up their values, so what a code costs decides. Here it becomes a
14-bit integer, two bytes looked up 8 codes at a time, and a token becomes 15-bit integers with one scale for 32
elements, two bytes as well. `dp4a` multiplies them on another pipe: 3.4 instructions a code, where bfloat16 values and
the tensor core take 4.6. The error, about 1e-4, is below half a rounding of bfloat16.

A thread takes the same 32 columns of all rows of its program. So each program splits the tokens itself, once, and keeps
them in registers: one launch, no workspace.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.dequantize_absmax import load_absmax
from bigq_kernels.launch import launch
from bigq_kernels.linear_4bit_configs import Dp4aConfig, dp4a_config
from bigq_kernels.tiles import FP4_CODE, NF4_CODE, ROUND_MAGIC, absmax_bits, ceil_div, device_features, lookup

__all__ = ["linear_4bit_dp4a"]

CHUNK = tl.constexpr(32)  # elements of K in one 16-byte load of codes; they share one scale of the token
CODE_ONE = tl.constexpr(8191)  # integer of the code value 1.0; CODE_ZERO is added to make all codes positive
CODE_ZERO = tl.constexpr(8192)
TOKEN_MAX = tl.constexpr(127 * 128)
LOW_ZERO = tl.constexpr(64)  # added to a token's integers, so that their low 7 bits are those of -64 to 63
TINY_BITS = tl.constexpr(0x0D000000)  # 2**-101: smaller maxima would make the scale's inverse infinite


def _integers(code: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(value * CODE_ONE.value) + CODE_ZERO.value for value in code)


NF4_INTEGERS = tl.constexpr(_integers(NF4_CODE.value))
FP4_INTEGERS = tl.constexpr(_integers(FP4_CODE.value))


def _byte_tables(integers: tuple[int, ...]) -> tuple[int, ...]:
    """The high 7 bits of the 16 integers, then the low 7 bits, four bytes an int32."""
    planes = [value >> 7 for value in integers] + [value & 127 for value in integers]
    return tuple(int.from_bytes(bytes(planes[i : i + 4]), "little", signed=True) for i in range(0, 32, 4))


BYTE_TABLES = {"nf4": _byte_tables(NF4_INTEGERS.value), "fp4": _byte_tables(FP4_INTEGERS.value)}


def _dot_asm(tokens: int) -> str:
    """PTX: the dot products of 8 codes and the bytes of some tokens, see `_dot_codes`; its arguments in that order.

    `prmt` selects among 8 bytes by 3 bits of a code. Its fourth bit asks for the sign of the byte instead, which is 0
    in these tables: each of the two lookups is zero where the other holds the byte. They are added, not or-ed, because
    an addition can run on the pipe of the multiplications.
    """
    words, tables = f"${tokens}", [f"${tokens + 1 + i}" for i in range(8)]
    lines = [f"shr.u32 c, {words}, 16;", f"xor.b32 d, {words}, 0x88888888;", "shr.u32 e, d, 16;"]
    for plane, (t0, t1, t2, t3) in (("h", tables[:4]), ("l", tables[4:])):
        for i, (below, above) in enumerate(((words, "d"), ("c", "e"))):
            lines.append(f"prmt.b32 p, {t0}, {t1}, {below};")
            lines.append(f"prmt.b32 q, {t2}, {t3}, {above};")
            lines.append(f"add.s32 {plane}{i}, p, q;")
    for m in range(tokens):
        x0, x1, y0, y1 = (f"${tokens + 9 + 4 * m + i}" for i in range(4))
        lines += [f"dp4a.s32.s32 high, h0, {x0}, 0;", f"dp4a.s32.s32 high, h1, {x1}, high;"]
        lines += [f"dp4a.s32.s32 low, h0, {y0}, 0;", f"dp4a.s32.s32 low, h1, {y1}, low;"]
        lines += [f"dp4a.s32.s32 low, l0, {x0}, low;", f"dp4a.s32.s32 low, l1, {x1}, low;"]
        lines.append(f"mad.lo.s32 ${m}, high, 128, low;")
    return "{\n.reg .b32 c, d, e, p, q, h0, h1, l0, l1, high, low;\n" + "\n".join(lines) + "\n}"


# The tables are operands, not literals: ptxas would copy a literal to a register before each use.
DOT_ASM_1 = tl.constexpr(_dot_asm(1))
DOT_ASM_2 = tl.constexpr(_dot_asm(2))
DOT_CONSTRAINTS_1 = tl.constexpr("=r" + ",r" * 13)
DOT_CONSTRAINTS_2 = tl.constexpr("=r,=r" + ",r" * 17)


@triton.jit
def _dot4(a, b, total, USE_ASM: tl.constexpr):
    """total + the sum of the products of four signed bytes."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    for i in tl.static_range(4):
        total += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def _dot_codes(words, tables, planes, QUANT_TYPE: tl.constexpr, USE_ASM: tl.constexpr, M: tl.constexpr):
    """int32 of 8 codes and the planes of M tokens -> M int32: the sum of the products of their integers, over 128.

    The products of low bytes and low bytes are left out.
    """
    if USE_ASM:
        args = tl.tuple([words])
        args += tables
        args += planes
        if M == 1:
            dot = tl.inline_asm_elementwise(DOT_ASM_1, DOT_CONSTRAINTS_1, args, tl.int32, is_pure=True, pack=1)
            return (dot,)
        else:
            return tl.inline_asm_elementwise(
                DOT_ASM_2, DOT_CONSTRAINTS_2, args, (tl.int32, tl.int32), is_pure=True, pack=1
            )
    else:
        index = tl.arange(0, 16)
        table = tl.zeros((16,), tl.int32)
        for i in tl.static_range(16):
            table = tl.where(index == i, NF4_INTEGERS[i] if QUANT_TYPE == "nf4" else FP4_INTEGERS[i], table)
        zero = tl.zeros(words.shape, tl.int32)
        high_a, high_b, low_a, low_b = zero, zero, zero, zero
        for i in tl.static_range(4):
            a = lookup(table, (words >> (4 * i)) & 15)
            b = lookup(table, (words >> (4 * i + 16)) & 15)
            high_a |= (a >> 7) << (8 * i)
            high_b |= (b >> 7) << (8 * i)
            low_a |= (a & 127) << (8 * i)
            low_b |= (b & 127) << (8 * i)
        dots = tl.tuple([])
        for m in tl.static_range(M):
            x_high_a, x_high_b, x_low_a, x_low_b = planes[4 * m : 4 * m + 4]
            high = _dot4(high_b, x_high_b, _dot4(high_a, x_high_a, zero, USE_ASM), USE_ASM)
            low = _dot4(high_b, x_low_b, _dot4(high_a, x_low_a, zero, USE_ASM), USE_ASM)
            low = _dot4(low_b, x_high_b, _dot4(low_a, x_high_a, low, USE_ASM), USE_ASM)
            dots += (high * 128 + low,)
        return dots


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
def _split_token(x, USE_ASM: tl.constexpr):
    """[C, 4, 8] elements -> the bytes of their integers, their scale, and what to subtract from a dot product.

    The bytes are four int32 [1, C, 4] as `_dot_codes` takes them: the high ones of 4 codes, of the next 4, the low
    ones likewise. The others are float32 and int32 [1, C].
    """
    # NaN and Inf make the scale NaN, and with it every output of the token.
    bits = tl.maximum(tl.max(tl.max(absmax_bits(x), axis=2), axis=1), TINY_BITS)
    absmax = bits.to(tl.float32, bitcast=True)
    scale = absmax * (128.0 / (TOKEN_MAX * CODE_ONE)) + (absmax - absmax)
    rounded = x.to(tl.float32) * (1.0 / absmax * TOKEN_MAX)[:, None, None] + (ROUND_MAGIC + LOW_ZERO)
    integers = rounded.to(tl.int32, bitcast=True)  # in the low 16 bits

    # An even element is the high nibble of its byte: of 4 elements, bytes 0 and 2 are the odd ones.
    even, odd = tl.split(tl.reshape(integers, (x.shape[0], 4, 2, 2, 2)))
    first, second = tl.split(odd)
    odd = (first & 0xFFFF) | (second << 16)
    first, second = tl.split(even)
    even = (first & 0xFFFF) | (second << 16)
    high = ((odd >> 7) & 0x00FF00FF) | ((even << 1) & ~0x00FF00FF)
    low = ((odd & 0x00FF00FF) | ((even << 8) & ~0x00FF00FF)) & 0x7F7F7F7F
    low = (low + 0x40404040) ^ ~0x7F7F7F7F  # minus LOW_ZERO, in each byte
    high_a, high_b = tl.split(high)
    low_a, low_b = tl.split(low)
    ones = tl.full(high_a.shape, 0x01010101, tl.int32)
    zero = tl.zeros(high_a.shape, tl.int32)
    high_sum = tl.sum(_dot4(high_a, ones, _dot4(high_b, ones, zero, USE_ASM), USE_ASM), axis=1)
    low_sum = tl.sum(_dot4(low_a, ones, _dot4(low_b, ones, zero, USE_ASM), USE_ASM), axis=1)
    # CODE_ZERO of each code, less the mean of the products that `_dot_codes` leaves out: 64 for the low byte of a code.
    excess = (high_sum * 128 + low_sum) * (CODE_ZERO // 128) - (low_sum >> 1)
    planes = (high_a[None, :, :], high_b[None, :, :], low_a[None, :, :], low_b[None, :, :])
    return planes, scale[None, :], excess[None, :]


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
    N,
    CHUNKS,
    B,
    BLOCKS,  # of rows that a program takes
    table0,  # BYTE_TABLES: eight arguments, since the interpreter takes no tuple
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
    table7,
    QUANT_TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_C times COVERS is all of K, and no more: no masks
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,  # a chunk a thread
    COVERS: tl.constexpr,  # chunks that a thread takes of each row
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tables = (table0, table1, table2, table3, table4, table5, table6, table7)
    # The last blocks start early enough to be whole. A row that is computed twice gets the same bits.
    last = tl.maximum(N - BLOCK_N, 0)
    row = tl.minimum(tl.arange(0, BLOCK_N), N - 1)
    first = tl.minimum(tl.program_id(0) * (BLOCKS * BLOCK_N), last)
    pointers = (weight_ptr, absmax_ptr, nested_ptr, offset_ptr, code_ptr)
    words, absmax = _load_rows(pointers, first, N, CHUNKS, B, BLOCK_SIZE, EVEN_K, BLOCK_N, BLOCK_C, COVERS)
    if PDL:
        tl.extra.cuda.gdc_wait()  # the first codes are on their way while another kernel makes x
    planes, scales, excesses = tl.tuple([]), tl.tuple([]), tl.tuple([])
    for c in tl.static_range(COVERS):
        chunk = c * BLOCK_C + tl.arange(0, BLOCK_C)
        for m in tl.static_range(M):
            x = _load_token(x_ptr + m * CHUNKS * CHUNK, chunk, chunk < CHUNKS)
            plane, scale, excess = _split_token(x, USE_ASM)
            planes += plane
            scales += (scale,)
            excesses += (excess,)

    for block in range(BLOCKS):
        after = tl.minimum(first + BLOCK_N, last)
        next_words, next_absmax = words, absmax
        if block + 1 < BLOCKS:
            next_words, next_absmax = _load_rows(
                pointers, after, N, CHUNKS, B, BLOCK_SIZE, EVEN_K, BLOCK_N, BLOCK_C, COVERS
            )
        total = tl.zeros((BLOCK_N, BLOCK_C, M), tl.float32)
        for c in tl.static_range(COVERS):
            dots = _dot_codes(words[c], tables, planes[4 * M * c : 4 * M * (c + 1)], QUANT_TYPE, USE_ASM, M)
            products = tl.tuple([])
            for m in tl.static_range(M):
                dot = tl.sum(dots[m], axis=2) - excesses[M * c + m]
                products += (dot.to(tl.float32) * (absmax[c] * scales[M * c + m]),)
            total += products[0][:, :, None] if M == 1 else tl.join(products[0], products[1])
        out = tl.sum(total, axis=1)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + first + row).to(tl.float32)[:, None]
        out_ptrs = out_ptr + tl.arange(0, M)[None, :] * N + (first + row)[:, None]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty))
        words, absmax = next_words, next_absmax
        first = after


def linear_4bit_dp4a(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None],
    out: Tensor,
    quant_type: str,
    block_size: int,
    config: Dp4aConfig | None = None,
) -> None:
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous.

    M <= 2, K % 32 == 0 and K <= MAX_DP4A_K.
    """
    m, k = x.shape
    n, chunks = weight.shape[0], k // CHUNK.value
    config = config or dp4a_config(x.device, m, n, k)
    asm, pdl = device_features(x.device)
    overlap = {"launch_pdl": True} if pdl else {}
    launch(
        _linear_4bit_dp4a_kernel,
        (ceil_div(n, config.block_n * config.blocks),),
        x,
        weight.view(torch.int32),
        absmax,
        bias,
        *nested,
        out,
        n,
        chunks,
        absmax.shape[1],
        config.blocks,
        *BYTE_TABLES[quant_type],
        QUANT_TYPE=quant_type,
        BLOCK_SIZE=block_size,
        EVEN_K=chunks % (32 * config.warps) == 0,
        USE_ASM=asm,
        PDL=pdl,
        M=m,
        BLOCK_N=config.block_n,
        BLOCK_C=32 * config.warps,
        COVERS=ceil_div(chunks, 32 * config.warps),
        options={"num_warps": config.warps, "num_stages": 1, "maxnreg": config.registers, **overlap},
    )
