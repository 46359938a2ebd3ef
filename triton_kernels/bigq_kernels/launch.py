"""launch: start a kernel without Triton's own binding of arguments after the first time.

Triton inspects, specializes and hashes every argument on each call, which for the 30 arguments of a linear takes longer
than the kernel. Here a call with the signature of an earlier one goes straight to the compiled kernel: 71 to 102 us of
host time a linear instead of about 160, on the host of an H200. `replay` saves the rest of a launcher's Python too: 15
to 24 us.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton import JITFunction

from bigq_kernels.internals import know_sources, starter

__all__ = ["dense_linear", "in_product", "launch", "observed"]

_COMPILED: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}
_THREAD = local()

Observer = Callable[[Any, tuple[int, ...], tuple[Any, ...]], None]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    first: Tensor,
    *others: Tensor | float | None,
    options: dict[str, Any],
    **constants: Any,
) -> None:
    """Run kernel[grid](first, *others, **constants, **options) on the current stream of the device of `first`.

    Triton takes the current device, and a kernel that reads the memory of another one there waits for nothing.

    Args:
        first, others: the kernel's run-time arguments, in its order, ahead of all constexpr ones.
        options: num_warps, num_stages and the like.
        constants: its constexpr arguments.
    """
    device = first.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device_of(first):
            launch(kernel, grid, first, *others, options=options, **constants)
        return
    args = (first, *others)
    # All that Triton specializes on: dtype and alignment of pointers; of integers whether they are 1, divide by 16, or
    # need 64 bits.
    signature = tuple(
        (arg.dtype, arg.data_ptr() % 16 == 0)
        if isinstance(arg, Tensor)
        else (arg % 16 == 0, arg == 1, arg < 2**31)
        if isinstance(arg, int)
        else type(arg)
        for arg in args
    )
    key = (id(kernel), device, signature, *constants.values(), *options.values())
    whole_grid = (*grid, 1, 1)[:3]
    if key in _COMPILED:
        compiled, start, values = _COMPILED[key]
        start(whole_grid)(*args, *values)
    else:
        options = {"enable_fp_fusion": True, **options}  # Triton 3.10 has another default, and 3.9 warns of it
        if isinstance(kernel, JITFunction):
            know_sources()
        compiled = kernel[grid](*args, **constants, **options)
        values = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        start = None if compiled is None else starter(compiled, whole_grid)  # the interpreter compiles nothing
        if start is not None:
            _COMPILED[key] = compiled, start, values
    observer: Observer | None = getattr(_THREAD, "observer", None)
    if observer is not None:
        observer(compiled, whole_grid, (*args, *values))


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear as the last step of a launcher: an observer is told of it too, as (F.linear, (), inputs and output)."""
    observer: Observer | None = getattr(_THREAD, "observer", None)
    if observer is None:
        return F.linear(x, weight, bias)
    _THREAD.in_product = True
    try:
        out = F.linear(x, weight, bias)
    finally:
        _THREAD.in_product = False
    observer(F.linear, (), (x, weight, bias, out))
    return out


def in_product() -> bool:
    """Whether this thread is in a `dense_linear` that is observed: one step, not the aten ops it is made of."""
    return getattr(_THREAD, "in_product", False)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every launch of this thread: (compiled kernel or None, grid, all arguments)."""
    _THREAD.observer = observer
    try:
        yield
    finally:
        _THREAD.observer = None
