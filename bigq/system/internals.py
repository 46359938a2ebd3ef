"""Internals: the private names of torch that bigq uses, each with a public way that is slower and as right.

No other file names them, nor those of Triton, which `bigq_kernels.internals` holds. A private way is tried on a tiny
tensor when this file is imported, and taken if it does there what it is taken for. So a release of torch that renames
or changes one costs time. It never costs a right result.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib import import_module
from itertools import count
from operator import attrgetter, methodcaller
from sys import getrefcount
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.nn import functional as F

__all__ = [
    "ATTENTION_OUTPUT", "COUNTS_HOLDERS", "EXTRA_STATE", "FSDP_SHARDS_INTEGERS", "GROUPED_PRODUCTS", "SEES_EDITS",
    "TELLS_HOOKS", "TELLS_LISTENERS", "as_plain_tensor", "as_result", "calls_only_forward", "can_hook_saved_tensors",
    "check", "copy_all", "count_holders", "cut", "edits_of", "functorch_transforms", "has_forward_pre_hooks",
    "is_in_backward", "let_fsdp_shard_integers", "load_hooks", "may_write", "saved_tensor_hooks", "something_listens",
    "something_transforms", "sparse_parts", "state_hooks", "version_of", "wrapper",
]  # fmt: skip

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def _holds(claim: Callable[[], object]) -> bool:
    """Whether `claim` is true of this torch; an error says that it is not."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return bool(claim())
    except Exception:
        return False


# What acts between the call of an op and its kernel: past the dispatcher a linear takes 15 to 24 us of host time, and
# through it about 25 more. Without an answer all calls take the dispatcher.

_TELLTALES = (
    "_len_torch_function_stack",
    "_len_torch_dispatch_stack",
    "_functorch.maybe_current_level",
    "_get_tracing_state",
    "_autograd._profiler_enabled",
)


def _listener_checks() -> tuple[Callable[[], bool], ...]:
    functions, dispatches, transform, trace, profiler = attrgetter(*_TELLTALES)(torch._C)

    def something_transforms() -> Any:
        """Whether a dispatch mode, transform, trace or level of dual numbers is active. True where it is not known."""
        return dispatches() or transform() is not None or trace() is not None or forward_ad._current_level >= 0

    def something_listens() -> Any:
        """Whether a mode, transform, trace, profiler or level of dual numbers hears or changes calls of ops.

        True where it is not known.
        """
        return (
            functions()
            or dispatches()
            or transform() is not None
            or trace() is not None
            or profiler()
            or forward_ad._current_level >= 0
        )

    return something_listens, something_transforms, lambda: transform() is not None  # of torch.func; False if not known


def _listeners_are_told() -> bool:
    checks = _listener_checks()
    before = [bool(check()) for check in checks]
    with forward_ad.dual_level():
        return before == [False] * 3 and all(check() for check in checks[:2])


TELLS_LISTENERS = _holds(_listeners_are_told)
something_listens, something_transforms, functorch_transforms = (
    _listener_checks() if TELLS_LISTENERS else (lambda: True, lambda: True, lambda: False)
)


# Versions of tensors, which count what torch sees of edits. Without them every tensor looks edited each time: an
# offloaded block is laid out and copied anew for each call, never ahead, and through the memory map where a file of a
# checkpoint holds it. A copy of a quantized weight has memory of its own.


def _versions_count() -> bool:
    tensor = torch.tensor([0.0], device="cpu")
    before: int = tensor._version
    tensor.add_(1)
    return tensor._version == before + 1


SEES_EDITS = _holds(_versions_count)
_EDITS = count(1)
# of a tensor that was not made in inference mode
edits_of: Callable[[Tensor], int] = attrgetter("_version") if SEES_EDITS else lambda _: next(_EDITS)


def version_of(tensor: Tensor) -> int:
    """How often torch has seen `tensor` edited; 0 for one made in inference mode, of which it keeps no count."""
    return 0 if tensor.is_inference() else edits_of(tensor)


# Holders of memory. The tensors over a device slot are used again if nothing else holds them after a call: new ones
# cost 0.9 ms of host time a block of an 8B model, and compiled code and replays know only the old ones. Where holders
# are not counted, as with free-threaded Python, whose counts are not exact, a slot is used once.

_use_count = methodcaller("_use_count")


def _holders(buffer: Tensor, tensors: Sequence[Tensor]) -> tuple[int, list[int], list[int]]:
    owners: int = torch._C._storage_Use_Count(buffer.untyped_storage()._cdata)
    return owners, list(map(getrefcount, tensors)), list(map(_use_count, tensors))


def _holders_count() -> bool:
    buffer = torch.tensor([0.0, 0.0], device="cpu")
    tensors, weight = [buffer.view(2)], torch.tensor(1.0, device="cpu", requires_grad=True)
    alone, counted = _holders(buffer, tensors), []
    holds: list[Callable[[], Tensor]] = [lambda: buffer[:1], lambda: tensors[0], lambda: tensors[0] * weight]
    for hold in holds:
        held = hold()
        counted.append(_holders(buffer, tensors))
        del held
    return alone == _holders(buffer, tensors) and alone not in counted


COUNTS_HOLDERS = getattr(sys, "_is_gil_enabled", lambda: True)() and _holds(_holders_count)


def count_holders(buffer: Tensor, tensors: Sequence[Tensor]) -> tuple[int, list[int], list[int]] | None:
    """How many hold the memory of `buffer`, such as views, and each of `tensors`, in Python and in C++.

    None where that is not known: anyone may hold them.
    """
    return _holders(buffer, tensors) if COUNTS_HOLDERS else None


# Hooks for what autograd saves. With them it saves the offloaded tensor in place of its copy. Where it is not known
# which hooks are in force, none are set: autograd holds the copies, so each block of a graph takes memory of its own.
# The gradients are those of the weights as they were copied, also where one was edited since, which is an error
# otherwise.


def _top_hooks() -> Hooks | None:
    return cast(Hooks | None, torch._C._autograd._top_saved_tensors_default_hooks(False))


def _hooks_enabled() -> bool:
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


def _hooks_are_told() -> bool:
    def unchanged(value: Tensor) -> Tensor:
        return value

    with saved_tensors_hooks(unchanged, unchanged):
        told = _top_hooks() == (unchanged, unchanged) and _hooks_enabled()
    with disable_saved_tensors_hooks("bigq asks whether this is seen"):
        return told and not _hooks_enabled()


TELLS_HOOKS = SEES_EDITS and _holds(_hooks_are_told)  # an offloaded tensor that was edited has to be refused


def can_hook_saved_tensors() -> bool:
    """Whether hooks for saved tensors can be set now, and those in force are known."""
    return TELLS_HOOKS and _hooks_enabled()


def saved_tensor_hooks() -> Hooks | None:
    """The (pack, unpack) in force; ask only where `can_hook_saved_tensors`."""
    return _top_hooks()


# Whether a backward pass runs, in which a weight that is read may lack the adapter of its call. Not tried at import, as
# that would start threads, which a process that is forked then lacks. Without an answer, other signs are looked for.


def is_in_backward() -> bool | None:
    """Whether this thread runs a backward pass. None where that is not told."""
    graph_task = getattr(torch._C, "_current_graph_task_id", None)
    return None if graph_task is None else bool(graph_task() != -1)


# Cutting memory: in one call of torch's, each of which lets go of Python's lock, for which the reading threads wait.


@cache
def _of_shape(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")


def _cut_at_once(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    views = torch._C._nn.unflatten_dense_tensors(flat, [_of_shape(shape) for shape in shapes])
    return [view if view.numel() else view.view(shape) for view, shape in zip(views, shapes, strict=True)]


def _cut_one_by_one(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    parts = flat.split([_of_shape(shape).numel() for shape in shapes])  # type: ignore[no-untyped-call]
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _cut_is_right() -> bool:
    flat, shapes = torch.tensor([1, 2, 3], device="cpu"), [(2,), (0, 4), (1, 1)]
    cuts = [cut(flat, shapes) for cut in (_cut_at_once, _cut_one_by_one)]
    seen = [[(view.shape, view.tolist(), view.data_ptr()) for view in views if view.numel()] for views in cuts]
    return seen[0] == seen[1] and [view.shape for view in cuts[0]] == [view.shape for view in cuts[1]]


cut = _cut_at_once if _holds(_cut_is_right) else _cut_one_by_one  # (flat, shapes): its views, one after the other


# Copying and casting several tensors: one kernel instead of one for each.


def _copy_one_by_one(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _copies_all() -> bool:
    targets = [torch.zeros(2, dtype=torch.bfloat16, device="cpu"), torch.zeros(1, dtype=torch.bfloat16, device="cpu")]
    torch._foreach_copy_(targets, [torch.tensor([1.0, 2.0], device="cpu"), torch.tensor([3.0], device="cpu")])
    return [target.tolist() for target in targets] == [[1.0, 2.0], [3.0]]


copy_all: Callable[[Sequence[Tensor], Sequence[Tensor]], object] = (
    torch._foreach_copy_ if _holds(_copies_all) else _copy_one_by_one  # type: ignore[assignment]
)

# The result of a function of autograd: torch lets nobody write to one that is a view of another tensor, as that of
# F.linear is with a bias and more than two dimensions. Without the private way every result is copied.


def _without_base(tensor: Tensor) -> Tensor:
    return torch.ops.aten._unsafe_view.default(tensor, tensor.shape) if tensor._is_view() else tensor


def _keeps_the_memory() -> bool:
    base = torch.zeros(4, device="cpu")
    view = base.view(2, 2)
    own = _without_base(view)
    return view._is_view() and not own._is_view() and own.data_ptr() == view.data_ptr() and _without_base(base) is base


# of a tensor that nobody else holds, nor its base
as_result: Callable[[Tensor], Tensor] = _without_base if _holds(_keeps_the_memory) else torch.clone

# A tensor without memory whose functions are those of its class. The public way takes the memory for a moment.


def _wrapper_at_once(
    kind: type[Tensor], shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: torch.dtype, device: Any
) -> Any:
    return Tensor._make_wrapper_subclass(kind, shape, strides=strides, dtype=dtype, device=device)


def _wrapper_of_freed(
    kind: type[Tensor], shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: torch.dtype, device: Any
) -> Any:
    if strides is None:
        strides = torch.empty(shape, device="meta").stride()
    tensor = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor.as_subclass(kind)


class _Wrapped(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func


def _wraps() -> bool:
    made = _wrapper_at_once(_Wrapped, (2, 3), (1, 2), torch.float16, "cpu")
    found = (type(made), made.shape, made.stride(), made.dtype, made.device.type)
    return found == (_Wrapped, (2, 3), (1, 2), torch.float16, "cpu")


wrapper = _wrapper_at_once if _holds(_wraps) else _wrapper_of_freed


# Reading what a subclass of Tensor describes, such as its shape: 8 us, and 15 the way that Tensor has for subclasses.


def _as_plain_tensor(default: Any, func: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():  # "Extending PyTorch" documents it
        return func(*args, **kwargs)


def _by_default(default: Any, func: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
    return default(func, types, args, kwargs)


# (the class's default __torch_function__, and what that takes): what `func` gives without the class's own
as_plain_tensor = _as_plain_tensor if _holds(lambda: _as_plain_tensor(None, int, (), ("1",), {}) == 1) else _by_default


# What an op says of itself. `may_write` is asked where torch's C++ calls one with a quantized weight: where it does not
# know, the weight is compared with what it was.


def _is_mutable(op: Any) -> bool:
    return bool(op._schema.is_mutable)


def _mutability_is_told() -> bool:
    aten = torch.ops.aten
    return [_is_mutable(op) for op in (aten.add.Tensor, aten.add_.Tensor, aten.add.out)] == [False, True, True]


may_write: Callable[[Any], bool] = _is_mutable if _holds(_mutability_is_told) else lambda _: True


# Functions and classes under names that come and go.


def _check(condition: Any, message: Callable[[], str]) -> None:
    """torch._check, which tells torch.export too that `condition` holds."""
    if not condition:
        raise RuntimeError(message())


check: Callable[[Any, Callable[[], str]], object] = getattr(torch, "_check", _check)  # a trial takes seconds of imports

# The products of groups of rows with the weights of a stack; without an entry, that weight is dequantized.


def _grouped_products() -> tuple[Callable[..., Any], ...]:
    """torch's two, and what a subclass of Tensor hears of a call of the public one: in torch 2.13 the private one.

    A release may read attributes of the tensors first, so names tell which function it is.
    """
    found = [getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)]

    class Hears(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> None:
            if "grouped" in getattr(func, "__name__", ""):
                found.append(func)

    x = torch.empty(0, device="meta").as_subclass(Hears)
    _holds(lambda: F.grouped_mm(x, x))
    return tuple(dict.fromkeys(product for product in found if product is not None))


GROUPED_PRODUCTS = _grouped_products()


def _attention_output() -> type[nn.Module] | None:
    """The class of the linear that nn.MultiheadAttention ends with, which nothing else uses."""
    kind = getattr(nn.modules.linear, "NonDynamicallyQuantizableLinear", None)
    kind = kind or type(nn.MultiheadAttention(1, 1, device="meta").out_proj)
    return None if kind is nn.Linear else kind


ATTENTION_OUTPUT = _attention_output()


# The tables of hooks that every module has: each is found by what torch's public function adds to a module's own.


def _hook_table(register: str) -> str:
    """The attribute of a module in which its method called `register` puts a hook; empty where it is not found."""
    module = nn.Module()
    getattr(module, register)(lambda *args: None)
    return next((name for name, value in vars(module).items() if isinstance(value, dict) and value), "")


_LOAD_HOOKS = _hook_table("register_load_state_dict_pre_hook")
_BEFORE_STATE = _hook_table("register_state_dict_pre_hook")
_AFTER_STATE = _hook_table("register_state_dict_post_hook")
_FORWARD_HOOKS = _hook_table("register_forward_pre_hook")
_CALL_HOOKS = (
    _FORWARD_HOOKS,
    _hook_table("register_forward_hook"),
    _hook_table("register_full_backward_pre_hook"),
    _hook_table("register_full_backward_hook"),
)


def load_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks of `load_state_dict` of this module itself: hook(state_dict, prefix, metadata, strict, ...)."""
    return list(getattr(module, _LOAD_HOOKS, {}).values())


def state_hooks(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], dict[int, Callable[..., Any]]]:
    """The dicts of the hooks that run before and after `state_dict` of this module; empty ones where not known."""
    return getattr(module, _BEFORE_STATE, {}), getattr(module, _AFTER_STATE, {})


def has_forward_pre_hooks(module: nn.Module) -> bool:
    """Whether something runs before each call of this module; True where that is not known."""
    return bool(getattr(module, _FORWARD_HOOKS, True))


_TELLS_GLOBAL_HOOKS: Callable[[], bool] = getattr(nn.modules.module, "_has_any_global_hook", lambda: True)


def calls_only_forward(*modules: nn.Module) -> bool:
    """Whether a call of each module is its class's forward and nothing else; False where that is not known.

    Else there are hooks, of the module or of all modules, or it has a forward of its own.
    """
    before, after, before_backward, after_backward = _CALL_HOOKS
    for module in modules:
        own = vars(module)
        if "forward" in own or own.get(before, True) or own.get(after, True):
            return False
        if own.get(before_backward, True) or own.get(after_backward, True):
            return False
    return not _TELLS_GLOBAL_HOOKS()


EXTRA_STATE: str = getattr(nn.modules.module, "_EXTRA_STATE_KEY_SUFFIX", "_extra_state")  # the last part of its name


# The parts of sparse tensors.


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse COO tensor as they are stored; the public way copies one that is not coalesced."""
    if hasattr(tensor, "_indices") and hasattr(tensor, "_values"):
        return tensor._indices(), tensor._values()
    tensor = tensor.coalesce()
    return tensor.indices(), tensor.values()


# FSDP2 of torch 2.11 and older makes each shard a Parameter that requires a gradient, and asks then whether it does.
# For integers that is an error, which `fully_shard` raises without this. Its mixed precision casts integers, too: a
# product with such a weight raises an error.


class _ParameterOf:
    """torch.nn for FSDP2: a Parameter of integers requires no gradient."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)

    @staticmethod
    def Parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:  # noqa: N802
        is_trainable = data.is_floating_point() or data.is_complex()
        return nn.Parameter(data, requires_grad=requires_grad and is_trainable)


def _leaving_integers(init_dtype_attrs: Callable[..., None]) -> Callable[..., None]:
    @wraps(init_dtype_attrs)
    def init(param: Any, policy: Any) -> None:
        init_dtype_attrs(param, policy)
        if not param.sharded_param.is_floating_point():
            param.param_dtype = None  # the dtype of the policy

    return init


FSDP_SHARDS_INTEGERS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


def let_fsdp_shard_integers() -> None:
    """Make `fully_shard` take integers, and leave them integers.

    This is done in a process of a group, and in one that a launcher such as torchrun has started. Elsewhere nothing is
    done, because importing FSDP2 takes a second.
    """
    if "WORLD_SIZE" not in os.environ and not (distributed.is_available() and distributed.is_initialized()):
        return
    try:
        module = import_module("torch.distributed.fsdp._fully_shard._fsdp_param")
    except ImportError:
        return
    if getattr(module, "nn", None) is nn:
        module.nn = _ParameterOf()  # type: ignore[attr-defined]
        module.FSDPParam.init_dtype_attrs = _leaving_integers(module.FSDPParam.init_dtype_attrs)
