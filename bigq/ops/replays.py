"""replays: run a linear on CUDA tensors, by repeating the launches of an earlier call on tensors of the same signature.

A linear of few tokens takes the GPU less time than it takes Python to start it. A launcher's second call on tensors of
the same signature (shape, strides, dtype, device, alignment) is recorded. From then on its launches are repeated
without its Python.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor

if TYPE_CHECKING:
    from bigq_kernels.replay import BoundReplay, Replay

__all__ = ["Settings", "State", "run"]

State = tuple[Tensor | None, ...]
Settings = tuple[str | int | float | None, ...]
Launcher = Callable[..., Tensor]

MAX_TOKENS = 2048  # above, kernels take longer than Python: 202 us for 4096 tokens at 4096 x 4096, H200
# A row of a stack is not a token: of a mixture of experts, a token has 1 to 16. A product of 4096 rows takes 129 us of
# host time by its launcher and 30 replayed (H200).
MAX_ROWS_OF_A_TOKEN = 16
MAX_KEPT = 1 << 15  # bound calls: 300 linears at 100 numbers of tokens

_CALLS: dict[Any, "_Call"] = {}  # by the identity of the codes
_BOUND: dict[Any, "BoundReplay | None"] = {}  # by signatures and addresses
_REPLAYS: dict[Any, "Replay | None"] = {}  # None: has no replay
_SEEN: set[Any] = set()  # signatures that ran once: their kernels are compiled and their tables made


class _Call:
    """A replay bound to the tensors of one layer, or None where only the launcher will do."""

    __slots__ = ("addresses", "bias_dtype", "dtype", "references", "replay", "settings")

    def __init__(self, key: Any, replay: "BoundReplay | None", state: State, settings: Settings) -> None:
        # The key holds an id, so it goes when one of the tensors does: another may get it.
        self.references = [ref(tensor, lambda _: _CALLS.pop(key, None)) for tensor in state if tensor is not None]
        self.addresses = [tensor.data_ptr() for tensor in state if tensor is not None]
        self.dtype, self.bias_dtype = (None if tensor is None else tensor.dtype for tensor in (state[0], state[2]))
        self.settings = settings
        self.replay = replay


def run(
    find: Callable[[str], Launcher],
    name: str,
    x: Tensor,
    state: State,
    settings: Settings,
    route: tuple[Tensor, ...] = (),
) -> Tensor:
    """find(name)(x, *route, *state, *settings), or a replay of it.

    Args:
        find: gives the launcher of an op; it is not asked where there is a replay.
        name: of a linear.
        x: activations [..., K] on a GPU.
        state: the tensors of a quantized weight: codes, scales, the bias or None, and what else its op takes.
        settings: the launcher's other arguments.
        route: of a stack of weights, the tensor that says which one multiplies which row. It is another in each call.
    """
    key: tuple[Any, ...] = (id(state[0]), name, x.shape, x.dtype)
    if route:
        key += (route[0].shape, route[0].dtype)
    call = _CALLS.get(key)
    if call is None or (call.settings is not settings and call.settings != settings):
        return _first_calls(key, find, name, x, state, settings, route)
    codes, bias = state[0], state[2]
    # Assigning to `.data` moves a tensor, and another may stand beside the codes: the addresses tell. A model that was
    # moved away, cast and moved back may have its old addresses: the dtypes of codes and bias tell.
    if (
        [tensor.data_ptr() for tensor in state if tensor is not None] != call.addresses
        or codes.dtype is not call.dtype  # type: ignore[union-attr]
        or (bias is not None and bias.dtype is not call.bias_dtype)
    ):
        return _first_calls(key, find, name, x, state, settings, route)
    if call.replay is not None:
        out = call.replay(x, state, route)
        if out is not None:
            return out
    return find(name)(x, *route, *state, *settings)


def _first_calls(
    key: Any,
    find: Callable[[str], Launcher],
    name: str,
    x: Tensor,
    state: State,
    settings: Settings,
    route: tuple[Tensor, ...],
) -> Tensor:
    """Run the launcher and work towards a replay: run once, recorded once, then bound to the tensors of each layer."""
    launcher, tensors = find(name), (x, *route, *state)
    most = MAX_TOKENS * MAX_ROWS_OF_A_TOKEN if route else MAX_TOKENS
    few = 0 < x.numel() <= most * x.shape[-1]
    if not (few and x.is_contiguous() and x.data_ptr() % 16 == 0):
        return launcher(*tensors, *settings)
    signature = (name, settings, *(None if tensor is None else _signature(tensor) for tensor in tensors))
    if signature not in _SEEN:
        if len(_SEEN) >= MAX_KEPT:
            _SEEN.clear()
            _REPLAYS.clear()
        _SEEN.add(signature)
        return launcher(*tensors, *settings)
    if signature not in _REPLAYS:
        from bigq_kernels.replay import can_replay, record

        if not can_replay():
            return launcher(*tensors, *settings)
        out, _REPLAYS[signature] = record(launcher, tensors, settings, live=1 + len(route))
        return out
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in state]
    where, replay = (signature, *addresses), _REPLAYS[signature]
    # FSDP2 gathers a weight into other memory in each call, and what it used before comes back.
    is_new = where not in _BOUND
    if is_new:
        if len(_BOUND) >= MAX_KEPT:
            _BOUND.clear()
        _BOUND[where] = None if replay is None else replay.bind(addresses)
    bound = _BOUND[where]
    if is_new or key not in _CALLS:
        if len(_CALLS) >= MAX_KEPT:
            _CALLS.clear()
        _CALLS[key] = _Call(key, bound, state, settings)
    replayed = None if bound is None else bound(x, state, route)
    return launcher(*tensors, *settings) if replayed is None else replayed


def _signature(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16 == 0
