"""run: an asm once for each element of tensors or scalars, in the order of the program, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["run"]


@gluon.jit
def run(ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, args):
    """The int32 in $0, which each asm has because the function that runs it returns one."""
    return gl.inline_asm_elementwise(ASM, CONSTRAINTS, args, dtype=gl.int32, is_pure=False, pack=1)
