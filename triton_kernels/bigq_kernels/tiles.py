"""Tile functions: the arithmetic on a block of elements that several kernels share, and the literal code tables.

Everything here works on registers: no pointers, no masks. A table of 16 or 32 entries is built from literals, a few
dozen instructions a thread; a `tl.gather` from it then costs one shared-memory read an element (7 to 9 instructions
with its address, where a tree of `tl.where` takes 24). The tables repeat those of the specification on purpose, since
kernels know nothing of bigq; a test compares them.
"""

import torch
import triton
import triton.language as tl

# fmt: off
NF4_CODE = tl.constexpr((
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
))
FP4_CODE = tl.constexpr((
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
))
NF4_BOUNDARIES = tl.constexpr((
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
))
FP4_MAGNITUDE_BOUNDARIES = tl.constexpr((
    0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333,
))
FP4_MAGNITUDE_ORDER = tl.constexpr(0x32547610)  # hexadecimal digit i: code of the i-th smallest magnitude
# fmt: on
NF4_BINS = tl.constexpr(tuple(round(boundary * 14) + 16 for boundary in NF4_BOUNDARIES.value))
FP4_BINS = tl.constexpr(tuple(round(boundary * 14) + 16 for boundary in FP4_MAGNITUDE_BOUNDARIES.value))

NESTED_BLOCK_SIZE = tl.constexpr(256)
FLOAT32_TINY = tl.constexpr(2.0**-126)
INT8_TINY = tl.constexpr(2.0**-119)  # keeps 127 / absmax finite
ROUND_MAGIC = tl.constexpr(1.5 * 2.0**23)  # adding it leaves the integer nearest to x, ties to even, in the low bits
ABS_MASK = tl.constexpr(0x7FFFFFFF)
INF_BITS = tl.constexpr(0x7F800000)


def ceil_div(a: int, b: int) -> int:
    """`triton.cdiv` for launchers: that one is also a compile-time function, and spends 4 us on it."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """`triton.next_power_of_2` for launchers, for the same reason; n >= 1."""
    return 1 << (n - 1).bit_length()


def _prmt_asm(code: tuple[float, ...], dtype: torch.dtype, high: bool) -> str:
    """PTX that turns 4 packed bytes into the 16-bit values of their high (or low) nibbles.

    `prmt` picks 4 bytes out of 8 by the low 3 bits of 4 nibbles: the low and the high bytes of the values are looked up
    separately, then interleaved. Output i depends on byte i alone: Triton does not say which 4 elements come together.
    ptxas merges what the two calls on one tile share: 2 PRMT a code for NF4, 1.25 for FP4, whose sign is bit 3.
    """
    bits = [value & 0xFFFF for value in torch.tensor(code, device="cpu").to(dtype).view(torch.int16).tolist()]

    def entries(first: int, shift: int) -> str:
        return "0x" + "".join(f"{value >> shift & 255:02x}" for value in reversed(bits[first : first + 4]))

    def half(out: str, selector: str, merge: str, signs: str) -> str:
        lines = []
        for name, shift in (("lo", 0), ("hi", 8)):
            lines.append(f"prmt.b32 {name}, {entries(0, shift)}, {entries(4, shift)}, {selector};")
            if code is NF4_CODE.value:
                lines.append(f"prmt.b32 up, {entries(8, shift)}, {entries(12, shift)}, {selector};")
                lines.append(f"prmt.b32 {name}, {name}, up, {merge};")
        if code is FP4_CODE.value:
            lines.append(f"prmt.b32 up, up4, $2, {signs};")  # a selector's bit 3 spreads the sign bit of its byte
            lines.append("lop3.b32 hi, hi, up, 0x80808080, 0xF8;")  # hi | (up & 0x80808080)
        lines.append(f"prmt.b32 {out}, lo, hi, {'0x7351' if high else '0x6240'};")
        return "\n".join(lines)

    prologue = "and.b32 c0, $2, 0x77777777;\nshr.u32 c1, c0, 16;"
    if code is NF4_CODE.value:  # bit 3 of a code chooses between the lookups of entries 0..7 and 8..15
        prologue += "\nshr.u32 up, $2, 1;\nlop3.b32 m0, up, 0x44444444, 0x32103210, 0xEA;\nshr.u32 m1, m0, 16;"
    else:
        prologue += "\nshl.b32 up4, $2, 4;"
    body = half("$0", "c0", "m0", "0xD9C8") + "\n" + half("$1", "c1", "m1", "0xFBEA")
    return f"{{\n.reg .b32 c0, c1, m0, m1, up, up4, lo, hi;\n{prologue}\n{body}\n}}"


NF4_BF16_HIGH = tl.constexpr(_prmt_asm(NF4_CODE.value, torch.bfloat16, high=True))
NF4_BF16_LOW = tl.constexpr(_prmt_asm(NF4_CODE.value, torch.bfloat16, high=False))
NF4_FP16_HIGH = tl.constexpr(_prmt_asm(NF4_CODE.value, torch.float16, high=True))
NF4_FP16_LOW = tl.constexpr(_prmt_asm(NF4_CODE.value, torch.float16, high=False))
FP4_BF16_HIGH = tl.constexpr(_prmt_asm(FP4_CODE.value, torch.bfloat16, high=True))
FP4_BF16_LOW = tl.constexpr(_prmt_asm(FP4_CODE.value, torch.bfloat16, high=False))
FP4_FP16_HIGH = tl.constexpr(_prmt_asm(FP4_CODE.value, torch.float16, high=True))
FP4_FP16_LOW = tl.constexpr(_prmt_asm(FP4_CODE.value, torch.float16, high=False))


@triton.jit
def code_table(QUANT_TYPE: tl.constexpr):
    """The 16 code values, float32."""
    index = tl.arange(0, 16)
    table = tl.zeros((16,), tl.float32)
    for i in tl.static_range(16):
        table = tl.where(index == i, NF4_CODE[i] if QUANT_TYPE == "nf4" else FP4_CODE[i], table)
    return table


@triton.jit
def lookup(table, index):
    """table[index] for a table of one dimension and an index of any shape."""
    return tl.gather(table, index.to(tl.int32).reshape(index.numel), 0).reshape(index.shape)


@triton.jit
def bin_table(QUANT_TYPE: tl.constexpr):
    """The boundary inside each of 32 bins of width 1/14 (none: 2.0), and how many boundaries lie in lower bins.

    Neighbouring boundaries are at least 0.0805 apart, so a bin of 1/14 holds at most one, and none lies within a
    rounding error of a bin's edge. FP4 looks up its magnitudes only, hence the upper 16 bins.
    """
    index = tl.arange(0, 32)
    boundary = tl.full((32,), 2.0, tl.float32)
    below = tl.zeros((32,), tl.int32)
    for i in tl.static_range(15 if QUANT_TYPE == "nf4" else 7):
        bin = NF4_BINS[i] if QUANT_TYPE == "nf4" else FP4_BINS[i]
        value = NF4_BOUNDARIES[i] if QUANT_TYPE == "nf4" else FP4_MAGNITUDE_BOUNDARIES[i]
        boundary = tl.where(index == bin, value, boundary)
        below += (index > bin).to(tl.int32)
    return boundary, below


@triton.jit
def encode_4bit(scaled, boundary, below, QUANT_TYPE: tl.constexpr):
    """Code of the nearest value, int32; ties go to the lower bucket, for negative FP4 to the lower magnitude."""
    value = scaled if QUANT_TYPE == "nf4" else tl.abs(scaled)
    # Round to a bin by the magic constant: a float to int conversion runs at a quarter of the rate. `& 31` bounds NaN.
    bin = (value * 14.0 + (ROUND_MAGIC + 16.0)).to(tl.int32, bitcast=True) & 31
    code = lookup(below, bin) + (value > lookup(boundary, bin)).to(tl.int32)
    if QUANT_TYPE == "fp4":
        code = (FP4_MAGNITUDE_ORDER >> (code * 4)) & 7
        code = tl.where(scaled < 0.0, code | 8, code)
    return code


@triton.jit
def absmax_bits(x):
    """Bits of |x| in float32: as integers they order like the values, and Inf < NaN, which `tl.max` of floats drops."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & ABS_MASK


@triton.jit
def nan_to_inf(bits):
    """Float32 of `absmax_bits`, with NaN made Inf."""
    return tl.minimum(bits, INF_BITS).to(tl.float32, bitcast=True)


@triton.jit
def int8_inverse(absmax):
    """127 / absmax as torch computes it: the reciprocal, correctly rounded (`/` is not), times 127.

    A row below the smallest usable scale becomes zero codes.
    """
    return tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), tl.maximum(absmax, INT8_TINY)) * 127.0


@triton.jit
def encode_int8(x, inverse):
    """Round half to even of x * inverse, NaN to 0; launch with enable_fp_fusion=False: an FMA would skip a rounding.

    |x * inverse| <= 127 * (1 + 2**-22), so rounding alone keeps the code within +-127.
    """
    scaled = x.to(tl.float32) * inverse
    code = (scaled + ROUND_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    return tl.where(scaled == scaled, code, 0)


# One result, immediates only and pure: the compiler then moves the asm behind the shared-memory read of a dot operand.
@triton.jit
def _prmt_bf16(packed, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def _prmt_fp16(packed, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def decode_pair(packed, QUANT_TYPE: tl.constexpr, DTYPE: tl.constexpr, USE_PRMT: tl.constexpr):
    """(values of the high nibbles, values of the low nibbles) of a uint8 tile, in DTYPE: bfloat16 or float16."""
    tl.static_assert(packed.dtype == tl.uint8)
    if not USE_PRMT:
        table = code_table(QUANT_TYPE).to(DTYPE)
        return lookup(table, packed >> 4), lookup(table, packed & 15)
    elif QUANT_TYPE == "nf4":
        if DTYPE.is_bf16():
            return _prmt_bf16(packed, NF4_BF16_HIGH), _prmt_bf16(packed, NF4_BF16_LOW)
        else:
            return _prmt_fp16(packed, NF4_FP16_HIGH), _prmt_fp16(packed, NF4_FP16_LOW)
    else:
        if DTYPE.is_bf16():
            return _prmt_bf16(packed, FP4_BF16_HIGH), _prmt_bf16(packed, FP4_BF16_LOW)
        else:
            return _prmt_fp16(packed, FP4_FP16_HIGH), _prmt_fp16(packed, FP4_FP16_LOW)
