"""linear_int8: LLM.int8() with one weight, in the way that `choose` says, and its backward pass."""

from math import prod

import torch
from torch import Tensor

from bigq_kernels.checks import as_floats, check_linear_int8
from bigq_kernels.choice import Choice
from bigq_kernels.int8.choose import Int8Config, choose
from bigq_kernels.int8.dequantize import dequantize_int8
from bigq_kernels.int8.product import multiply_int8
from bigq_kernels.launch import dense_linear

__all__ = ["linear_int8"]


def linear_int8(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    choice: Choice[Int8Config | None] | None = None,
) -> Tensor:
    """x [..., K] times int8 [N, K] transposed, plus bias [N], in x's dtype; threshold 0 means no outliers.

    absmax [N, 1] is float32 or its bits as int32. Raises RuntimeError if the tensors do not fit together.
    """
    check_linear_int8(x, weight, absmax, bias)
    n, k = weight.shape
    m = prod(x.shape[:-1])
    choice = choice or choose(x.device, m, n, k, x.dtype, threshold > 0)
    config = choice.config
    if config is None:
        if m == 0 or n == 0:
            return x.new_empty(*x.shape[:-1], n)
        bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
        return dense_linear(x, dequantize_int8(weight, absmax, x.dtype), bias)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    rows, scales = x.reshape(m, k).contiguous(), as_floats(absmax).contiguous()
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        multiply_int8(rows, weight.contiguous(), scales, bias, out, threshold, choice.way, config)
    return out


def linear_int8_backward(grad: Tensor, weight: Tensor, absmax: Tensor, bias: None, threshold: float) -> Tensor:
    """The gradient of x in `linear_int8`: grad [..., N] times the weight [N, K], in grad's dtype.

    The gradient of rounding x to int8 is 1 (straight-through estimator).
    """
    return dense_linear(grad, dequantize_int8(weight, absmax, grad.dtype).mT, None)
