"""Multiply rows of x by a stack of int8 weights, each row by its own, in the way that `choose_grouped` says.

`grouped_linear_int8` takes rows that are sorted by weight, and `routed_linear_int8` takes rows in any order. A column
is an outlier if any row of x has one in it, whatever its weight. So one list of columns serves all weights, and which
columns they are does not depend on how the rows are spread.
"""

import torch
from torch import Tensor

from bigq_kernels.checks import as_floats, check_grouped_linear_int8, check_routed_linear_int8
from bigq_kernels.groups import sort_by_weight, weights_of_rows
from bigq_kernels.int8.choose_grouped import choose_grouped, choose_single
from bigq_kernels.int8.product import multiply_int8

__all__ = ["grouped_linear_int8", "routed_linear_int8"]


def grouped_linear_int8(
    x: Tensor, stops: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """x [S, K], whose rows are sorted by weight, times int8 [E, N, K] transposed: [S, N], in x's dtype.

    Weight e multiplies the rows from stops[e - 1] (0 for the first) up to stops[e], and bias[e] of [E, N] is added.
    Rows after the last give zeros. stops is int32 [E], on the GPU, and the host does not read it. absmax is [E, N, 1].
    Raises RuntimeError if the tensors do not fit together.
    """
    check_grouped_linear_int8(x, stops, weight, absmax, bias)
    (e, n, k), rows = weight.shape, len(x)
    stops = stops.contiguous()
    choice = choose_grouped(x.device, rows, e, n, k, x.dtype, threshold > 0)
    if choice.config is None:
        return _biases(bias, weights_of_rows(stops, rows) if rows and e else None, x.new_zeros(rows, n))
    out = x.new_empty(rows, n)
    with torch.cuda.device_of(x):
        state = _contiguous(x, weight, absmax, bias)
        multiply_int8(*state, out, threshold, choice.way, choice.config, stops=stops)
    return out


def routed_linear_int8(
    x: Tensor, ids: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """Row i of [S, N]: row i // (S / M) of x [M, K], times the weight ids[i] of [E, N, K] transposed, plus its bias.

    A row whose id is no weight's gives zeros.
    ids is int32 or int64 [S], on the GPU; S is a multiple of M. The other arguments are those of `grouped_linear_int8`.
    """
    check_routed_linear_int8(x, ids, weight, absmax, bias)
    (e, n, k), rows = weight.shape, len(ids)
    choice = choose_single(x.device, len(x), rows, e, n, k, x.dtype, threshold > 0)
    if choice is None:
        order, stops = sort_by_weight(ids, e)
        out = grouped_linear_int8(x[order // (rows // len(x))], stops, weight, absmax, bias, threshold)
        return torch.empty_like(out).index_copy_(0, order, out)
    if choice.config is None:
        return _biases(bias, ids if rows and e else None, x.new_zeros(rows, n))
    out = x.new_empty(rows, n)
    with torch.cuda.device_of(x):
        state = _contiguous(x, weight, absmax, bias)
        multiply_int8(*state, out, threshold, choice.way, choice.config, ids=ids.contiguous())
    return out


def _contiguous(
    x: Tensor, weight: Tensor, absmax: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    scales, bias = as_floats(absmax).contiguous(), bias if bias is None else bias.contiguous()
    return x.contiguous(), weight.contiguous(), scales, bias


def _biases(bias: Tensor | None, ids: Tensor | None, zeros: Tensor) -> Tensor:
    """The bias of each row's weight, where K is 0; `zeros` [S, N] where there is none."""
    if bias is None or ids is None:
        return zeros
    known = ((ids >= 0) & (ids < len(bias)))[:, None]
    return torch.where(known, bias[ids.clamp(0, len(bias) - 1)].to(zeros.dtype), zeros)
