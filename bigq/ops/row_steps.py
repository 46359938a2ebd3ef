"""The ops around a product with a stack, as the reference computes them: the steps of `bigq.ops.routes`, checked.

Compiled code calls those steps themselves: a check of their sizes would be a guard of a graph.
"""

import torch
from torch import Tensor

from bigq.ops import checks, routes

__all__ = ["dot_rows", "gated", "gated_backward", "sort_rows", "sum_rows", "take_rows"]


def sort_rows(ids: Tensor, weights: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `routes.sort_rows`."""
    checks.check_sort_rows(ids)
    return routes.sort_rows(ids, weights)


def take_rows(x: Tensor, order: Tensor | None, factors: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
    """See `routes.take_rows`; x is not empty."""
    checks.check_rows(rows, len(x), order, factors, x.device)
    return routes.take_rows(x, order, factors, rows, dtype)


def sum_rows(rows: Tensor, places: Tensor | None, factors: Tensor | None, tokens: int, dtype: torch.dtype) -> Tensor:
    """See `routes.sum_rows`; there is a token."""
    checks.check_rows(len(rows), tokens, places, factors, rows.device)
    return routes.sum_rows(rows, places, factors, tokens, dtype)


def dot_rows(rows: Tensor, places: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """See `routes.dot_rows`; x is not empty."""
    checks.check_dot_rows(rows, places, x)
    return routes.dot_rows(rows, places, x, dtype)


def gated(x: Tensor, kind: str, alpha: float, limit: float) -> Tensor:
    """See `routes.gated`."""
    checks.check_gated(x, None, kind)
    return routes.gated(x, kind, alpha, limit)


def gated_backward(grad: Tensor, x: Tensor, kind: str, alpha: float, limit: float) -> Tensor:
    """See `routes.gated_backward`."""
    checks.check_gated(x, grad, kind)
    return routes.gated_backward(grad, x, kind, alpha, limit)
