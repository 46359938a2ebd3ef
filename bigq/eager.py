"""The eager call of a linear: past the dispatcher where nothing there would act, repeating the launches of before.

In eager mode a linear of few tokens is bound by the host, and every Python instruction counts. On plain CUDA tensors
that need no gradient, with no mode, transform, trace or profiler active, an op is its launcher. A launcher's second
call on tensors of the same looks is recorded; from then on its launches are repeated without its Python. All else goes
through the dispatcher.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bigq import ops

if TYPE_CHECKING:
    from bigq_kernels.replay import Replay

__all__ = ["linear"]

State = tuple[Tensor | None, ...]

MAX_TOKENS = 2048  # above, kernels take longer than Python: 202 us for 4096 tokens at 4096 x 4096, H200
MAX_KEPT = 1 << 15  # bound calls: 300 linears at 100 numbers of tokens

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
_CALLS: dict[Any, "_Call"] = {}
_REPLAYS: dict[Any, "Replay | None"] = {}  # None: has no replay
_SEEN: set[Any] = set()  # looks that ran once: their kernels are compiled and their tables made


class _Call:
    """A replay bound to the tensors of one layer, or None where only the dispatcher will do."""

    __slots__ = ("addresses", "references", "replay")

    def __init__(self, key: Any, replay: "Replay | None", state: State) -> None:
        # The key holds an id, so it goes when one of the tensors does: another may get it.
        self.references = [ref(tensor, lambda _: _CALLS.pop(key, None)) for tensor in state if tensor is not None]
        self.addresses = [t.data_ptr() for t in state if t is not None]
        self.replay = None if replay is None else replay.bind([None if t is None else t.data_ptr() for t in state])


def linear(name: str, x: Tensor, state: State, settings: tuple[str | int | float, ...]) -> Tensor:
    """The op `name` of x [..., K], the tensors of a quantized weight with the bias among them, and its settings."""
    if type(x) is Tensor and x.is_cuda and not is_compiling() and _is_plain(x, state):
        key = (id(state[0]), x.shape, x.dtype, name, settings)
        call = _CALLS.get(key)
        # Assigning to `.data` moves a tensor, and another may stand beside the weight: the addresses tell.
        if call is None or call.addresses != [t.data_ptr() for t in state if t is not None]:
            return _first_calls(key, name, x, state, settings)
        if call.replay is not None:
            out = call.replay(x, state)
            if out is not None:
                return out
    return getattr(ops, name)(x, *state, *settings)  # type: ignore[no-any-return]


def _is_plain(x: Tensor, state: State) -> bool:
    """Whether no gradient is needed and nothing listens to, or changes, calls of ops."""
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in state)):
        return False
    if _TELL is None:
        return False
    functions, dispatches, transform, trace, profiler = _TELL
    return not (functions() or dispatches() or transform() is not None or trace() is not None or profiler())


def _first_calls(key: Any, name: str, x: Tensor, state: State, settings: tuple[str | int | float, ...]) -> Tensor:
    """Run the op and work towards a replay: run once, recorded once, then bound to the tensors of each layer."""
    tensors = (x, *state)
    op, launcher = getattr(ops, name), ops.cuda_launcher(name)
    few = 0 < x.numel() <= MAX_TOKENS * x.shape[-1]
    if launcher is None or not (few and x.is_contiguous() and x.data_ptr() % 16 == 0):
        return op(*tensors, *settings)  # type: ignore[no-any-return]
    looks = (name, settings, *(None if tensor is None else _looks(tensor) for tensor in tensors))
    if looks not in _SEEN:
        if len(_SEEN) >= MAX_KEPT:
            _SEEN.clear()
            _REPLAYS.clear()
        _SEEN.add(looks)
        return op(*tensors, *settings)  # type: ignore[no-any-return]
    if looks not in _REPLAYS:
        from bigq_kernels.replay import record

        out, _REPLAYS[looks] = record(launcher, tensors, settings)
        return out
    if len(_CALLS) >= MAX_KEPT:
        _CALLS.clear()
    _CALLS[key] = _Call(key, _REPLAYS[looks], state)
    return linear(name, x, state, settings)


def _looks(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16 == 0
