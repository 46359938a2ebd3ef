"""The gradient of x in a product with a stack of 4-bit weights, in the way that `choose_gradient` says."""

import torch
from torch import Tensor

from bigq_kernels.block4.absmax import dequantize_absmax, with_code
from bigq_kernels.block4.choose_grouped import choose_gradient
from bigq_kernels.block4.dequantize import dequantize_4bit
from bigq_kernels.block4.linear import contiguous, device_of
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.block4.rows_times_weight import multiply_by_rows
from bigq_kernels.checks import check_grouped_linear_4bit_backward
from bigq_kernels.grouped_matmul import grouped_matmul
from bigq_kernels.groups import rows_of_weights

__all__ = ["grouped_linear_4bit_backward"]


def grouped_linear_4bit_backward(
    grad: Tensor,
    stops: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int | None = None,
) -> Tensor:
    """grad [S, N], whose rows are sorted by weight, times packed uint8 [E, N, ceil(K/2)]: [S, K], in grad's dtype.

    Weight e multiplies the rows from stops[e - 1] (0 for the first) up to stops[e]. Rows after the last give zeros. The
    other arguments are those of `grouped_linear_4bit`. Raises RuntimeError if the tensors do not fit together.
    """
    k = 2 * weight.shape[2] if in_features is None else in_features
    nested_state = (nested_absmax, nested_offset)
    check_grouped_linear_4bit_backward(grad, stops, weight, absmax, *nested_state, block_size, k)
    (e, n, _), rows, stops = weight.shape, len(grad), stops.contiguous()
    choice = choose_gradient(grad.device, rows, e, n, k, block_size, grad.dtype)
    if choice.way == "one by one":
        return _one_by_one(grad, stops, weight, absmax, *nested_state, quant_type, block_size, k)
    absmax, nested = with_code(absmax, nested_absmax, nested_offset)
    if choice.config is None:
        codes, scales = weight.flatten(0, 1), absmax.flatten(0, 1)
        dense = dequantize_4bit(codes, scales, quant_type, block_size, k, grad.dtype, nested)
        return grouped_matmul(grad, stops, dense.view(e, n, k))
    packed = Packed4(contiguous(weight), absmax.contiguous(), nested, quant_type, block_size)
    out = grad.new_empty(rows, k)
    with device_of(grad):
        multiply_by_rows(contiguous(grad), packed, out, choice.config, stops)
    return out


def _one_by_one(
    grad: Tensor,
    stops: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    k: int,
) -> Tensor:
    """The same where the host reads `stops`: one product for each weight that has rows, dequantized for it alone."""
    if nested_absmax is not None and nested_offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset)
    out = grad.new_zeros(len(grad), k)
    for e, rows in rows_of_weights(stops):
        dense = dequantize_4bit(weight[e], absmax[e], quant_type, block_size, k, grad.dtype)
        torch.mm(grad[rows], dense, out=out[rows])
    return out
