"""Decode words of 8 codes, as they lie in memory, into operands of tensor-core products: tile functions in Gluon."""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bigq_kernels.tiles import FP4_CODE, NF4_CODE

__all__ = ["code_layout", "code_tables", "decode_scaled", "decode_words"]


def decode_asm(quant_type: str, scaled: str | None = None) -> str:
    """PTX from 8 codes ($4) to their 16-bit values in order of K, two each in $0 to $3; $5, $9, ..: `code_tables`.

    The tables are operands, not literals: ptxas would copy a literal to a register before each use. With pack=4 an
    operand comes four times, hence every fourth. Where `scaled` is "bf16" or "f16", the values are multiplied by $37,
    the scale twice in 16 bits, and what that misses of it, $41.
    """
    nf4 = quant_type == "nf4"
    lines = ["and.b32 c0, $4, 0x77777777;", "shr.u32 c1, c0, 16;"]
    if nf4:  # bit 3 of a code chooses between the lookups of entries 0..7 and 8..15
        lines += ["shr.u32 up, $4, 1;", "lop3.b32 m0, up, 0x44444444, 0x32103210, 0xEA;", "shr.u32 m1, m0, 16;"]
    else:
        lines += ["shl.b32 up4, $4, 4;"]
    for half, signs in enumerate(("0xD9C8", "0xFBEA")):
        for name, table in (("lo", 5), ("hi", 21)):
            lines.append(f"prmt.b32 {name}, ${table}, ${table + 4}, c{half};")
            if nf4:
                lines.append(f"prmt.b32 up, ${table + 8}, ${table + 12}, c{half};")
                lines.append(f"prmt.b32 {name}, {name}, up, m{half};")
        if not nf4:  # a selector's bit 3 spreads the sign bit of its byte
            lines.append(f"prmt.b32 up, up4, $4, {signs};")
            lines.append("lop3.b32 hi, hi, up, 0x80808080, 0xF8;")
        # Byte i of lo and hi belongs to nibble i, and the high nibble of a byte comes first.
        for out, bytes_of_two in ((2 * half, "0x4051"), (2 * half + 1, "0x6273")):
            lines.append(f"prmt.b32 ${out}, lo, hi, {bytes_of_two};")
            if scaled:  # one rounding more than a dequantized weight has: that of the code
                lines.append(f"mul.rn.{scaled}x2 rest, ${out}, $41;")
                lines.append(f"fma.rn.{scaled}x2 ${out}, ${out}, $37, rest;")
    return "{\n.reg .b32 c0, c1, m0, m1, up, up4, lo, hi, rest;\n" + "\n".join(lines) + "\n}"


NF4_ASM = gl.constexpr(decode_asm("nf4"))
FP4_ASM = gl.constexpr(decode_asm("fp4"))
ASM_CONSTRAINTS = gl.constexpr("=&r,=&r,=&r,=&r,r" + ",r" * 32)
NF4_BF16_ASM = gl.constexpr(decode_asm("nf4", "bf16"))
FP4_BF16_ASM = gl.constexpr(decode_asm("fp4", "bf16"))
NF4_F16_ASM = gl.constexpr(decode_asm("nf4", "f16"))
FP4_F16_ASM = gl.constexpr(decode_asm("fp4", "f16"))
SCALED_CONSTRAINTS = gl.constexpr("=&r,=&r,=&r,=&r,r" + ",r" * 40)

# A float32 scale ($2) to 16 bits, twice in $0, and what those miss of it, twice in $1.
BF16_SCALE_ASM = gl.constexpr("""{
.reg .b32 high; .reg .f32 scale, near;
prmt.b32 $0, $2, $2, 0x3232;
and.b32 high, $2, 0xFFFF0000;
mov.b32 scale, $2;
mov.b32 near, high;
sub.rn.f32 near, scale, near;
cvt.rn.bf16x2.f32 $1, near, near;
}""")
F16_SCALE_ASM = gl.constexpr("""{
.reg .b16 high, same; .reg .f32 scale, near;
mov.b32 scale, $2;
min.f32 near, scale, 0f477FE000;
max.f32 near, near, 0fC77FE000;
cvt.rn.f16x2.f32 $0, near, near;
mov.b32 {high, same}, $0;
cvt.f32.f16 near, high;
sub.rn.f32 near, scale, near;
cvt.rn.f16x2.f32 $1, near, near;
}""")


@cache
def code_tables(quant_type: str, dtype: torch.dtype) -> tuple[int, ...]:
    """The low bytes of the 16 code values, then the high bytes, four an int32."""
    code = torch.tensor((NF4_CODE if quant_type == "nf4" else FP4_CODE).value, device="cpu")
    bits = [value & 0xFFFF for value in code.to(dtype).view(torch.int16).tolist()]
    planes = [value & 255 for value in bits] + [value >> 8 for value in bits]
    return tuple(int.from_bytes(bytes(planes[i : i + 4]), "little", signed=True) for i in range(0, 32, 4))


@gluon.constexpr_function
def code_layout(block_n, warps):
    """[block_n, 128] bytes: lane (g, c) of a warp holds bytes 8c to 8c + 7 of each 32 of rows g and g + 8."""
    rows = [[16 << i, 0] for i in range((block_n // 16).bit_length() - 1)]
    of_warps = warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], *rows[of_warps:]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=rows[:of_warps],
        block_bases=[],
        shape=[block_n, 128],
    )


@gluon.constexpr_function
def _two(dtype):
    """The types of an asm's two results; a tuple written in a kernel would hold constexprs."""
    return dtype, dtype


@gluon.jit
def decode_words(
    packed, t0, t1, t2, t3, t4, t5, t6, t7, QUANT_TYPE: gl.constexpr, DTYPE: gl.constexpr, OPERAND: gl.constexpr
):
    """Bytes in `code_layout` -> four operands of 64 elements of K, without a move.

    The asm takes 4 bytes of a register to 8 values, which is not elementwise: a row of bytes is [block, lane, two bits
    of the byte, ..] there. Reshape and permute say what each value is, and `assert_trivial` that none is moved.
    """
    ASM: gl.constexpr = NF4_ASM if QUANT_TYPE == "nf4" else FP4_ASM
    N: gl.constexpr = packed.shape[0]
    v0, v1 = gl.inline_asm_elementwise(
        ASM,
        ASM_CONSTRAINTS,
        [packed, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=_two(DTYPE),
        is_pure=True,
        pack=4,
    )
    values = gl.join(v0, v1).reshape([N, 4, 4, 2, 2, 2, 2]).permute((0, 3, 6, 4, 2, 5, 1)).reshape([N, 64, 2, 2])
    even, odd = gl.split(values)
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    return (
        gl.convert_layout(w0, OPERAND, assert_trivial=True),
        gl.convert_layout(w1, OPERAND, assert_trivial=True),
        gl.convert_layout(w2, OPERAND, assert_trivial=True),
        gl.convert_layout(w3, OPERAND, assert_trivial=True),
    )


@gluon.jit
def decode_scaled(
    packed, absmax, t0, t1, t2, t3, t4, t5, t6, t7, QUANT_TYPE: gl.constexpr, DTYPE: gl.constexpr, OPERAND: gl.constexpr
):
    """A quarter of bytes in `code_layout`, [N, 32], and its absmax [N, 1] -> one operand [N, 64] of weights.

    As `decode_words`; what a lane's bytes are scaled with comes as operands of the same shape.
    """
    NF4: gl.constexpr = NF4_F16_ASM if gl.float16 == DTYPE else NF4_BF16_ASM
    FP4: gl.constexpr = FP4_F16_ASM if gl.float16 == DTYPE else FP4_BF16_ASM
    SCALE_ASM: gl.constexpr = F16_SCALE_ASM if gl.float16 == DTYPE else BF16_SCALE_ASM
    ROWS: gl.constexpr = gl.SliceLayout(1, packed.type.layout)
    N: gl.constexpr = packed.shape[0]
    near, rest = gl.inline_asm_elementwise(
        SCALE_ASM,
        "=&r,=&r,r",
        [gl.convert_layout(absmax.reshape([N]), ROWS, assert_trivial=True).to(gl.int32, bitcast=True)],
        dtype=_two(gl.int32),
        is_pure=True,
        pack=1,
    )
    zero = packed.to(gl.int32) * 0  # for the shape
    v0, v1 = gl.inline_asm_elementwise(
        NF4 if QUANT_TYPE == "nf4" else FP4,
        SCALED_CONSTRAINTS,
        [packed, t0, t1, t2, t3, t4, t5, t6, t7, near[:, None] + zero, rest[:, None] + zero],
        dtype=_two(DTYPE),
        is_pure=True,
        pack=4,
    )
    values = gl.join(v0, v1).reshape([N, 4, 2, 2, 2, 2]).permute((0, 2, 5, 3, 1, 4)).reshape([N, 64])
    return gl.convert_layout(values, OPERAND, assert_trivial=True)
