"""Token rows: the rows of tokens sorted by the weight that multiplies each, gathered, gated, and summed again by token.

Token t of x [T, N] has `top_k` rows, t * top_k and those that follow. `order` int64 [S] says which of these rows stands
at each place once all are sorted by weight, and `places` int32 [S] at which place each of them stands.

Each step is one kernel on a GPU in eager mode, where torch takes two to ten. In compiled code, which fuses them, on a
CPU, and for tensors of other kinds the steps are those of `bigq.ops.routes`, in torch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.compiler import is_compiling

from bigq.ops import library, routes
from bigq.system.internals import something_listens

__all__ = ["Gate", "gated", "sort_rows", "sum_rows", "take_rows"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Gate(NamedTuple):
    """What `gated` computes: the arguments of `bigq.ops.routes.gated`."""

    kind: str
    alpha: float = 0.0
    limit: float = 0.0


def sort_rows(ids: Tensor, weights: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, places, stops) of rows whose weights are ids [S], int32 or int64; see `bigq.ops.routes.sort_rows`."""
    if _is_plain(ids):
        return _run("sort_rows", ids, weights)  # type: ignore[no-any-return]
    return routes.sort_rows(ids, weights)


def take_rows(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """[S, N]: row order[s] // top_k of x [T, N]; top_k is S / T."""
    if not _is_plain(x, x.dtype):
        return routes.take_rows(x, order, None, len(order), x.dtype)
    if x.requires_grad and torch.is_grad_enabled() and not something_listens():
        return _Take.apply(x, order, places)  # type: ignore[no-any-return, no-untyped-call]
    return _run("take_rows", x, order, None, len(order), x.dtype)  # type: ignore[no-any-return]


def sum_rows(rows: Tensor, factors: Tensor, order: Tensor | None, places: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[T, N] in `dtype`: the sum of each token's rows of [S, N], times factors [T, top_k].

    Without order and places, the rows are in the order of the tokens.
    """
    if not (_is_plain(rows, rows.dtype) and _is_plain(factors, factors.dtype)):
        return routes.sum_rows(rows, places, factors, len(factors), dtype)
    needs_grad = (rows.requires_grad or factors.requires_grad) and torch.is_grad_enabled()
    if needs_grad and not something_listens():
        return _Sum.apply(rows, factors, order, places, dtype)  # type: ignore[no-any-return, no-untyped-call]
    return _run("sum_rows", rows, places, factors, len(factors), dtype)  # type: ignore[no-any-return]


def gated(x: Tensor, gate: Gate) -> Tensor:
    """[S, I] of x [S, 2I]; see `bigq.ops.routes.gated`."""
    if not _is_plain(x, x.dtype):
        return routes.gated(x, *gate)
    if x.requires_grad and torch.is_grad_enabled() and not something_listens():
        return _Gated.apply(x, *gate)  # type: ignore[no-any-return, no-untyped-call]
    return _run("gated", x, *gate)  # type: ignore[no-any-return]


def _is_plain(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the kernels take it: on a GPU and not empty, in eager mode, of no subclass and without a tangent.

    dtype: its own, if it holds floating-point numbers.
    """
    if is_compiling() or not (type(tensor) is Tensor and tensor.is_cuda and tensor.numel()):
        return False
    return dtype is None or (dtype in _FLOATS and unpack_dual(tensor).tangent is None)  # type: ignore[no-untyped-call]


def _run(name: str, *args: Any) -> Any:
    """The op `name`, or its launcher if nobody hears or changes calls of ops."""
    if something_listens():
        return getattr(torch.ops.bigq, name).default(*args)
    return library.cuda_implementation(name)(*args)


def _gradient(name: str, *args: Any) -> Any:
    """The same in a backward pass: in torch, if somebody asks for the gradient of this gradient."""
    return getattr(routes, name)(*args) if torch.is_grad_enabled() else _run(name, *args)


# One node of autograd around a launcher, as `eager_gradient` has for products, and the same for the op.


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.tokens, ctx.dtype = len(x), x.dtype
        ctx.save_for_backward(places)
        return _run("take_rows", x, order, None, len(order), x.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _gradient("sum_rows", grad, places, None, ctx.tokens, ctx.dtype), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, factors: Tensor, order: Tensor | None, places: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(rows, factors, order, places)
        return _run("sum_rows", rows, places, factors, len(factors), dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, factors, order, places = ctx.saved_tensors
        return *_of_sum(grad, rows, factors, order, places, ctx.needs_input_grad[:2]), None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, alpha: float, limit: float) -> Tensor:
        _save_gated(ctx, (x, kind, alpha, limit), x)
        return _run("gated", x, kind, alpha, limit)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gated_backward(ctx, grad)


def _of_sum(
    grad: Tensor,
    rows: Tensor,
    factors: Tensor,
    order: Tensor | None,
    places: Tensor | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the rows and of the factors in `sum_rows`, of which `needed` are."""
    of_rows = _gradient("take_rows", grad, order, factors, len(rows), rows.dtype) if needed[0] else None
    return of_rows, _gradient("dot_rows", rows, places, grad, factors.dtype) if needed[1] else None


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.gate = inputs
    ctx.save_for_backward(x)


def _gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient("gated_backward", grad, *ctx.saved_tensors, *ctx.gate), None, None, None


def _save_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, order, ctx.factors, _, _ = inputs
    ctx.tokens, ctx.dtype = x.shape[0], x.dtype
    ctx.save_for_backward(order)


def _take_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (order,) = ctx.saved_tensors
    return _gradient("sum_rows", grad, _inverse(order), ctx.factors, ctx.tokens, ctx.dtype), None, None, None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, places, factors = ctx.saved_tensors
    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    of_rows, of_factors = _of_sum(grad, rows, factors, _inverse(places), places, needed)
    return of_rows, None, of_factors, None, None


def _inverse(order: Tensor | None) -> Tensor | None:
    """Where each of the numbers 0 to S - 1 stands in `order`, in the dtype of the other order."""
    if order is None:
        return None
    dtype = torch.int32 if order.dtype == torch.int64 else torch.int64
    every = torch.arange(len(order), device=order.device, dtype=dtype)
    return every.index_copy(0, order.long(), every)


for _name, _save, _backward in (
    ("take_rows", _save_take, _take_backward),
    ("sum_rows", _save_sum, _sum_backward),
    ("gated", _save_gated, _gated_backward),
):
    torch.library.register_autograd(f"bigq::{_name}", _backward, setup_context=_save, lib=library.LIBRARY)
