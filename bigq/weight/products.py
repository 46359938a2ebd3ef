"""PRODUCTS: for each torch function that multiplies by a weight, how the kernels of a format compute it.

A function of this table returns None for arguments that no kernel supports.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bigq.errors import UnsupportedError
from bigq.system.internals import GROUPED_PRODUCTS
from bigq.weight.lazy_weight import LazyWeight
from bigq.weight.stored import Stored

__all__ = ["PRODUCTS"]

Function = Callable[..., Any]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    operand = _operand(input, weight, dim=2, transposed=False)
    return None if operand is None else operand.linear(input, bias)


def _matmul(input: Tensor, other: Tensor, **rest: Any) -> Tensor | None:
    if rest:
        return None
    if other.dim() == 3 or (input.dim() == 3 and isinstance(input, LazyWeight)):
        return _bmm(input, other)
    operand = _operand(input, other, dim=2, transposed=True)
    return None if operand is None else operand.linear(input)


def _mm(input: Tensor, mat2: Tensor, **rest: Any) -> Tensor | None:
    operand = None if rest or input.dim() != 2 else _operand(input, mat2, dim=2, transposed=True)
    return None if operand is None else operand.linear(input)


def _bmm(input: Tensor, mat2: Tensor, **rest: Any) -> Tensor | None:
    if rest or input.dim() != 3 or mat2.dim() != 3 or len(input) != len(mat2):
        return None
    operand = _operand(input, mat2, dim=3, transposed=True)
    if operand is not None:
        return operand.batched_linear(input)
    operand = _operand(mat2, input, dim=3, transposed=False)  # w @ x = (x.T @ w.T).T
    return None if operand is None else operand.batched_linear(mat2.mT).mT


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, **rest: Any) -> Any:
    operand = _operand(mat1, mat2, dim=2, transposed=True)
    if operand is None or rest or (beta, alpha) != (1, 1) or input.shape != mat2.shape[1:]:
        return None
    return operand.linear(mat1, input)


def _grouped_mm(input: Tensor, mat2: Tensor, *, offs: Tensor | None = None, **rest: Any) -> Tensor | None:
    """x [S, K] times [E, K, N]. `offs` holds the end of each weight's rows."""
    operand = _operand(input, mat2, dim=3, transposed=True)
    options = [value for value in rest.values() if value is not None]
    if operand is None or offs is None or options or input.dim() != 2:
        return None
    if not operand.format.has_stack_products and input.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # the product of such a format reads `offs`, which no stream can record
    return operand.grouped_linear(input, offs)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: Any = None, *rest: Any, **more: Any
) -> Any:
    operand = _operand(input, weight, dim=2, transposed=False)
    if operand is not None and max_norm is not None:
        raise UnsupportedError(
            f"an embedding with max_norm={max_norm} renormalizes rows of its weight, and this one, "
            f"{list(weight.shape)}, is quantized: rows that are quantized again have another norm; "
            "do not quantize it, or pass no max_norm"
        )
    return None if operand is None else operand.rows(input, weight.dtype)


def _operand(x: Any, weight: Any, *, dim: int, transposed: bool) -> Stored | None:
    """How `weight` is stored, if it is quantized, with these dimensions, and `x` is not quantized; otherwise None."""
    if not isinstance(weight, LazyWeight) or isinstance(x, LazyWeight) or weight.dim() != dim:
        return None
    operand = weight.operand()
    return operand if operand is not None and operand.transposed == transposed else None


PRODUCTS: dict[Function, Function] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: lambda weight, other: _matmul(other, weight),
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    F.embedding: _embedding,
    torch.embedding: lambda weight, indices, *rest: _embedding(indices, weight),
    **dict.fromkeys(GROUPED_PRODUCTS, _grouped_mm),
}
