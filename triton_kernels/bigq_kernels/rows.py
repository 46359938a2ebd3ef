"""Rows around a product with a stack: sorted by the weight that multiplies them, gathered, and summed again by token.

Token t of x [T, N] has `top_k` rows, t * top_k and those that follow it. `order` int64 [S] says which of these rows
stands at each place once all are sorted by weight, and `places` int32 [S] at which place each of them stands.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigq_kernels.checks import check_dot_rows, check_rows, check_sort_rows
from bigq_kernels.gpu import Gpu
from bigq_kernels.launch import launch
from bigq_kernels.tiles import ceil_div, next_power_of_2

__all__ = ["dot_rows", "sort_rows", "sum_rows", "take_rows"]

COLUMNS = 1024  # that a program takes
IDS = 4096  # that a program of the sort reads at a time


@triton.jit
def _is_own(id, weight, E, mask):
    """Whether ids belong to `weight`; E stands for all that are no weight's."""
    known = (id >= 0) & (id < E)
    return mask & tl.where(weight < E, id == weight, ~known)


@triton.jit(do_not_specialize=["S"])
def _sort_rows_kernel(
    ids_ptr,  # [S] int32 or int64
    order_ptr,  # [S] int64
    places_ptr,  # [S] int32
    stops_ptr,  # [E] int32
    S,
    E,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    weight = tl.program_id(0)  # E: those of no weight, which come last
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, S, BLOCK):
        row = start + tl.arange(0, BLOCK)
        id = tl.load(ids_ptr + row, mask=row < S, other=0)
        before += ((row < S) & (id >= 0) & (id < weight)).to(tl.int32)
    place = tl.sum(before, axis=0)
    for start in range(0, S, BLOCK):
        row = start + tl.arange(0, BLOCK)
        id = tl.load(ids_ptr + row, mask=row < S, other=0)
        is_own = _is_own(id, weight, E, row < S)
        own = is_own.to(tl.int32)
        to = place + tl.cumsum(own, axis=0) - own
        tl.store(order_ptr + to, row.to(tl.int64), mask=is_own)
        tl.store(places_ptr + row, to, mask=is_own)
        place += tl.sum(own, axis=0)
    tl.store(stops_ptr + weight, place, mask=weight < E)


def sort_rows(ids: Tensor, weights: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order int64 [S], places int32 [S], stops int32 [weights]) of rows with weights ids [S], int32 or int64.

    Rows of one weight keep their order. Rows whose id is no weight's come last.
    """
    check_sort_rows(ids)
    ids = ids.contiguous()
    order = ids.new_empty(len(ids), dtype=torch.int64)
    places, stops = ids.new_empty(len(ids), dtype=torch.int32), ids.new_empty(weights, dtype=torch.int32)
    pdl = Gpu.of(ids.device).pdl
    block = min(IDS, max(16, next_power_of_2(len(ids))))
    launch(
        _sort_rows_kernel, (weights + 1,), ids, order, places, stops, len(ids), weights,
        BLOCK=block, PDL=pdl, options={"num_warps": 16 if block > 1024 else 4, "launch_pdl": pdl},
    )  # fmt: skip
    return order, places, stops


@triton.jit
def _take_rows_kernel(
    x_ptr,  # [T, N]
    order_ptr,  # [S] int64; None: the rows are in the order of the tokens
    factors_ptr,  # [S] or None
    out_ptr,  # [S, N]
    N,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = row
    if order_ptr is not None:
        source = tl.load(order_ptr + row)
    value = tl.load(x_ptr + source // TOP_K * N + column, mask=column < N)
    if factors_ptr is not None:
        value = value.to(tl.float32) * tl.load(factors_ptr + source).to(tl.float32)
    tl.store(out_ptr + row * N + column, value.to(out_ptr.dtype.element_ty), mask=column < N)


def take_rows(x: Tensor, order: Tensor | None, factors: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
    """[S, N] of `dtype`: row order[s] // top_k of x [T, N], times factors [T, top_k] at order[s]. S is `rows`.

    No order is that of the tokens. x is not empty.
    """
    check_rows(rows, len(x), order, factors, x.device)
    x, n = x.contiguous(), x.shape[1]
    order, factors = (part if part is None else part.contiguous() for part in (order, factors))
    out = x.new_empty(rows, n, dtype=dtype)
    pdl = Gpu.of(x.device).pdl
    block = min(COLUMNS, next_power_of_2(n))
    launch(
        _take_rows_kernel, (rows, ceil_div(n, block)), x, order, factors, out, n,
        TOP_K=rows // len(x), BLOCK=block, PDL=pdl, options={"launch_pdl": pdl},
    )  # fmt: skip
    return out


@triton.jit
def _sum_rows_kernel(
    rows_ptr,  # [S, N]
    places_ptr,  # [T, TOP_K] int32; None: the rows are in the order of the tokens
    factors_ptr,  # [T, TOP_K] or None
    out_ptr,  # [T, N]
    N,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(TOP_K):
        place = token * TOP_K + i
        if places_ptr is not None:
            place = tl.load(places_ptr + place).to(tl.int64)
        value = tl.load(rows_ptr + place * N + column, mask=column < N, other=0).to(tl.float32)
        if factors_ptr is not None:
            value *= tl.load(factors_ptr + token * TOP_K + i).to(tl.float32)
        total += value
    tl.store(out_ptr + token * N + column, total.to(out_ptr.dtype.element_ty), mask=column < N)


def sum_rows(rows: Tensor, places: Tensor | None, factors: Tensor | None, tokens: int, dtype: torch.dtype) -> Tensor:
    """[T, N] of `dtype`: the sum of each token's rows of [S, N], which stand at `places`, times factors [T, top_k].

    No places are those in the order of the tokens. rows is not empty.
    """
    check_rows(len(rows), tokens, places, factors, rows.device)
    rows, n = rows.contiguous(), rows.shape[1]
    places, factors = (part if part is None else part.contiguous() for part in (places, factors))
    out = rows.new_empty(tokens, n, dtype=dtype)
    pdl = Gpu.of(rows.device).pdl
    block = min(COLUMNS, next_power_of_2(n))
    launch(
        _sum_rows_kernel, (tokens, ceil_div(n, block)), rows, places, factors, out, n,
        TOP_K=len(rows) // tokens, BLOCK=block, PDL=pdl, options={"launch_pdl": pdl},
    )  # fmt: skip
    return out


@triton.jit
def _dot_rows_kernel(
    rows_ptr,  # [S, N]
    places_ptr,  # [T, TOP_K] int32; None: the rows are in the order of the tokens
    x_ptr,  # [T, N]
    out_ptr,  # [T, TOP_K]
    N,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    entry = tl.program_id(0).to(tl.int64)
    place = entry
    if places_ptr is not None:
        place = tl.load(places_ptr + entry).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(rows_ptr + place * N + column, mask=column < N, other=0).to(tl.float32)
        total += value * tl.load(x_ptr + entry // TOP_K * N + column, mask=column < N, other=0).to(tl.float32)
    tl.store(out_ptr + entry, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty))


def dot_rows(rows: Tensor, places: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, top_k] of `dtype`: each token's rows of [S, N], which stand at `places`, times its row of x [T, N].

    No places are those in the order of the tokens. rows is not empty.
    """
    (entries, n), tokens = rows.shape, len(x)
    check_dot_rows(rows, places, x)
    rows, x = rows.contiguous(), x.contiguous()
    places = places if places is None else places.contiguous()
    out = rows.new_empty(tokens, entries // tokens, dtype=dtype)
    pdl = Gpu.of(rows.device).pdl
    launch(
        _dot_rows_kernel, (entries,), rows, places, x, out, n,
        TOP_K=entries // tokens, BLOCK=min(COLUMNS, next_power_of_2(n)), PDL=pdl, options={"launch_pdl": pdl},
    )  # fmt: skip
    return out
