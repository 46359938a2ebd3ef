"""Scales of a slice, one quarter of a row in each lane: loaded once for a warp, and sent to the lanes that need them.

Four lanes have the same two rows of an MMA. Were each to load the scales of all quarters, a warp would read a line of
memory once for each quarter, and decode nested scales four times.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bigq_kernels.block4.gluon.scales import scale_index

__all__ = ["lane_scales_of", "load_lane_scales"]

# By quarter: what the lane with this number among four neighbours holds ($1), in all four ($0).
SPREAD_ASM = gl.constexpr(tuple(f"shfl.sync.idx.b32 $0, $1, {quarter}, 0x1C1F, 0xFFFFFFFF;" for quarter in range(4)))


@gluon.jit
def load_lane_scales(
    absmax_ptr, first, row, step, quarter, B, nested_ptr, BLOCK_SIZE: gl.constexpr, QUARTERS: gl.constexpr
):
    """What `scales_of` needs for quarter `quarter` [1, 4] of slice `step` of rows [N, 1] from the scale `first` on."""
    index = scale_index(row * B, 0, step * QUARTERS + quarter, B, BLOCK_SIZE, False)
    value = gl.load(absmax_ptr + first + index)
    if nested_ptr is None:
        return value, value
    else:
        return value, gl.load(nested_ptr + first // 256 + (((first % 256).to(gl.int32) + index) >> 8))


@gluon.jit
def lane_scales_of(values, QUARTER: gl.constexpr, M: gl.constexpr, MMA: gl.constexpr):
    """Of scales [16 * W, 4] in `lane_layout`, those of a quarter as [W, 16, M] in the layout of the product."""
    W: gl.constexpr = values.shape[0] // 16
    ASM: gl.constexpr = SPREAD_ASM[QUARTER]
    same = gl.inline_asm_elementwise(ASM, "=f,f", [values], dtype=gl.float32, is_pure=False, pack=1)
    same = same.reshape([W, 16, 4])
    same = gl.join(same, same)
    if M == 16:
        same = gl.join(same, same).permute((0, 1, 4, 2, 3))
    return gl.convert_layout(same.reshape([W, 16, M]), MMA)
