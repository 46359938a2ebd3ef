"""Multiply rows of x by a stack of 4-bit weights, each row by its own, in the way that `choose_grouped` says.

`grouped_linear_4bit` takes rows that are sorted by weight, and `routed_linear_4bit` takes rows in any order.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bigq_kernels.block4.absmax import with_code
from bigq_kernels.block4.choose_grouped import choose_grouped, takes_rows
from bigq_kernels.block4.dequantize import dequantize_4bit
from bigq_kernels.block4.linear import contiguous, device_of, launcher
from bigq_kernels.block4.packed import Packed4
from bigq_kernels.checks import check_grouped_linear_4bit, check_routed_linear_4bit
from bigq_kernels.grouped_matmul import grouped_matmul
from bigq_kernels.groups import sort_by_weight, weights_of_rows

__all__ = ["grouped_linear_4bit", "routed_linear_4bit"]


def grouped_linear_4bit(
    x: Tensor,
    stops: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int | None = None,
) -> Tensor:
    """x [S, K], whose rows are sorted by weight, times packed uint8 [E, N, ceil(K/2)] transposed: [S, N], in x's dtype.

    Weight e multiplies the rows from stops[e - 1] (0 for the first) up to stops[e], and bias[e] of [E, N] is added.
    Rows after the last give zeros. stops is int32 [E], on the GPU, and the host does not read it. The other tensors are
    those of `linear_4bit`, of the stack as one matrix [E * N, K]. Raises RuntimeError if the tensors do not fit
    together, or K is not in_features.
    """
    check_grouped_linear_4bit(x, stops, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features)
    (e, n, _), (rows, k), stops = weight.shape, x.shape, stops.contiguous()
    choice = choose_grouped(x.device, rows, e, n, k, block_size, x.dtype)
    packed = _packed(weight, absmax, nested_absmax, nested_offset, quant_type, block_size)
    if choice.way == "dequantize":
        out = grouped_matmul(x, stops, _dequantized(packed, k, x.dtype).mT)
        if bias is None:
            return out
        none = F.pad(bias, (0, 0, 0, 1))  # the last row is the bias of rows that no weight multiplies
        return out + none.index_select(0, weights_of_rows(stops, rows)).to(out.dtype)
    out, bias = x.new_empty(rows, n), bias if bias is None else bias.contiguous()
    order = weights_of_rows(stops, rows) if takes_rows(choice) else stops
    with device_of(x):
        launcher(choice.way)(contiguous(x), packed, bias, out, choice.config, order)
    return out


def routed_linear_4bit(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int | None = None,
    weights: int | None = None,
) -> Tensor:
    """Row i of [S, N]: row i // (S / M) of x [M, K], times the weight ids[i] of [E, N, K] transposed, plus its bias.

    A row whose id is no weight's gives zeros.
    ids is int32 or int64 [S], on the GPU; S is a multiple of M. The other arguments are those of `grouped_linear_4bit`.

    `weights` says that these E weights are a part of a stack of so many, and the kernel is chosen as for all of them.
    So a way that multiplies each row by itself (`takes_rows`) gives the bits of a product with the whole stack.
    """
    check_routed_linear_4bit(x, ids, weight, absmax, bias, nested_absmax, nested_offset, block_size, in_features)
    (e, n, _), k, rows = weight.shape, x.shape[1], len(ids)
    choice = choose_grouped(x.device, rows, e if weights is None else weights, n, k, block_size, x.dtype)
    if not takes_rows(choice):
        order, stops = sort_by_weight(ids, e)
        grouped = x[order // (rows // max(len(x), 1))]
        state = (weight, absmax, bias, nested_absmax, nested_offset, quant_type, block_size, in_features)
        out = grouped_linear_4bit(grouped, stops, *state)
        return torch.empty_like(out).index_copy_(0, order, out)
    packed = _packed(weight, absmax, nested_absmax, nested_offset, quant_type, block_size)
    out, bias = x.new_empty(rows, n), bias if bias is None else bias.contiguous()
    with device_of(x):
        launcher(choice.way)(contiguous(x), packed, bias, out, choice.config, ids.contiguous())
    return out


def _packed(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
) -> Packed4:
    absmax, nested = with_code(absmax, nested_absmax, nested_offset)
    return Packed4(contiguous(weight), absmax.contiguous(), nested, quant_type, block_size)


def _dequantized(packed: Packed4, k: int, dtype: torch.dtype) -> Tensor:
    """[E, N, K]."""
    codes, scales = packed.weight.flatten(0, 1), packed.absmax.flatten(0, 1)
    dense = dequantize_4bit(codes, scales, packed.quant_type, packed.block_size, k, dtype, packed.nested)
    return dense.view(*packed.weight.shape[:2], k)
