"""The literal tables equal the specification's, and the inline PTX computes them: emulated on every byte."""

import re

import pytest
import torch

from bigq.ops import code_tables, reference
from bigq_kernels import tiles
from bigq_kernels.block4.absmax import nested_code


def test_codes_equal_the_specification():
    assert tiles.NF4_CODE.value == reference.CODES["nf4"]
    assert tiles.FP4_CODE.value == reference.CODES["fp4"]


def test_boundaries_equal_the_specification():
    assert tiles.NF4_BOUNDARIES.value == code_tables.NF4_BOUNDARIES
    assert tiles.FP4_MAGNITUDE_BOUNDARIES.value == code_tables.FP4_MAGNITUDE_BOUNDARIES
    order = tuple(tiles.FP4_MAGNITUDE_ORDER.value >> 4 * i & 15 for i in range(8))
    assert order == code_tables.FP4_MAGNITUDE_ORDER


def test_nested_code_equals_the_specification():
    cpu = torch.device("cpu")
    assert torch.equal(nested_code(cpu), reference.nested_code(cpu))


@pytest.mark.parametrize("name", ["NF4_BOUNDARIES", "FP4_MAGNITUDE_BOUNDARIES"])
def test_no_two_boundaries_share_a_bin(name):
    position = [boundary * 14 + 0.5 for boundary in getattr(tiles, name).value]
    assert len({int(p // 1) for p in position}) == len(position)
    assert all(1e-3 < p % 1 < 1 - 1e-3 for p in position)  # far from an edge, where rounding decides the bin


def _prmt(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        out |= byte << 8 * i
    return out


_PTX = {
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n & 0xFFFFFFFF,
    "add.u32": lambda a, b: a + b & 0xFFFFFFFF,
    "mov.b32": lambda a: a,
    "prmt.b32": _prmt,
    # Bit abc of the table, from the top, is f(a, b, c): 0xEA is (a & b) | c, 0xF8 is a | (b & c).
    "lop3.b32": lambda a, b, c, table: {0xEA: (a & b) | c, 0xF8: a | (b & c)}[table],
}


def _emulate(asm: str, operands: dict[str, int], results: list[str], shared: dict[int, int] | None = None) -> list[int]:
    """The 16-bit results of the asm, two in each of the registers named, on 32-bit operands and words by address."""
    registers = dict(operands)
    for opcode, arguments in re.findall(r"^(\w[\w.]*\.[bu]32) (.*);$", asm, flags=re.MULTILINE):
        out, *names = [name for name in re.split(r"[][{}, ]+", arguments) if name]
        if opcode == "st.shared.v4.b32":
            shared.update({registers[out] + 4 * i: registers[name] for i, name in enumerate(names)})
        elif opcode == "ld.shared.b32":
            registers[out] = shared[registers[names[0]]]
        else:
            registers[out] = _PTX[opcode](*(registers[n] if n in registers else int(n, 0) for n in names))
    return [registers[r] >> shift & 0xFFFF for r in results for shift in (0, 16)]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name, dtype", [("BF16", torch.bfloat16), ("FP16", torch.float16)], ids=["bf16", "fp16"])
def test_asm_decodes_every_byte_in_every_position(quant_type, name, dtype):
    code = torch.tensor(reference.CODES[quant_type]).to(dtype)
    for plane, shift in (("HIGH", 4), ("LOW", 0)):
        asm = getattr(tiles, f"{quant_type.upper()}_{name}_{plane}").value
        for byte in range(256):
            word = [byte, byte * 7 + 1 & 255, byte ^ 0xA5, 255 - byte]
            packed = int.from_bytes(bytes(word), "little")
            values = (
                torch.tensor(_emulate(asm, {"$2": packed}, ["$0", "$1"]), dtype=torch.int32).to(torch.int16).view(dtype)
            )
            assert torch.equal(values, code[[b >> shift & 15 for b in word]])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gluon_asm_decodes_every_byte_in_every_position(quant_type, dtype):
    # Gluon is not the same in all releases of Triton.
    operands = pytest.importorskip("bigq_kernels.block4.gluon.operands", exc_type=ImportError)
    table = pytest.importorskip("bigq_kernels.block4.gluon.table", exc_type=ImportError)
    code = torch.tensor(reference.CODES[quant_type]).to(dtype)
    codes = {f"${3 + i}": value & 0xFFFFFFFF for i, value in enumerate(table.code_tables(quant_type, dtype))}
    shared: dict[int, int] = {}
    for byte in range(256):
        for banks in range(8):
            entry = {"$1": 4096 + byte * 128 + banks * 16, "$2": byte}
            _emulate(table.ENTRY_ASM.value, entry | codes, [], shared)
    for byte in range(256):
        word = [byte, byte * 7 + 1 & 255, byte ^ 0xA5, 255 - byte]
        lane = {"$4": int.from_bytes(bytes(word), "little"), "$5": 4096, "$9": 4 * (byte % 32)}
        results = _emulate(operands.CODES_ASM.value, lane, ["$0", "$1", "$2", "$3"], shared)
        values = torch.tensor(results, dtype=torch.int32).to(torch.int16).view(dtype)
        assert torch.equal(values, code[[nibble for b in word for nibble in (b >> 4, b & 15)]])
