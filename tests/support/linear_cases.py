"""Quantized weights of linears."""

import pytest
import torch

from bigq.ops import reference
from bigq.testing import assert_within_budget
from bigq_kernels.block4.absmax import nested_code
from bigq_kernels.block4.linear import linear_4bit
from bigq_kernels.block4.packed import Packed4

# The interpreter truncates float32 to bfloat16 instead of rounding.
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def quantized_4bit(n, k, quant_type, block_size, nested, device):
    """(weight, absmax, nested_absmax, nested_offset) and the exact dequantized weight in float64.

    Half of the scales are negative, as those of a search may be.
    """
    weight, absmax = reference.quantize_4bit(torch.randn(n, k, device=device), quant_type, block_size)
    absmax = absmax * (1 - 2 * torch.randint(2, absmax.shape, device=device))
    scale, stored = absmax, (absmax, None, None)
    if nested:
        stored = reference.quantize_absmax(absmax)
        scale = reference.dequantize_absmax(*stored)
    # A float32 code times a float32 scale needs 48 bits, so float64 holds the exact product.
    values = reference.dequantize_4bit(weight, torch.ones_like(absmax), quant_type, block_size, k, torch.float32)
    exact = values.double() * scale.double().repeat_interleave(block_size, dim=1)[:, :k]
    return (weight, *stored), exact


def check_linear_4bit(x, n, quant_type, block_size, nested=False, bias=None):
    """That linear_4bit of x and a random weight of n rows is within budget."""
    k = x.shape[-1]
    (weight, absmax, nested_absmax, nested_offset), dense = quantized_4bit(
        n, k, quant_type, block_size, nested, x.device
    )
    args = (x, weight, absmax, bias, nested_absmax, nested_offset, quant_type, block_size)
    exact = x.double() @ dense.T
    if bias is not None:
        exact = exact + bias.double()
    assert_within_budget(linear_4bit(*args), exact, reference.linear_4bit(*args))


def packed4(quantized, quant_type="nf4", block_size=64):
    """The tensors of `quantized_4bit` as the kernel of a way takes them."""
    weight, absmax, nested_absmax, nested_offset = quantized
    nested = (None, None, None)
    if nested_absmax is not None:
        nested = (nested_absmax, nested_offset, nested_code(weight.device))
    return Packed4(weight, absmax, nested, quant_type, block_size)


def int8_case(m, n, k, dtype, device):
    weight, absmax = reference.quantize_int8(torch.randn(n, k, device=device))
    x = torch.randn(m, k, device=device)
    x[0, 5], x[-1, k - 1], x[m // 2, k // 2] = 9.0, -6.0, 20.0
    return x.to(dtype), weight, absmax
