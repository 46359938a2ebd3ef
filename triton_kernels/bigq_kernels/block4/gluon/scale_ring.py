"""A ring of the scales of a warp's 16 rows, in shared memory: copied ahead, four of each row a step, in Gluon.

A warp has six scoreboards. A load into a register holds one until memory answers, and reads of the table that share it
wait too: 22 % of a warp's time at 64 tokens of 14336 x 4096. A copy holds none. The ring lies in the gaps of a wide
table, 128 bytes of each 256: eight rows of a stage.

Nested scales are copied as words around their codes, since no copy takes a byte, and as the scales of their blocks.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bigq_kernels.block4.gluon.asm import run
from bigq_kernels.block4.gluon.scales import scale_index
from bigq_kernels.block4.gluon.table import GAP, WIDE_ENTRY

__all__ = ["copy_scales", "place_in_scales", "read_scales", "store_code"]

CODE_GAP = gl.constexpr(200)  # the gap with the first 32 values of the code of nested scales; 25 stages are before it

COPY_ASM = gl.constexpr("cp.async.ca.shared.global [$1], [$2], 4;\nmov.b32 $0, 0;")
READ_FOUR_ASM = gl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
READ_ASM = gl.constexpr("ld.shared.b32 $0, [$1];")
STORE_ASM = gl.constexpr("st.shared.f32 [$1], $2;\nmov.b32 $0, 0;")


@gluon.constexpr_function
def _four(dtype):
    """The types of an asm's four results; a tuple written in a kernel would hold constexprs."""
    return dtype, dtype, dtype, dtype


@gluon.jit
def _stage_nbytes(nested_ptr):
    """Two gaps for 16 rows of four floats, and two more for the scales of nested ones."""
    return 2 * WIDE_ENTRY if nested_ptr is None else 4 * WIDE_ENTRY


@gluon.jit
def place_in_scales(table, row, nested_ptr, RING: gl.constexpr):
    """The address of the four scales of a row in stage 0: row 16 * w + r is row r of warp w."""
    ring = table + GAP + row // 16 * (RING * _stage_nbytes(nested_ptr))
    return ring + row % 16 // 8 * WIDE_ENTRY + row % 8 * 16


@gluon.jit
def copy_scales(
    places, row, step, stage, part, absmax, B, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr
):  # fmt: skip
    """Start the copies of a step's scales, in `lane_layout`. part: of the four of a row, [1, 4].

    places: of `place_in_scales` [N, 1]. row: [N, 1] of the tile. absmax: (absmax_ptr, number of the tile's first scale,
    int64, nested_ptr).
    """
    absmax_ptr, first_block, nested_ptr = absmax
    to = places + part * 4 + stage * _stage_nbytes(nested_ptr)
    index = scale_index(row * B, step, part, B, BLOCK_SIZE, EVEN)
    absmax_ptr += first_block
    if nested_ptr is None:
        run(COPY_ASM, "=r,r,l", [to, absmax_ptr + index])
    else:
        run(COPY_ASM, "=r,r,l", [to, (absmax_ptr + index).to(gl.int64) & -4])
        block = first_block // 256 + (((first_block % 256).to(gl.int32) + index) >> 8)
        run(COPY_ASM, "=r,r,l", [to + 2 * WIDE_ENTRY, nested_ptr + block])


@gluon.jit
def read_scales(table, places, row, step, stage, absmax, offset, B, BLOCK_SIZE: gl.constexpr):
    """The four scales of each row [N] in a step, float32 [N]. The other arguments are those of `copy_scales`."""
    absmax_ptr, first_block, nested_ptr = absmax
    at = places + stage * _stage_nbytes(nested_ptr)
    if nested_ptr is None:
        return gl.inline_asm_elementwise(
            READ_FOUR_ASM, "=f,=f,=f,=f,r", [at], dtype=_four(gl.float32), is_pure=False, pack=1
        )
    else:
        words = gl.inline_asm_elementwise(
            READ_FOUR_ASM, "=r,=r,=r,=r,r", [at], dtype=_four(gl.int32), is_pure=False, pack=1
        )
        nested = gl.inline_asm_elementwise(
            READ_FOUR_ASM, "=f,=f,=f,=f,r", [at + 2 * WIDE_ENTRY], dtype=_four(gl.float32), is_pure=False, pack=1
        )
        first_byte = (absmax_ptr + first_block).to(gl.int64).to(gl.int32)
        first = first_byte, row * B, B
        return (
            _nested_scale(table, words[0], nested[0], offset, first, step, 0, BLOCK_SIZE),
            _nested_scale(table, words[1], nested[1], offset, first, step, 1, BLOCK_SIZE),
            _nested_scale(table, words[2], nested[2], offset, first, step, 2, BLOCK_SIZE),
            _nested_scale(table, words[3], nested[3], offset, first, step, 3, BLOCK_SIZE),
        )


@gluon.jit
def _nested_scale(table, word, nested, offset, first, step, part, BLOCK_SIZE: gl.constexpr):
    """The scale whose code is a byte of `word`. first: (where the tile's scales begin, each row's first, B)."""
    first_byte, first_of_row, B = first
    byte = (first_byte + scale_index(first_of_row, step, part, B, BLOCK_SIZE, False)) & 3
    code = _code_place(table, (word >> (byte * 8)) & 255)
    value = gl.inline_asm_elementwise(READ_ASM, "=f,r", [code], dtype=gl.float32, is_pure=False, pack=1)
    return value * nested + offset


@gluon.jit
def store_code(table, code_ptr):
    """Store the code of nested scales, 256 float32, where `read_scales` looks it up after a `barrier`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    code = gl.arange(0, 256, LAYOUT)
    run(STORE_ASM, "=r,r,f", [_code_place(table, code), gl.load(code_ptr + code)])


@gluon.jit
def _code_place(table, code):
    return table + (CODE_GAP * WIDE_ENTRY + GAP) + (code >> 5) * WIDE_ENTRY + (code & 31) * 4
