"""A ring of stages for each warp, in shared memory: copies of codes into it and reads from it, in Gluon.

A warp reads only what it has copied, so it waits for its own copies and for no other warp. Gluon puts a barrier of the
whole program between a copy and a read of what it allocates, so these copies and reads are PTX.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bigq_kernels.block4.gluon.asm import run
from bigq_kernels.internals import SHARED_MEMORY

__all__ = [
    "STAGE_NBYTES",
    "commit_copies",
    "copy_codes",
    "copy_pieces",
    "place_in_ring",
    "read_codes",
    "shared_address",
    "store_sums",
    "wait_for_copies",
]

STAGE_NBYTES = gl.constexpr(2048)  # 128 bytes of each of 16 rows

ADDRESS_ASM = gl.constexpr(f"mov.u32 $0, {SHARED_MEMORY};")
COMMIT_ASM = gl.constexpr("cp.async.commit_group;\nmov.b32 $0, 0;")
PIECE_ASM = gl.constexpr("cp.async.cg.shared.global.L2::128B [$1], [$2], 16, $3;\nmov.b32 $0, 0;")
# 8 bytes each of two rows, 8 apart.
READ_ASM = gl.constexpr("ld.shared.v2.b32 {$0, $1}, [$4];\nld.shared.v2.b32 {$2, $3}, [$4 + 1024];")
STORE_ASM = gl.constexpr("st.shared.f32 [$1], $2;\nmov.b32 $0, 0;")


@gluon.constexpr_function
def _copy_asm(masked):
    """Copies of 16 bytes of 4 rows from $8 on, $12 bytes apart, to $4 and every 512 bytes; zeros if $16 is 0 then."""
    lines = [".reg .b64 from;", "mov.b64 from, $8;"]
    for i in range(4):
        lines.append(f"cp.async.cg.shared.global.L2::128B [$4 + {512 * i}], [from], 16{', $16' if masked else ''};")
        lines += [f"mov.b32 ${i}, 0;", "add.s64 from, from, $12;"]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def _wait_asm(groups):
    """Wait until all but the last `groups` groups of a lane have landed, then for the other lanes of the warp."""
    return f"cp.async.wait_group {groups};\nbar.warp.sync 0xffffffff;\nmov.b32 $0, 0;"


@gluon.jit
def shared_address(anything):
    """Where the shared memory begins that Triton allocates, int32. anything: an int32 scalar."""
    return run(ADDRESS_ASM, "=r,r", [anything])


@gluon.jit
def copy_codes(addresses, ptrs, stride, nbytes, MASKED: gl.constexpr):
    """Start copies of 16 bytes from ptrs to addresses, and of the rows 4, 8 and 12 behind.

    Of the four elements that a lane has, the first says where its first row lies. stride: int64, bytes of 4 rows.
    nbytes: 16, or 0 where zeros are written instead, if MASKED.
    """
    zero = addresses * 0  # for the shape
    args = [addresses, ptrs, stride + zero, nbytes + zero] if MASKED else [addresses, ptrs, stride + zero]
    CONSTRAINTS: gl.constexpr = "=&r,=&r,=&r,=&r" + ",r" * 4 + ",l" * 8 + (",r" * 4 if MASKED else "")
    gl.inline_asm_elementwise(_copy_asm(MASKED), CONSTRAINTS, args, dtype=gl.int32, is_pure=False, pack=4)


@gluon.jit
def copy_pieces(addresses, ptrs, nbytes):
    """Start a copy of 16 bytes from each of ptrs to its address; nbytes: 16, or 0 where zeros are written instead."""
    run(PIECE_ASM, "=r,r,l,r", [addresses, ptrs, nbytes])


@gluon.jit
def place_in_ring(begin, row, byte, STAGES: gl.constexpr):
    """Where a byte of the first stage lies, if rings begin at `begin`: row 16 * w + r is row r of the ring of warp w.

    Units of 32 bytes are swapped by the row, so that the reads of neighbouring rows meet no bank twice.
    """
    ring = begin + row // 16 * (STAGES * STAGE_NBYTES)
    return ring + row % 16 * 128 + (((byte // 32) ^ (row % 4)) * 32 + byte % 32)


@gluon.jit
def commit_copies(anything):
    """End a group of copies. anything: an int32 scalar."""
    run(COMMIT_ASM, "=r,r", [anything])


@gluon.jit
def wait_for_copies(GROUPS: gl.constexpr, anything):
    """Wait for the copies of this warp but those of the last GROUPS groups. anything: an int32 scalar."""
    run(_wait_asm(GROUPS), "=r,r", [anything])


@gluon.jit
def read_codes(addresses):
    """uint8 in `quarter_layout`: of a lane's 8 bytes each of rows g and g + 8, the first has the address."""
    return gl.inline_asm_elementwise(
        READ_ASM, "=&r,=&r,=&r,=&r" + ",r" * 16, [addresses], dtype=gl.uint8, is_pure=False, pack=16
    )


@gluon.jit
def store_sums(addresses, total):
    """Store float32 at addresses in shared memory, which another warp may read after a `barrier`."""
    run(STORE_ASM, "=r,r,f", [addresses, total])
