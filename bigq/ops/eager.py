"""The eager call of a linear: past the dispatcher where nothing there would act.

In eager mode a linear of few tokens is bound by the host, and every Python instruction counts. On plain CUDA tensors
that need no gradient, with no mode, transform, trace or profiler active, an op is its launcher, or a replay of it. All
else goes through the dispatcher.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bigq.ops import library
from bigq.ops.replays import Settings, State, run

__all__ = ["linear"]

# What acts between a call and its kernel, by the functions that tell. A torch without one of them takes the dispatcher.
_TELLTALES = (
    "_len_torch_function_stack",
    "_len_torch_dispatch_stack",
    "_functorch.maybe_current_level",
    "_get_tracing_state",
    "_autograd._profiler_enabled",
)


def _telltales() -> tuple[Callable[[], Any], ...] | None:
    try:
        return tuple(attrgetter(name)(torch._C) for name in _TELLTALES)
    except AttributeError:
        return None


_TELL = _telltales()


def linear(name: str, x: Tensor, state: State, settings: Settings) -> Tensor:
    """The op `name` of x [..., K], the tensors of a quantized weight with the bias among them, and its settings."""
    if type(x) is Tensor and x.is_cuda and not is_compiling() and _is_plain(x, state):
        return run(library.cuda_implementation, name, x, state, settings)
    return getattr(library, name)(x, *state, *settings)  # type: ignore[no-any-return]


def _is_plain(x: Tensor, state: State) -> bool:
    """Whether no gradient is needed and nothing listens to, or changes, calls of ops."""
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in state)):
        return False
    if _TELL is None:
        return False
    functions, dispatches, transform, trace, profiler = _TELL
    return not (functions() or dispatches() or transform() is not None or trace() is not None or profiler())
