"""QuantizedWeight: what code that reads `module.weight` gets, a tensor that decodes itself only where it must.

A quantized module has two faces. What enumerates its parameters (optimizers, FSDP2, safetensors, accelerate) sees plain
frozen tensors. What reads `module.weight` sees the weight: an object of the logical shape, dtype and device, made on
access. Products with it go to the format's kernels, rows are decoded alone, and anything else gets the dequantized
weight: slow and right. What is written to it in place is quantized into the module's tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigq.errors import UnsupportedError
from bigq.system.internals import GROUPED_PRODUCTS, as_plain_tensor, may_write
from bigq.weight.lazy_weight import LazyWeight, plain
from bigq.weight.stored import Stored

__all__ = ["QuantizedWeight"]

Function = Callable[..., Any]
Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]


class QuantizedWeight(LazyWeight):
    """The weight of a quantized module, or a view or a copy of it, for every function of torch.

    It needs no gradient and cannot get one; gradients flow to what it is multiplied by.
    """

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Iterable[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> Any:
        """Ask, in this order: is only a description read; is there a way that decodes less than all; is it written to.

        Whatever is left gets the dequantized weight.
        """
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func in _DESCRIBING or name in _DESCRIBING_NAMES:
            return as_plain_tensor(super().__torch_function__, func, types, args, kwargs)
        if func in _PRODUCTS:
            out = _PRODUCTS[func](*args, **kwargs)
            if out is not None:
                return out
        first = args[0] if args else None
        if isinstance(first, QuantizedWeight):
            if func in _ANSWERS:
                return _ANSWERS[func](first, *args[1:], **kwargs)
            if name in _VIEWS:
                return _views(func, first, args[1:], kwargs)
        if name == "result_type":
            return func(*(_description(value) if isinstance(value, QuantizedWeight) else value for value in args))
        if name in _CASTS:
            return _cast(func, args, kwargs)
        if name in _LIKE and isinstance(first, QuantizedWeight):
            return func(_description(first), *args[1:], **{"device": first.device, **kwargs})
        return _dense(func, _written(name, args, kwargs), args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the function that switches it off
        cls, func: Any, types: Iterable[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> Any:
        """Where torch's C++ gets at the weight on a way of its own."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        written = [args[0]] if isinstance(args[0], QuantizedWeight) and may_write(func) else []
        return _dense(func, written, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        operand = self.operand()
        settings = {} if operand is None else operand.format.describe()
        words = [f"{name}={value}" for name, value in settings.items()]
        return f"QuantizedWeight({', '.join([*words, f'shape={list(self.shape)}'])}, {self.dtype}, {self.device})"


def _getter(attribute: str) -> Function:
    """The function that torch reports when `attribute` of a tensor is read."""
    return getattr(Tensor, attribute).__get__  # type: ignore[no-any-return]


def _setter(attribute: str) -> Function:
    """The function that torch reports when `attribute` of a tensor is assigned."""
    return getattr(Tensor, attribute).__set__  # type: ignore[no-any-return]


# Only described: shape, dtype, device and their kin, which the object itself has.

_DESCRIBING = {
    _getter(name)
    for name in (
        "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mkldnn", "is_nested",
        "is_quantized", "is_sparse", "is_sparse_csr", "itemsize", "layout", "names", "nbytes", "ndim", "output_nr",
        "requires_grad", "retains_grad", "shape", "_backward_hooks", "_base", "_version",
    )
    if hasattr(Tensor, name)  # releases of torch differ
}  # fmt: skip
_DESCRIBING_NAMES = {
    "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_conj", "is_contiguous",
    "is_floating_point", "is_inference", "is_neg", "is_signed", "is_tensor", "ndimension", "nelement", "numel", "size",
    "storage_offset", "stride",
}  # fmt: skip

# Made in the likeness of the weight, without its numbers.

_LIKE = {
    "empty_like", "full_like", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros",
    "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like",
}  # fmt: skip


def _description(weight: QuantizedWeight) -> Tensor:
    """A tensor of the same shape, strides and dtype, and without memory."""
    return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")


# Copies in another dtype or on another device, decoded when they are read.

_CASTS = {"bfloat16", "cpu", "cuda", "double", "float", "half", "to", "type", "type_as"}


def _cast(func: Function, args: Arguments, kwargs: Keywords) -> Any:
    def empty(value: Any) -> Any:  # a cast to "that of another tensor" reads its dtype and device only
        is_weight = isinstance(value, QuantizedWeight)
        return torch.empty(0, dtype=value.dtype, device=value.device) if is_weight else value

    first, *others = args
    others, kwargs = _mapped(empty, others), _mapped(empty, dict(kwargs))
    if not isinstance(first, QuantizedWeight):
        return func(first, *others, **kwargs)
    like = empty(first)
    out = func(like, *others, **kwargs)
    if out is like:
        return first
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return func(first.dequantize(), *others, **kwargs)
    return first.copy_as(out.dtype, out.device)


# Views: what is written to them is written to the weight. `_dense` finds those that are not listed.

_SEVERAL_VIEWS = {"chunk", "split", "split_with_sizes", "tensor_split", "unbind"}
_VIEWS = _SEVERAL_VIEWS | {
    "expand", "flatten", "narrow", "permute", "reshape", "reshape_as", "select", "squeeze", "swapaxes", "swapdims",
    "transpose", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip


def _views(func: Function, weight: QuantizedWeight, others: Arguments, kwargs: Keywords) -> Any:
    """What `func` gives, one view or several, each of them a QuantizedWeight."""

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
    shapes = [out.shape for out in outputs(_description(weight))]
    if name in ("flatten", "reshape", "reshape_as") and not _can_be_viewed(weight, shapes[0]):
        return func(weight.dequantize(), *others, **kwargs)  # a copy, as in torch
    if name in ("chunk", "split", "split_with_sizes") and shapes[0][1:] == weight.shape[1:]:
        stops = list(accumulate(shape[0] for shape in shapes))  # cut along the first dimension
        return tuple(weight.part(slice(*ends)) for ends in zip([0, *stops], stops, strict=False))
    made = [weight.viewed(lambda dense, i=i: outputs(dense)[i]) for i in range(len(shapes))]  # type: ignore[misc]
    return tuple(made) if name in _SEVERAL_VIEWS else made[0]


def _can_be_viewed(weight: QuantizedWeight, shape: torch.Size) -> bool:
    try:
        _description(weight).view(shape)
    except RuntimeError:
        return False
    return True


def _swaps_the_last(weight: QuantizedWeight, *dims: int) -> bool:
    return {dim % weight.dim() for dim in dims} == {weight.dim() - 1, weight.dim() - 2}


def _reversed(weight: QuantizedWeight) -> Tensor:
    """`weight.T`."""
    if weight.dim() == 2:
        return weight.swapped()
    return weight.viewed(lambda dense: dense.permute(*range(dense.dim() - 1, -1, -1)))


def _getitem(weight: QuantizedWeight, index: Any) -> Any:
    """`weight[index]`: entries and ranges of the first dimension are views that stay quantized."""
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


def _setitem(weight: QuantizedWeight, index: Any, value: Any) -> None:
    part = _getitem(weight, index) if type(index) in (int, slice) else None
    if isinstance(part, QuantizedWeight):
        part.write(torch.as_tensor(plain(value), dtype=weight.dtype, device=weight.device).expand(part.shape))
    else:
        dense = weight.dequantize()
        dense[plain(index)] = plain(value)
        weight.write(dense)


def _require_grad(weight: QuantizedWeight, requires_grad: bool = True) -> QuantizedWeight:
    if requires_grad:
        raise UnsupportedError(
            "a quantized weight has no gradient: train an adapter, or nn.Parameter(weight.dequantize())"
        )
    return weight


def _refuse_address(weight: QuantizedWeight) -> None:
    raise UnsupportedError("a quantized weight has no memory of its own: call weight.dequantize() for a plain tensor")


def _deepcopy(weight: QuantizedWeight, memo: dict[int, Any]) -> nn.Parameter:
    return memo.setdefault(id(weight), nn.Parameter(weight.dequantize(), requires_grad=False))  # type: ignore[no-any-return]


_ANSWERS: dict[Function, Function] = {
    _getter("data"): lambda weight: weight,
    _setter("data"): lambda weight, value: weight.set_data(value),
    _setter("requires_grad"): _require_grad,
    Tensor.requires_grad_: _require_grad,
    Tensor.detach: lambda weight: weight,
    Tensor.detach_: lambda weight: weight,
    Tensor.contiguous: lambda weight: weight if weight.is_contiguous() else weight.copy_as(weight.dtype, weight.device),
    Tensor.clone: lambda weight, **_: weight.dequantize(),
    torch.clone: lambda weight, **_: weight.dequantize(),
    Tensor.__deepcopy__: _deepcopy,
    Tensor.t: _reversed,
    torch.t: _reversed,
    _getter("T"): _reversed,
    _getter("mT"): lambda weight: weight.swapped(),
    Tensor.__getitem__: _getitem,
    Tensor.__setitem__: _setitem,
    Tensor.__iter__: lambda weight: iter(weight.unbind()),
    Tensor.data_ptr: _refuse_address,
    _getter("__cuda_array_interface__"): _refuse_address,
}

# Products, by the format's kernels. None: this case has no kernel.


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    operand = _operand(input, weight, dim=2, transposed=False)
    return None if operand is None else operand.linear(input, bias)


def _matmul(input: Tensor, other: Tensor, **rest: Any) -> Tensor | None:
    if rest:
        return None
    if other.dim() == 3 or (input.dim() == 3 and isinstance(input, QuantizedWeight)):
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
    operand = _operand(mat2, input, dim=3, transposed=False)  # w @ x is (x.T @ w.T).T
    return None if operand is None else operand.batched_linear(mat2.mT).mT


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, **rest: Any) -> Any:
    operand = _operand(mat1, mat2, dim=2, transposed=True)
    if operand is None or rest or (beta, alpha) != (1, 1) or input.shape != mat2.shape[1:]:
        return None
    return operand.linear(mat1, input)


def _grouped_mm(input: Tensor, mat2: Tensor, *, offs: Tensor | None = None, **rest: Any) -> Tensor | None:
    """x [S, K] by [E, K, N]; `offs` says where the rows of each weight end. The host reads it: the GPU is awaited."""
    operand = _operand(input, mat2, dim=3, transposed=True)
    options = [value for value in rest.values() if value is not None]
    if operand is None or offs is None or options or input.dim() != 2:
        return None
    if input.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return operand.grouped_linear(input, offs.tolist())


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: Any = None, *rest: Any, **more: Any
) -> Any:
    operand = _operand(input, weight, dim=2, transposed=False)
    return None if operand is None or max_norm else operand.rows(input, weight.dtype)


def _operand(x: Any, weight: Any, *, dim: int, transposed: bool) -> Stored | None:
    """How `weight` is stored, if it is a quantized one of that kind and `x` is not."""
    if not isinstance(weight, QuantizedWeight) or isinstance(x, QuantizedWeight) or weight.dim() != dim:
        return None
    operand = weight.operand()
    return operand if operand is not None and operand.transposed == transposed else None


_PRODUCTS: dict[Function, Function] = {
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

# The rest: dequantized, and quantized again where it was written to.

_IN_PLACE_OPERATORS = {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
}


def _written(name: str, args: Arguments, kwargs: Keywords) -> list[QuantizedWeight]:
    """The weights that the function called `name` writes to."""
    written = [kwargs.get("out")]
    if (name.endswith("_") and not name.startswith("__")) or name in _IN_PLACE_OPERATORS or kwargs.get("inplace"):
        written += args[:1] or list(kwargs.values())[:1]  # torch.nn.init passes all by name
    leaves: list[Any] = []
    _mapped(leaves.append, written)
    return [weight for weight in leaves if isinstance(weight, QuantizedWeight)]


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `function` of what its lists, tuples and dicts hold, at any depth, in place of that."""
    if isinstance(value, dict):
        return {key: _mapped(function, inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        inner = [_mapped(function, item) for item in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return function(value)


def _dense(func: Function, written: list[QuantizedWeight], args: Arguments, kwargs: Keywords) -> Any:
    """`func` of dequantized weights; those of `written` then get what it made of them. Views stay views of a weight."""
    first = args[0] if args else None
    dense = {id(weight): weight.dequantize() for weight in written}
    if isinstance(first, QuantizedWeight):
        dense.setdefault(id(first), first.dequantize())

    def numbers(value: Any) -> Any:
        return dense[id(value)] if id(value) in dense else plain(value)

    head, others, keywords = (_mapped(numbers, given) for given in (args[:1], args[1:], dict(kwargs)))
    out = func(*head, *others, **keywords)
    for weight in written:
        weight.write(dense[id(weight)])
        if out is dense[id(weight)]:
            return weight
    if not isinstance(first, QuantizedWeight):
        return out
    is_view = _shares_memory(out, dense[id(first)])
    if is_view and isinstance(out, Tensor):
        return first.viewed(lambda whole: func(whole, *others, **keywords))
    if is_view and isinstance(out, (tuple, list)):
        views = [first.viewed(lambda whole, i=i: func(whole, *others, **keywords)[i]) for i in range(len(out))]  # type: ignore[misc]
        return type(out)(views)
    return out


def _shares_memory(out: Any, dense: Tensor) -> bool:
    """Whether `out` is a view of `dense`, or holds one: a write to it would be lost."""
    first = out[0] if isinstance(out, (tuple, list)) and out else out
    if not isinstance(first, Tensor) or first.layout != torch.strided or first.device != dense.device:
        return False
    return first.numel() > 0 and first.untyped_storage().data_ptr() == dense.untyped_storage().data_ptr()
