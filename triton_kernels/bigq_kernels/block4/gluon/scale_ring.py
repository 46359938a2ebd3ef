"""A ring of the scales of a warp's 16 rows, in shared memory: copied ahead, four of each row a step, in Gluon.

A warp has six scoreboards. A load into a register holds one until memory answers, and reads of the table that share it
wait too: 22 % of a warp's time at 64 tokens of 14336 x 4096. A copy holds none. The ring lies in the gaps of a wide
table, 128 bytes of each 256: eight rows of a stage.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bigq_kernels.block4.gluon.asm import run
from bigq_kernels.block4.gluon.scales import scale_index
from bigq_kernels.block4.gluon.table import GAP, WIDE_ENTRY

__all__ = ["copy_scales", "place_in_scales", "read_scales"]

STAGE_NBYTES = gl.constexpr(2 * WIDE_ENTRY.value)  # two gaps for 16 rows of four floats

COPY_ASM = gl.constexpr("cp.async.ca.shared.global [$1], [$2], 4;\nmov.b32 $0, 0;")
READ_FOUR_ASM = gl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")


@gluon.constexpr_function
def _four(dtype):
    """The types of an asm's four results; a tuple written in a kernel would hold constexprs."""
    return dtype, dtype, dtype, dtype


@gluon.jit
def place_in_scales(table, row, RING: gl.constexpr):
    """The address of the four scales of a row in stage 0: row 16 * w + r is row r of warp w."""
    ring = table + GAP + row // 16 * (RING * STAGE_NBYTES)
    return ring + row % 16 // 8 * WIDE_ENTRY + row % 8 * 16


@gluon.jit
def copy_scales(
    places, row, step, stage, part, absmax_ptr, B, BLOCK_SIZE: gl.constexpr, EVEN: gl.constexpr
):  # fmt: skip
    """Start the copies of a step's scales, in `lane_layout`. part: of the four of a row, [1, 4].

    places: of `place_in_scales` [N, 1]. row: [N, 1] of the tile. absmax_ptr: where the tile's scales begin, float32.
    """
    index = scale_index(row * B, step, part, B, BLOCK_SIZE, EVEN)
    run(COPY_ASM, "=r,r,l", [places + part * 4 + stage * STAGE_NBYTES, absmax_ptr + index])


@gluon.jit
def read_scales(places, stage):
    """The four scales of each row [N] in a step, float32 [N]."""
    return gl.inline_asm_elementwise(
        READ_FOUR_ASM, "=f,=f,=f,=f,r", [places + stage * STAGE_NBYTES], dtype=_four(gl.float32), is_pure=False, pack=1
    )
