"""The eager call of a linear: past the dispatcher where nothing there would act.

In eager mode a linear of few tokens is bound by the host, and every Python instruction counts. On plain CUDA tensors,
with no mode, transform, trace or profiler active, an op is its launcher, or a replay of it. If a gradient is needed,
one node of autograd is around it. All else goes through the dispatcher.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.compiler import is_compiling

from bigq.ops import library
from bigq.ops.eager_gradient import linear_with_gradient, routed_with_gradient
from bigq.ops.replays import Settings, State, run
from bigq.ops.sharding import is_sharded, register_rules, shard_width
from bigq.ops.transformed import linear_in_transforms
from bigq.system.internals import functorch_transforms, something_listens

__all__ = ["call_op", "linear", "routed"]


def call_op(name: str, first: Tensor, *args: Any) -> Any:
    """The op `name` of tensors without gradients: on a GPU its launcher, if nobody hears or changes calls of ops."""
    if first.is_cuda and not something_listens():
        return library.cuda_implementation(name)(first, *args)
    return getattr(torch.ops.bigq, name).default(first, *args)


def linear(name: str, x: Tensor, state: State, settings: Settings) -> Tensor:
    """The op `name` of x [..., K], the tensors of a quantized weight with the bias among them, and its settings."""
    if is_compiling():
        return getattr(library, name)(x, *state, *settings)  # type: ignore[no-any-return]
    is_plain = type(x) is Tensor and x.is_cuda and not something_listens()
    if is_plain:
        if torch.is_grad_enabled() and _needs_gradient(x, state):
            return linear_with_gradient(name, x, state, settings)
        return run(library.cuda_implementation, name, x, state, settings)
    if functorch_transforms():
        return linear_in_transforms(name, x, state, settings)
    if is_sharded(x):
        settings = _for_shards(name, x, state, settings)
    primal, tangent = unpack_dual(x)  # type: ignore[no-untyped-call]
    bias, bias_tangent = (None, None) if state[2] is None else unpack_dual(state[2])  # type: ignore[no-untyped-call]
    if tangent is None and bias_tangent is None:
        return getattr(library, name)(x, *state, *settings)  # type: ignore[no-any-return]
    # torch.library takes no rule for forward mode, and would drop the tangents.
    out = linear(name, primal, (*state[:2], bias, *state[3:]), settings)
    change = None if tangent is None else _times_weight(name, tangent, state, settings)
    if bias_tangent is not None:
        change = bias_tangent.expand_as(out) if change is None else change + bias_tangent
    return make_dual(out, change)  # type: ignore[no-untyped-call, no-any-return]


def routed(name: str, x: Tensor, route: Tensor, state: State, settings: Settings) -> Tensor:
    """The op `name` of x [M, K] and a stack of quantized weights; `route` says which of them multiplies which row."""
    if is_compiling():
        return getattr(library, name)(x, route, *state, *settings)  # type: ignore[no-any-return]
    is_plain = type(x) is Tensor and x.is_cuda and not something_listens()
    if is_plain:
        if torch.is_grad_enabled() and _needs_gradient(x, state):
            return routed_with_gradient(name, x, route, state, settings)
        return run(library.cuda_implementation, name, x, state, settings, (route,))
    if is_sharded(x):
        settings = _for_shards(name, x, state, settings)
    primal, tangent = unpack_dual(x)  # type: ignore[no-untyped-call]
    bias, bias_tangent = (None, None) if state[2] is None else unpack_dual(state[2])  # type: ignore[no-untyped-call]
    if tangent is None and bias_tangent is None:
        return getattr(library, name)(x, route, *state, *settings)  # type: ignore[no-any-return]
    out = routed(name, primal, route, (*state[:2], bias, *state[3:]), settings)
    tangent = torch.zeros_like(primal) if tangent is None else tangent
    if name.endswith("int8"):  # its derivative rounds nothing to int8: with this threshold every column is an outlier
        settings = (torch.finfo(tangent.dtype).tiny,)
    change = routed(name, tangent, route, (*state[:2], bias_tangent, *state[3:]), settings)
    return make_dual(out, change)  # type: ignore[no-untyped-call, no-any-return]


def _for_shards(name: str, x: Tensor, state: State, settings: Settings) -> Settings:
    """The settings of an op of DTensors. The last one of a product with a 4-bit weight is K, which has to be x's."""
    register_rules()
    packed, columns = state[0], settings[-1]
    if name == "linear_int8" or packed is None or columns != x.shape[-1]:
        return settings
    return *settings[:-1], shard_width(packed, x.shape[-1])


def _times_weight(name: str, x: Tensor, state: State, settings: Settings) -> Tensor:
    """x times the transposed weight: also for int8, as its backward pass does, in the dtype of x."""
    if name == "linear_int8":
        return x @ library.dequantize_int8(*state[:2], x.dtype).mT  # type: ignore[no-any-return]
    return getattr(library, name)(x, *state[:2], None, *state[3:], *settings)  # type: ignore[no-any-return]


def _needs_gradient(x: Tensor, state: State) -> bool:
    return x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in state)
