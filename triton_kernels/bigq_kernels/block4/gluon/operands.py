"""Decode codes, as they lie in memory, into operands of tensor-core products, by `table`: tile functions in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["code_layout", "decode_codes", "decode_weights"]


def lookup_asm(scaled: str | None = None, *, wide: bool = False) -> str:
    """PTX from 4 bytes of codes ($4) to their entries $0 to $3 of the table at $5, in the bank $9.

    The read itself adds the table's address, for it takes a uniform register beside the lane's. Where `scaled` is
    "bf16" or "f16", the values are multiplied by $13, the scale twice in 16 bits, and what that misses of it, $17. With
    pack=4 an operand comes four times, hence every fourth.
    """
    lines = []
    for byte, shift in enumerate(("shl.b32 at, $4, 7", "shr.u32 at, $4, 1", "shr.u32 at, $4, 9", "shr.u32 at, $4, 17")):
        # An entry has 128 bytes; in a wide table 256, so that the byte is the second of its address.
        place = [f"prmt.b32 at, $4, $9, 0x55{byte}4;"] if wide else [f"{shift};", "lop3.b32 at, at, 0x7F80, $9, 0xEA;"]
        lines += [*place, "add.u32 at, at, $5;"]
        lines += [f"ld.shared.b32 ${byte}, [at];"]
        if scaled:  # one rounding more than a dequantized weight has: that of the code
            lines += [f"mul.rn.{scaled}x2 rest, ${byte}, $17;", f"fma.rn.{scaled}x2 ${byte}, ${byte}, $13, rest;"]
    return "{\n.reg .b32 at, rest;\n" + "\n".join(lines) + "\n}"


CODES_ASM = gl.constexpr(lookup_asm())
BF16_WEIGHTS_ASM = gl.constexpr(lookup_asm("bf16"))
F16_WEIGHTS_ASM = gl.constexpr(lookup_asm("f16"))
BF16_WIDE_ASM = gl.constexpr(lookup_asm("bf16", wide=True))
F16_WIDE_ASM = gl.constexpr(lookup_asm("f16", wide=True))
CODES_CONSTRAINTS = gl.constexpr("=&r,=&r,=&r,=&r,r" + ",r" * 8)
WEIGHTS_CONSTRAINTS = gl.constexpr("=&r,=&r,=&r,=&r,r" + ",r" * 16)

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
def _as_operand(v0, v1, OPERAND: gl.constexpr):
    """The results of an asm for [N, 32] bytes as one operand [N, 64], without a move.

    The asm takes 4 bytes of a register to 8 values, which is not elementwise: a row of bytes is [lane, two bits of the
    byte, ..] there. Reshape and permute say what each value is, and `assert_trivial` that none is moved.
    """
    N: gl.constexpr = v0.shape[0]
    WORDS: gl.constexpr = v0.shape[1] // 16
    values = gl.join(v0, v1).reshape([N, 4, WORDS, 2, 2, 2]).permute((0, 2, 5, 3, 1, 4)).reshape([N, 32 * WORDS])
    return gl.convert_layout(values, OPERAND, assert_trivial=True)


@gluon.jit
def decode_codes(packed, table, bank, DTYPE: gl.constexpr, OPERAND: gl.constexpr):
    """A quarter of bytes in `code_layout`, [N, 32] -> an operand [N, 64] of code values. table, bank: `fill_table`."""
    v0, v1 = gl.inline_asm_elementwise(
        CODES_ASM, CODES_CONSTRAINTS, [packed, table, bank], dtype=_two(DTYPE), is_pure=True, pack=4
    )
    return _as_operand(v0, v1, OPERAND)


@gluon.jit
def decode_weights(
    packed, absmax, table, bank, DTYPE: gl.constexpr, OPERAND: gl.constexpr, WIDE: gl.constexpr = False
):  # fmt: skip
    """As `decode_codes`, with the values multiplied by their absmax [N, 1]: an operand of weights. WIDE: the table."""
    BF16_ASM: gl.constexpr = BF16_WIDE_ASM if WIDE else BF16_WEIGHTS_ASM
    F16_ASM: gl.constexpr = F16_WIDE_ASM if WIDE else F16_WEIGHTS_ASM
    ASM: gl.constexpr = F16_ASM if gl.float16 == DTYPE else BF16_ASM
    SCALE_ASM: gl.constexpr = F16_SCALE_ASM if gl.float16 == DTYPE else BF16_SCALE_ASM
    ROWS: gl.constexpr = gl.SliceLayout(1, packed.type.layout)
    near, rest = gl.inline_asm_elementwise(
        SCALE_ASM,
        "=&r,=&r,r",
        [gl.convert_layout(absmax.reshape([packed.shape[0]]), ROWS, assert_trivial=True).to(gl.int32, bitcast=True)],
        dtype=_two(gl.int32),
        is_pure=True,
        pack=1,
    )
    zero = packed.to(gl.int32) * 0  # for the shape
    v0, v1 = gl.inline_asm_elementwise(
        ASM,
        WEIGHTS_CONSTRAINTS,
        [packed, table, bank, near[:, None] + zero, rest[:, None] + zero],
        dtype=_two(DTYPE),
        is_pure=True,
        pack=4,
    )
    return _as_operand(v0, v1, OPERAND)
