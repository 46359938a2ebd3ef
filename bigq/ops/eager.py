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
    is_plain = type(x) is Tensor and x.is_cuda and not is_compiling() and not something_listens()
    if is_plain and not (torch.is_grad_enabled() and _needs_gradient(x, state)):
        return run(library.cuda_implementation, name, x, state, settings)
    return getattr(library, name)(x, *state, *settings)  # type: ignore[no-any-return]


def _needs_gradient(x: Tensor, state: State) -> bool:
    return x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in state)
