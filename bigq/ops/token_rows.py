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
    if _is_plain(x) and x.dtype in _FLOATS:
        return _Take.apply(x, order, places)  # type: ignore[no-any-return, no-untyped-call]
    return routes.take_rows(x, order, None, len(order), x.dtype)


def sum_rows(rows: Tensor, factors: Tensor, order: Tensor | None, places: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[T, N] in `dtype`: the sum of each token's rows of [S, N], times factors [T, top_k].

    Without order and places, the rows are in the order of the tokens.
    """
    if _is_plain(rows) and _is_plain(factors) and rows.dtype in _FLOATS and factors.dtype in _FLOATS:
        return _Sum.apply(rows, factors, order, places, dtype)  # type: ignore[no-any-return, no-untyped-call]
    return routes.sum_rows(rows, places, factors, len(factors), dtype)


def gated(x: Tensor, gate: Gate) -> Tensor:
    """[S, I] of x [S, 2I]; see `bigq.ops.routes.gated`."""
    if _is_plain(x) and x.dtype in _FLOATS:
        return _Gated.apply(x, gate)  # type: ignore[no-any-return, no-untyped-call]
    return routes.gated(x, *gate)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the kernels take it: on a GPU and not empty, in eager mode, of no subclass and without a tangent."""
    if is_compiling() or not (type(tensor) is Tensor and tensor.is_cuda and tensor.numel()):
        return False
    return unpack_dual(tensor).tangent is None  # type: ignore[no-untyped-call]


def _run(name: str, *args: Any) -> Any:
    """The op `name`, or its launcher if nobody hears or changes calls of ops."""
    if something_listens():
        return getattr(torch.ops.bigq, name).default(*args)
    return library.cuda_implementation(name)(*args)


def _gradient(name: str, *args: Any) -> Any:
    """The same in a backward pass: in torch, if somebody asks for the gradient of this gradient."""
    return getattr(routes, name)(*args) if torch.is_grad_enabled() else _run(name, *args)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        return _run("take_rows", x, order, None, len(order), x.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.tokens, ctx.dtype = len(inputs[0]), inputs[0].dtype
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _gradient("sum_rows", grad, places, None, ctx.tokens, ctx.dtype), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        rows: Tensor, factors: Tensor, order: Tensor | None, places: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return _run("sum_rows", rows, places, factors, len(factors), dtype)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, factors, order, places = ctx.saved_tensors
        of_rows = of_factors = None
        if ctx.needs_input_grad[0]:
            of_rows = _gradient("take_rows", grad, order, factors, len(rows), rows.dtype)
        if ctx.needs_input_grad[1]:
            of_factors = _gradient("dot_rows", rows, places, grad, factors.dtype)
        return of_rows, of_factors, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, gate: Gate) -> Tensor:
        return _run("gated", x, *gate)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.gate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient("gated_backward", grad, *ctx.saved_tensors, *ctx.gate), None
