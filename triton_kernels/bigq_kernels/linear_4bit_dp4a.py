"""One or two tokens times a 4-bit weight, by byte dot products: the kernel behind `linear_4bit` that is bound by bytes.

An H200 delivers 29 codes a clock to an SM whose logic pipe looks up two bytes each clock, so what a code costs decides.
Here a code becomes a 14-bit integer, two bytes looked up 8 codes at a time, and a token becomes 15-bit integers with
one scale for 32 elements, two bytes as well. `dp4a` multiplies them on another pipe: 3.5 instructions a code, where
bfloat16 values and the tensor core take 4.6. The error, about 1e-4, is below half a rounding of bfloat16.
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

ONE_WARP = {"num_warps": 1}

CHUNK = tl.constexpr(32)  # elements of K in one 16-byte load of codes; they share one scale of the token
CODE_ONE = tl.constexpr(8191)  # integer of the code value 1.0; CODE_ZERO is added to make all codes positive
CODE_ZERO = tl.constexpr(8192)
TOKEN_MAX = tl.constexpr(127 * 128)
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


def _decode_asm() -> str:
    """PTX from 8 codes ($4) to the high ($0, $1) and low ($2, $3) bytes of their integers; $5 to $12: BYTE_TABLES.

    `prmt` selects among 8 bytes by 3 bits of a code. Its fourth bit asks for the sign of the byte instead, which is 0
    in these tables: each of the two lookups is zero where the other holds the byte.
    """
    lines = ["shr.u32 c, $4, 16;", "xor.b32 d, $4, 0x88888888;", "shr.u32 e, d, 16;"]
    for out, table in ((0, 5), (2, 9)):
        for i, (below, above) in enumerate((("$4", "d"), ("c", "e"))):
            lines.append(f"prmt.b32 p, ${table}, ${table + 1}, {below};")
            lines.append(f"prmt.b32 q, ${table + 2}, ${table + 3}, {above};")
            lines.append(f"or.b32 ${out + i}, p, q;")
    return "{\n.reg .b32 c, d, e, p, q;\n" + "\n".join(lines) + "\n}"


DECODE_ASM = tl.constexpr(_decode_asm())


@triton.jit
def _decode(words, t0, t1, t2, t3, t4, t5, t6, t7, QUANT_TYPE: tl.constexpr, USE_ASM: tl.constexpr):
    """int32 of 8 codes -> four int32 of 4 bytes: high bytes of codes 0..3, of 4..7, low bytes of 0..3, of 4..7."""
    if USE_ASM:
        # The tables are operands, not literals: ptxas would copy a literal to a register before each use.
        return tl.inline_asm_elementwise(
            DECODE_ASM,
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            [words, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
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
    return high_a, high_b, low_a, low_b


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
def _split_tokens_kernel(
    x_ptr,  # [M, K]
    bytes_ptr,  # [M, CHUNKS, 4, 4, 4] int8: high bytes of even words, of odd words, low bytes likewise
    scale_ptr,  # [M, CHUNKS, 2] float32: the scale, and what CODE_ZERO adds to the sum
    CHUNKS,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    element = tl.arange(0, 32)
    row = tl.program_id(1).to(tl.int64) * CHUNKS
    mask = chunk < CHUNKS
    x = tl.load(x_ptr + (row + chunk)[:, None] * CHUNK + element[None, :], mask=mask[:, None], other=0.0)
    # NaN and Inf make the scale NaN, and with it every output of the token.
    bits = tl.maximum(tl.max(absmax_bits(x), axis=1), TINY_BITS)
    absmax = bits.to(tl.float32, bitcast=True)
    scaled = x.to(tl.float32) * (1.0 / absmax * TOKEN_MAX)[:, None]
    high = (scaled * (1.0 / 128.0) + ROUND_MAGIC) - ROUND_MAGIC
    low = (scaled - high * 128.0 + ROUND_MAGIC) - ROUND_MAGIC
    total = tl.sum(high * 128.0 + low, axis=1)

    # An even element is the high nibble of its byte, so a pair of elements changes places.
    place = (element // 4 % 2) * 16 + element // 8 * 4 + (element ^ 1) % 4
    out = bytes_ptr + (row + chunk)[:, None] * (2 * CHUNK) + place[None, :]
    tl.store(out, high.to(tl.int8), mask=mask[:, None])
    tl.store(out + CHUNK, low.to(tl.int8), mask=mask[:, None])
    scale = absmax * (128.0 / (TOKEN_MAX * CODE_ONE)) + (absmax - absmax)
    tl.store(scale_ptr + (row + chunk) * 2, scale, mask=mask)
    tl.store(scale_ptr + (row + chunk) * 2 + 1, total * (CODE_ZERO // 128), mask=mask)


@triton.jit
def _linear_4bit_dp4a_kernel(
    bytes_ptr,  # [M, CHUNKS, 4, 4] int32: see _split_tokens_kernel
    scale_ptr,  # [M, CHUNKS, 2] float32
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
    EVEN_K: tl.constexpr,  # K divides into whole steps: no masks in the loop
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    # Rows past N read the last row instead of taking a mask; their result is not stored.
    row = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_row).to(tl.int32))
    chunk = tl.arange(0, BLOCK_C)
    word = tl.arange(0, 4)
    # The chunk is the first axis, so that Triton lays the lanes of a warp along it: a warp reads 512 bytes of a row.
    weight_ptr += first_row * (CHUNKS * 4)
    offsets = row[None, :, None] * (CHUNKS * 4) + chunk[:, None, None] * 4 + word[None, None, :]
    total0 = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    total1 = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    zero = tl.zeros((BLOCK_C, BLOCK_N, 4), tl.int32)

    in_k = None if EVEN_K else (chunk < CHUNKS)[:, None, None]
    words = tl.load(weight_ptr + offsets, mask=in_k, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()  # the first codes are on their way while the token is still being split
    for start in range(0, CHUNKS, BLOCK_C):
        column = start + chunk
        if not EVEN_K:
            column = tl.minimum(column, CHUNKS - 1)
        block = row[None, :] * B + (column * CHUNK // BLOCK_SIZE)[:, None]
        absmax = load_absmax(absmax_ptr, first_row * B, block, nested_ptr, offset_ptr, code_ptr)
        if not EVEN_K:
            absmax = tl.where((start + chunk < CHUNKS)[:, None], absmax, 0.0)
        high_a, high_b, low_a, low_b = _decode(
            words, table0, table1, table2, table3, table4, table5, table6, table7, QUANT_TYPE, USE_ASM
        )
        for m in tl.static_range(M):
            x_ptrs = bytes_ptr + ((m * CHUNKS + column)[:, None, None] * 16 + word[None, None, :])
            x_high_a, _ = tl.broadcast(tl.load(x_ptrs), zero)
            x_high_b, _ = tl.broadcast(tl.load(x_ptrs + 4), zero)
            x_low_a, _ = tl.broadcast(tl.load(x_ptrs + 8), zero)
            x_low_b, _ = tl.broadcast(tl.load(x_ptrs + 12), zero)
            high = _dot4(high_b, x_high_b, _dot4(high_a, x_high_a, zero, USE_ASM), USE_ASM)
            low = _dot4(high_b, x_low_b, _dot4(high_a, x_low_a, zero, USE_ASM), USE_ASM)
            low = _dot4(low_b, x_high_b, _dot4(low_a, x_high_a, low, USE_ASM), USE_ASM)
            product = (tl.sum(high, axis=2) * 128 + tl.sum(low, axis=2)).to(tl.float32)
            scale = tl.load(scale_ptr + (m * CHUNKS + column) * 2)
            zero_sum = tl.load(scale_ptr + (m * CHUNKS + column) * 2 + 1)
            product = (product - zero_sum[:, None]) * (absmax * scale[:, None])
            if m == 0:
                total0 += product
            else:
                total1 += product
        if start + BLOCK_C < CHUNKS:
            in_k = None if EVEN_K else (start + BLOCK_C + chunk < CHUNKS)[:, None, None]
            words = tl.load(weight_ptr + (start + BLOCK_C) * 4 + offsets, mask=in_k, eviction_policy="evict_first")

    n = first_row + tl.arange(0, BLOCK_N)
    mask = n < N
    out0, out1 = tl.sum(total0, axis=0), tl.sum(total1, axis=0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
        out0 += bias
        out1 += bias
    tl.store(out_ptr + n, out0.to(out_ptr.dtype.element_ty), mask=mask)
    if M == 2:
        tl.store(out_ptr + N + n, out1.to(out_ptr.dtype.element_ty), mask=mask)


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
    """out [M, N] = x [M, K] times packed [N, K/2] transposed, plus bias, all contiguous; M <= 2 and K % 32 == 0."""
    m, k = x.shape
    n, chunks = weight.shape[0], k // CHUNK.value
    config = config or dp4a_config(x.device, m, n, k)
    asm, pdl = device_features(x.device)
    overlap = {"launch_pdl": True} if pdl else {}
    planes = torch.empty(m, chunks, 16, dtype=torch.int32, device=x.device)
    scale = torch.empty(m, chunks, 2, dtype=torch.float32, device=x.device)
    grid = (ceil_div(chunks, 8), m)
    launch(_split_tokens_kernel, grid, x, planes.view(torch.int8), scale, chunks, BLOCK=8, PDL=pdl, options=ONE_WARP)
    launch(
        _linear_4bit_dp4a_kernel,
        (ceil_div(n, config.block_n),),
        planes,
        scale,
        weight.view(torch.int32),
        absmax,
        bias,
        *nested,
        out,
        n,
        chunks,
        absmax.shape[1],
        *BYTE_TABLES[quant_type],
        QUANT_TYPE=quant_type,
        BLOCK_SIZE=block_size,
        EVEN_K=chunks % config.block_c == 0,
        USE_ASM=asm,
        PDL=pdl,
        M=m,
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c,
        options={"num_warps": config.warps, "num_stages": 1, **overlap},
    )
