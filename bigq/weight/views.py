"""Views of a quantized weight: torch functions that give one, and indexing. Writing to a view writes to the weight."""

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bigq.weight.lazy_weight import LazyWeight, plain

__all__ = ["VIEWS", "get_item", "reversed_dimensions", "set_item", "views", "without_numbers"]

Function = Callable[..., Any]
Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]

_SEVERAL = {"chunk", "split", "split_with_sizes", "tensor_split", "unbind"}
VIEWS = _SEVERAL | {
    "expand", "flatten", "narrow", "permute", "reshape", "reshape_as", "select", "squeeze", "swapaxes", "swapdims",
    "transpose", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip


def without_numbers(weight: LazyWeight) -> Tensor:
    """A tensor on meta of the same shape, strides and dtype."""
    return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")


def views(func: Function, weight: LazyWeight, others: Arguments, kwargs: Keywords) -> Any:
    """The result of `func`, one of VIEWS: a LazyWeight or a tuple of them; a plain tensor where torch copies."""

    def outputs(dense: Tensor) -> list[Tensor]:
        out = func(dense, *others, **kwargs)
        return [out] if isinstance(out, Tensor) else list(out)

    name = func.__name__
    if name == "view" and any(isinstance(value, torch.dtype) for value in (*others, *kwargs.values())):
        return func(weight.dequantize(), *others, **kwargs)
    if name in ("transpose", "swapaxes", "swapdims") and _swaps_the_last(weight, *others, *kwargs.values()):
        return weight.swapped()
    if name == "unbind" and (*others, *kwargs.values()) in ((), (0,)):
        return tuple(weight.part(i) for i in range(len(weight)))
    shapes = [out.shape for out in outputs(without_numbers(weight))]
    if name in ("flatten", "reshape", "reshape_as") and not _can_be_viewed(weight, shapes[0]):
        return func(weight.dequantize(), *others, **kwargs)  # a copy, as in torch
    if name in ("chunk", "split", "split_with_sizes") and shapes[0][1:] == weight.shape[1:]:
        stops = list(accumulate(shape[0] for shape in shapes))  # cut along the first dimension
        return tuple(weight.part(slice(*ends)) for ends in zip([0, *stops], stops, strict=False))
    if name in ("reshape", "unflatten", "view"):
        shape = tuple(shapes[0])
        return weight.viewed(lambda dense: outputs(dense)[0], lambda stored: stored.with_shape(shape))
    made = [weight.viewed(lambda dense, i=i: outputs(dense)[i]) for i in range(len(shapes))]  # type: ignore[misc]
    return tuple(made) if name in _SEVERAL else made[0]


def _can_be_viewed(weight: LazyWeight, shape: torch.Size) -> bool:
    try:
        without_numbers(weight).view(shape)
    except RuntimeError:
        return False
    return True


def _swaps_the_last(weight: LazyWeight, *dims: int) -> bool:
    return {dim % weight.dim() for dim in dims} == {weight.dim() - 1, weight.dim() - 2}


def reversed_dimensions(weight: LazyWeight) -> Tensor:
    """`weight.T`."""
    if weight.dim() == 2:
        return weight.swapped()
    return weight.viewed(lambda dense: dense.permute(*range(dense.dim() - 1, -1, -1)))


def get_item(weight: LazyWeight, index: Any) -> Any:
    """`weight[index]`. Entries and ranges of the first dimension are views that stay quantized."""
    first, *rest = index if isinstance(index, tuple) and index else (index,)
    if isinstance(first, Tensor) and not rest and first.dtype in (torch.int32, torch.int64):
        if not first.dim():
            return weight.part(int(first))
        operand = weight.operand()
        if operand is not None and not (operand.transposed and weight.dim() < 3):
            rows = operand.rows(torch.where(first < 0, first + len(weight), first), weight.dtype)
            return rows.mT if operand.transposed else rows
    is_basic = all(item is None or item is Ellipsis or type(item) in (int, slice) for item in (first, *rest))
    if not is_basic:
        return weight.dequantize()[plain(index)]  # a copy, as in torch
    if type(first) is int or (type(first) is slice and first.step in (None, 1)):
        part = weight.part(first)
        rest = rest if type(first) is int else [slice(None), *rest] if rest else []
        return part.viewed(lambda dense: dense[tuple(rest)]) if rest else part
    return weight.viewed(lambda dense: dense[index])


def set_item(weight: LazyWeight, index: Any, value: Any) -> None:
    part = get_item(weight, index) if type(index) in (int, slice) else None
    if isinstance(part, LazyWeight):
        part.write(torch.as_tensor(plain(value), dtype=weight.dtype, device=weight.device).expand(part.shape))
    else:
        dense = weight.dequantize()
        dense[plain(index)] = plain(value)
        weight.write(dense)
