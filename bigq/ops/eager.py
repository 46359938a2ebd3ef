"""The eager call of a linear: past the dispatcher where nothing there would act.

In eager mode a linear of few tokens is bound by the host, and every Python instruction counts. On plain CUDA tensors
that need no gradient, with no mode, transform, trace or profiler active, an op is its launcher, or a replay of it. All
else goes through the dispatcher.
"""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bigq.ops import library
from bigq.ops.replays import Settings, State, run
from bigq.system.internals import something_listens

__all__ = ["linear"]


def linear(name: str, x: Tensor, state: State, settings: Settings) -> Tensor:
    """The op `name` of x [..., K], the tensors of a quantized weight with the bias among them, and its settings."""
    if type(x) is Tensor and x.is_cuda and not is_compiling() and _is_plain(x, state):
        return run(library.cuda_implementation, name, x, state, settings)
    return getattr(library, name)(x, *state, *settings)  # type: ignore[no-any-return]


def _is_plain(x: Tensor, state: State) -> bool:
    """Whether no gradient is needed and nothing listens to, or changes, calls of ops."""
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in state)):
        return False
    return not something_listens()
