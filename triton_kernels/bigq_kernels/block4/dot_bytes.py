"""Dot products of 4-bit codes and tokens, both as integers of two bytes: `dp4a` multiplies four bytes at a time.

Memory delivers codes faster than a GPU's logic pipe looks up their values, so the number of instructions for a code
decides. Here a code becomes a 14-bit integer, two bytes looked up 8 codes at a time, and a token becomes 15-bit
integers, two bytes as well, with one scale for 32 elements. `dp4a` multiplies them on another pipe: 3.4 instructions a
code, where bfloat16 values and the tensor core take 4.6. The error is about 1e-4, below half a rounding of bfloat16.
"""

import triton
import triton.language as tl

from bigq_kernels.tiles import FP4_CODE, NF4_CODE, ROUND_MAGIC, absmax_bits, lookup

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
    """PTX: the dot products of 8 codes and the bytes of some tokens, see `dot_codes`; its arguments in that order.

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
def dot_codes(words, tables, planes, QUANT_TYPE: tl.constexpr, USE_ASM: tl.constexpr, M: tl.constexpr):
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
def split_token(x, USE_ASM: tl.constexpr):
    """[C, 4, 8] elements -> the bytes of their integers, their scale, and what to subtract from a dot product.

    The bytes are four int32 [1, C, 4] as `dot_codes` takes them: the high ones of 4 codes, of the next 4, the low
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
    # CODE_ZERO of each code, less the mean of the products that `dot_codes` leaves out: 64 for the low byte of a code.
    excess = (high_sum * 128 + low_sum) * (CODE_ZERO // 128) - (low_sum >> 1)
    planes = (high_a[None, :, :], high_b[None, :, :], low_a[None, :, :], low_b[None, :, :])
    return planes, scale[None, :], excess[None, :]
