"""A table in shared memory with the two values of a byte of codes, for the operands of tensor cores: filled in Gluon.

An operand holds two 16-bit values in a register, and a byte holds two codes. So one read of a table of 256 entries
decodes both: a shift, a mask and the read, 12 instructions for 8 codes. Byte permutes of a table in registers took 21.
Each lane of a warp has a copy of the table in a bank of its own, so no two lanes of a read meet in a bank.
"""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bigq_kernels.block4.configs import TABLE_NBYTES
from bigq_kernels.block4.gluon.asm import run
from bigq_kernels.tiles import FP4_CODE, NF4_CODE

__all__ = ["GAP", "WIDE_ENTRY", "WIDE_NBYTES", "code_tables", "fill_table", "fill_wide_table", "lane_bank"]

# A wide table has twice the room for an entry. The address of a byte's entry is then a permutation of bytes: one
# instruction instead of a shift and a mask. The second half of each entry is free for other things.
WIDE_ENTRY = gl.constexpr(256)
WIDE_NBYTES = gl.constexpr(256 * 256)
GAP = gl.constexpr(128)  # where the free half begins in an entry

# The address of the table in $0, and in $1 where the lane's bank begins in it. Gluon does not tell the address of what
# it allocates, so PTX allocates the table; Triton's own memory begins behind it.
ADDRESS_ASM = gl.constexpr(f"""{{
.shared .align 1024 .b8 table[{TABLE_NBYTES}];
mov.u32 $0, table;
mov.u32 $1, %laneid;
shl.b32 $1, $1, 2;
}}""")
BANK_ASM = gl.constexpr("mov.u32 $0, %laneid;\nshl.b32 $0, $0, 2;")
# The entry of byte $2, from `code_tables` in $3 to $10: the value of its high nibble, then of its low one. It is stored
# in four banks at $1. $0 is there because an asm has a result.
ENTRY_ASM = gl.constexpr("""{
.reg .b32 code, upper, lo, hi, up;
and.b32 code, $2, 0x77;
shr.u32 upper, $2, 1;
lop3.b32 upper, upper, 0x44, 0x10, 0xEA;
prmt.b32 lo, $3, $4, code;
prmt.b32 up, $5, $6, code;
prmt.b32 lo, lo, up, upper;
prmt.b32 hi, $7, $8, code;
prmt.b32 up, $9, $10, code;
prmt.b32 hi, hi, up, upper;
prmt.b32 lo, lo, hi, 0x4051;
st.shared.v4.b32 [$1], {lo, lo, lo, lo};
mov.b32 $0, 0;
}""")


@cache
def code_tables(quant_type: str, dtype: torch.dtype) -> tuple[int, ...]:
    """The low bytes of the 16 code values, then the high bytes, four an int32."""
    values = (NF4_CODE if quant_type == "nf4" else FP4_CODE).value
    code = torch.tensor(values, dtype=torch.float32, device="cpu")
    bits = [value & 0xFFFF for value in code.to(dtype).view(torch.int16).tolist()]
    planes = [value & 255 for value in bits] + [value >> 8 for value in bits]
    return tuple(int.from_bytes(bytes(planes[i : i + 4]), "little", signed=True) for i in range(0, 32, 4))


@gluon.constexpr_function
def _two_int32():
    """The types of an asm's two results; a tuple written in a kernel would hold constexprs."""
    return gl.int32, gl.int32


@gluon.jit
def fill_table(t0, t1, t2, t3, t4, t5, t6, t7):
    """(address of the table, where the lane's bank begins in it), int32, from `code_tables`.

    The table may be read after a `barrier`.
    """
    table, bank = gl.inline_asm_elementwise(ADDRESS_ASM, "=r,=r,r", [t0], dtype=_two_int32(), is_pure=False, pack=1)
    _fill(table, t0, t1, t2, t3, t4, t5, t6, t7, 128)
    return table, bank


@gluon.jit
def fill_wide_table(table, t0, t1, t2, t3, t4, t5, t6, t7):
    """Fill WIDE_NBYTES from `table` on, an address of shared memory, as `fill_table` does."""
    _fill(table, t0, t1, t2, t3, t4, t5, t6, t7, WIDE_ENTRY)


@gluon.jit
def lane_bank(anything):
    """Where the bank of a lane begins in an entry, int32. anything: an int32 scalar."""
    return run(BANK_ASM, "=r,r", [anything])


@gluon.jit
def _fill(table, t0, t1, t2, t3, t4, t5, t6, t7, ENTRY: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [gl.num_warps(), 1], [1, 0])
    byte = gl.arange(0, 256, gl.SliceLayout(1, LAYOUT))[:, None]
    banks = gl.arange(0, 8, gl.SliceLayout(0, LAYOUT))[None, :]
    entries = [table + byte * ENTRY + banks * 16, byte + banks * 0, t0, t1, t2, t3, t4, t5, t6, t7]
    run(ENTRY_ASM, "=&r,r,r,r,r,r,r,r,r,r,r", entries)
