"""The gradient of x in a product with a stack of int8 weights, in the way that `choose_gradient` says."""

import torch
from torch import Tensor

from bigq_kernels.checks import as_floats, check_grouped_linear_int8_backward
from bigq_kernels.grouped_matmul import grouped_matmul
from bigq_kernels.groups import rows_of_weights
from bigq_kernels.int8.choose_grouped import choose_gradient
from bigq_kernels.int8.dequantize import dequantize_int8
from bigq_kernels.int8.rows_times_weight import multiply_by_rows

__all__ = ["grouped_linear_int8_backward"]


def grouped_linear_int8_backward(grad: Tensor, stops: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
    """grad [S, N], whose rows are sorted by weight, times int8 [E, N, K]: [S, K], in grad's dtype.

    Weight e multiplies the rows from stops[e - 1] (0 for the first) up to stops[e]. Rows after the last give zeros.
    stops is int32 [E], and absmax [E, N, 1]. Raises RuntimeError if the tensors do not fit together.
    """
    check_grouped_linear_int8_backward(grad, stops, weight, absmax)
    (e, n, k), rows, stops = weight.shape, len(grad), stops.contiguous()
    choice = choose_gradient(grad.device, rows, e, n, k, grad.dtype)
    if choice.way == "one by one":
        return _one_by_one(grad, stops, weight, absmax)
    if choice.config is None:
        dense = dequantize_int8(weight.flatten(0, 1), absmax.flatten(0, 1), grad.dtype)
        return grouped_matmul(grad, stops, dense.view(e, n, k))
    out = grad.new_empty(rows, k)
    with torch.cuda.device_of(grad):
        state = weight.contiguous(), as_floats(absmax).contiguous()
        multiply_by_rows(grad.contiguous(), *state, out, choice.config, stops)
    return out


def _one_by_one(grad: Tensor, stops: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
    """The same where the host reads `stops`: one product for each weight that has rows, dequantized for it alone."""
    out = grad.new_zeros(len(grad), weight.shape[2])
    for e, rows in rows_of_weights(stops):
        torch.mm(grad[rows], dequantize_int8(weight[e], absmax[e], grad.dtype), out=out[rows])
    return out
