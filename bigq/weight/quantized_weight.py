"""QuantizedWeight: the tensor that `module.weight` is, dequantized only if a function needs its numbers.

Code that enumerates the parameters of a quantized module (optimizers, FSDP2, safetensors, accelerate) finds plain
frozen tensors. Code that reads `module.weight` gets this object, made at each access, with the shape, dtype and device
of the weight. Products with it use the format's kernels, and rows are decoded alone. Every other function gets the
dequantized weight, which is slow but correct. Numbers that are written to it in place are quantized into the module's
tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigq.errors import UnsupportedError
from bigq.ops.sharding import local_part
from bigq.system.internals import as_plain_tensor, may_write
from bigq.weight.lazy_weight import LazyWeight, plain
from bigq.weight.products import PRODUCTS
from bigq.weight.views import VIEWS, get_item, reversed_dimensions, set_item, views, without_numbers

__all__ = ["QuantizedWeight"]

Function = Callable[..., Any]
Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]


class QuantizedWeight(LazyWeight):
    """The weight of a quantized module, or a view or a copy of it, as a tensor that works with every torch function.

    It has no gradient and cannot get one; gradients reach the tensors that it is multiplied by. It has no memory
    address. User code never creates it: read `module.weight`. `dequantize()` returns a plain tensor.

    Example:
        >>> import bigq, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig("nf4"), device_map="cpu")
        >>> weight = model[0].weight
        >>> weight.shape, weight.dtype
        (torch.Size([32, 64]), torch.float32)
        >>> (torch.ones(2, 64) @ weight.T).shape  # computed by the kernels of NF4
        torch.Size([2, 32])
        >>> type(weight.dequantize())
        <class 'torch.Tensor'>
    """

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Iterable[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> Any:
        """Find the first way that serves `func`, from the cheapest on.

        It reads only shape, dtype or device; it is a product with a kernel; it is answered or viewed without decoding
        all numbers; or it gets the dequantized weight, which is quantized again if `func` writes to it.
        """
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func in _DESCRIBING or name in _DESCRIBING_NAMES:
            return as_plain_tensor(super().__torch_function__, func, types, args, kwargs)
        if func in PRODUCTS:
            out = PRODUCTS[func](*args, **kwargs)
            if out is not None:
                return out
        first = args[0] if args else None
        if isinstance(first, QuantizedWeight):
            if func in _ANSWERS:
                return _ANSWERS[func](first, *args[1:], **kwargs)
            if name in VIEWS:
                return views(func, first, args[1:], kwargs)
        if name == "result_type":
            return func(*(without_numbers(value) if isinstance(value, QuantizedWeight) else value for value in args))
        if name in _CASTS:
            return _cast(func, args, kwargs)
        if name in _LIKE and isinstance(first, QuantizedWeight):
            return func(without_numbers(first), *args[1:], **{"device": first.device, **kwargs})
        return _dense(func, _written(name, args, kwargs), args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as the function that disables it
        cls, func: Any, types: Iterable[type], args: Arguments = (), kwargs: Keywords | None = None
    ) -> Any:
        """Serve calls that come from torch's C++ code and do not pass `__torch_function__`."""
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


# Functions that read only shape, dtype, device and the like, which the object itself has.

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

# Functions that make a tensor like the weight, and do not read its numbers.

_LIKE = {
    "empty_like", "full_like", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros",
    "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like",
}  # fmt: skip


# Copies in another dtype or on another device, decoded when they are read.

_CASTS = {"bfloat16", "cpu", "cuda", "double", "float", "half", "to", "type", "type_as"}


def _cast(func: Function, args: Arguments, kwargs: Keywords) -> Any:
    def empty(value: Any) -> Any:  # `x.to(weight)` reads only the dtype and device of weight
        is_weight = isinstance(value, QuantizedWeight)
        return torch.empty(0, dtype=value.dtype, device=value.device) if is_weight else value

    first, *others = args
    # A memory format is one of four dimensions, which an empty tensor does not have.
    given = {name: value for name, value in kwargs.items() if name != "memory_format"}
    others, kwargs = _mapped(empty, others), _mapped(empty, given)
    if not isinstance(first, QuantizedWeight):
        return func(first, *others, **kwargs)
    like = empty(first)
    out = func(like, *others, **kwargs)
    if out is like:
        return first
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return func(first.dequantize(), *others, **kwargs)
    return first.copy_as(out.dtype, out.device)


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
    Tensor.t: reversed_dimensions,
    torch.t: reversed_dimensions,
    _getter("T"): reversed_dimensions,
    _getter("mT"): lambda weight: weight.swapped(),
    Tensor.__getitem__: get_item,
    Tensor.__setitem__: set_item,
    Tensor.__iter__: lambda weight: iter(weight.unbind()),
    Tensor.data_ptr: _refuse_address,
    _getter("__cuda_array_interface__"): _refuse_address,
}

# All other functions get the dequantized weight. It is quantized again if they write to it.

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
    """Call `func` with dequantized weights, and write the results back to those in `written`.

    A result that is a view of a dequantized weight becomes a view of the quantized one.
    """
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
        if out.dtype != first.dtype:  # complex numbers: a view has the dtype of the weight
            return out
        return first.viewed(lambda whole: func(whole, *others, **keywords))
    if is_view and isinstance(out, (tuple, list)):
        views = [first.viewed(lambda whole, i=i: func(whole, *others, **keywords)[i]) for i in range(len(out))]  # type: ignore[misc]
        return type(out)(views)
    return out


def _shares_memory(out: Any, dense: Tensor) -> bool:
    """Whether `out` is a view of `dense`, or a sequence of views: a write to it would be lost."""
    first = out[0] if isinstance(out, (tuple, list)) and out else out
    if not isinstance(first, Tensor) or first.layout != torch.strided or first.device != dense.device:
        return False
    memory, own = local_part(first).untyped_storage(), local_part(dense).untyped_storage()
    return first.numel() > 0 and memory.data_ptr() == own.data_ptr()
