"""Multiply the rows of x by a stack of 4-bit weights, each row by its own, in the way that `choose_grouped` says."""

from torch import Tensor

from bigq_kernels.block4.absmax import nested_code
from bigq_kernels.block4.choose_grouped import choose_grouped
from bigq_kernels.block4.dequantize import dequantize_4bit
from bigq_kernels.block4.linear import contiguous, device_of, launcher
from bigq_kernels.block4.packed import Nested, Packed4
from bigq_kernels.checks import as_floats, check_grouped_linear_4bit
from bigq_kernels.grouped_matmul import grouped_matmul

__all__ = ["grouped_linear_4bit"]


def grouped_linear_4bit(
    x: Tensor,
    stops: Tensor,
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int | None = None,
) -> Tensor:
    """x [S, K], whose rows are sorted by weight, times packed uint8 [E, N, ceil(K/2)] transposed: [S, N], in x's dtype.

    Weight e multiplies the rows from stops[e - 1] (0 for the first) up to stops[e]; rows after the last give zeros.
    stops is int32 [E], on the GPU, and is not read by the host. The other tensors are those of `linear_4bit`, of the
    stack as one matrix [E * N, K]. Raises RuntimeError if the tensors do not fit together, or K is not in_features.
    """
    check_grouped_linear_4bit(x, stops, weight, absmax, nested_absmax, nested_offset, block_size, in_features)
    (e, n, pairs), (rows, k) = weight.shape, x.shape
    choice = choose_grouped(x.device, rows, e, n, k, block_size, x.dtype)
    nested: Nested = (None, None, None)
    if nested_absmax is not None and nested_offset is not None:
        nested = (as_floats(nested_absmax).contiguous(), as_floats(nested_offset), nested_code(x.device))
    else:
        absmax = as_floats(absmax)
    if choice.way == "dequantize":
        codes, scales = weight.reshape(e * n, pairs), absmax.reshape(e * n, absmax.shape[-1])
        dense = dequantize_4bit(codes, scales, quant_type, block_size, k, x.dtype, nested).view(e, n, k)
        return grouped_matmul(x, stops, dense.mT)
    out = x.new_empty(rows, n)
    packed = Packed4(contiguous(weight), absmax.contiguous(), nested, quant_type, block_size)
    with device_of(x):
        launcher(choice.way)(contiguous(x), packed, None, out, choice.config, stops.contiguous())
    return out
