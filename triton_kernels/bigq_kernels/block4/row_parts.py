"""Add the parts of products whose K several programs share, where each part has whole rows: of a weight, or a stack.

Of a stack, only rows that a weight multiplies have parts. Those behind the last stop, and those of no weight, are zero:
with stops the kernel that makes the groups has written them, and with the weight of each row they are written here.
"""

import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.gpu import Gpu
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div

__all__ = ["add_parts_of_rows"]

COLUMNS = 256  # of a program
FIELDS = tl.constexpr(5)  # of an entry of `group_tokens`


@triton.jit(do_not_specialize=["S"])
def _add_parts_of_rows_kernel(
    partial_ptr,  # [SPLIT, S, N] float32 of the kernel before
    bias_ptr,  # [E, N], or [N] of a linear, or None
    out_ptr,  # [S, N]
    route_ptr,  # of a stack: the weight of each row if SINGLE, else of `group_tokens`; of a linear None
    S,
    N,
    E,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (entry, i): columns BLOCK * i to BLOCK * (i + 1) of the rows of an entry, or of a row if SINGLE."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    entry = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    if route_ptr is None:
        weight, first, rows, has_bias = 0, entry.to(tl.int64), 1, True
    elif SINGLE:
        weight = tl.load(route_ptr + entry).to(tl.int64)
        first, rows = entry.to(tl.int64), 1
        has_bias = (weight >= 0) & (weight < E)
        weight = tl.minimum(tl.maximum(weight, 0), E - 1)
    else:
        place = route_ptr + entry * FIELDS
        weight = tl.load(place).to(tl.int64)
        behind = (entry - tl.load(place + 3)) * BLOCK_M
        first = (tl.load(place + 1) + behind).to(tl.int64)
        rows = tl.where(entry < tl.load(place + 4), tl.load(place + 2) - behind, 0)
        has_bias = True
    row = tl.arange(0, BLOCK_M)[:, None]
    here = (row < rows) & (column < N)
    places = (first + row) * N + column
    total = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for i in tl.static_range(SPLIT):
        # .cg reads L2, as the kernel before may still have run when this one started
        total += tl.load(partial_ptr + i * S.to(tl.int64) * N + places, mask=here, other=0.0, cache_modifier=".cg")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + weight * N + column, mask=(column < N) & has_bias, other=0.0)
        total += bias.to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=here)


def add_parts_of_rows(
    partial: Tensor,
    bias: Tensor | None,
    out: Tensor,
    split: int,
    route: Tensor | None,
    weights: int,
    entries: int,
    block_m: int,
    single: bool,
) -> None:
    """Write out [S, N], the sums of partial float32 [split, S, N] plus the bias [weights, N] of each row's weight.

    route is the weight of each row if `single`, else the `entries` of `group_tokens`, whose rows alone are written. If
    it is None, all rows have the one weight that there is, and are the entries. A kernel launched after it with
    `launch_pdl` may start meanwhile.
    """
    s, n = partial.shape[-2:]
    pdl = Gpu.of(out.device).pdl
    launch(
        _add_parts_of_rows_kernel,
        (entries, ceil_div(n, COLUMNS)),
        partial,
        bias,
        out,
        route,
        s,
        n,
        weights,
        SPLIT=split,
        BLOCK_M=1 if single or route is None else block_m,
        BLOCK=COLUMNS,
        SINGLE=single,
        PDL=pdl,
        options={"launch_pdl": pdl},
    )
