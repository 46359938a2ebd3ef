"""Replay: the launches of one launcher call, repeated on other tensors of the same looks without the launcher's Python.

What a launcher does follows from its tensors' looks (shape, strides, dtype, device, alignment): it allocates, takes
views and launches. `record` watches one call do that and keeps what it launched, with a source for each pointer. A call
that does anything else, such as a copy or a matmul of torch's, has no replay.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

from bigq_kernels.launch import observed

__all__ = ["BoundReplay", "Replay", "record"]

_ALIGNMENT = 256  # bytes between workspaces: more than any vector load or TMA descriptor asks for
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_OUT, _WORKSPACE = -1, -2  # sources of a pointer, beside the index of an input


class _Watch(TorchDispatchMode):
    """Notes what a launcher allocates, and whether it runs anything but allocations and views."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []  # kept alive, so that no two share an address
        self.pure = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.allocated.append(out)
        elif not func.is_view:
            self.pure = False
        return out


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """One start of a compiled kernel; `pointers` are the (position, source, byte offset) of arguments to fill in."""

    run: Callable[..., None]
    grid: tuple[int, ...]
    function: int
    metadata: Any
    args: tuple[Any, ...]
    pointers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What `record` saw; input 0 is the tensor whose dtype and device the output shares."""

    device_index: int
    out_shape: tuple[int, ...]
    workspace_nbytes: int
    launches: tuple[_Launch, ...]
    constants: tuple[Tensor, ...] = field(repr=False)  # tables of the launcher's own, kept alive for their addresses

    def bind(self, pointers: Sequence[int | None]) -> "BoundReplay":
        """For inputs 1 and up at these addresses, each aligned as its like was when recorded; None for no tensor."""
        launches = []
        for launch in self.launches:
            args = list(launch.args)
            free = []
            for position, source, offset in launch.pointers:
                if source > 0:
                    args[position] = pointers[source - 1]
                else:
                    free.append((position, source, offset))
            launches.append((launch.run, launch.grid, launch.function, launch.metadata, args, free))
        return BoundReplay(self, launches)


class BoundReplay:
    """A Replay whose inputs but the first have their addresses."""

    __slots__ = ("_current_stream", "_device_index", "_launches", "_replay")

    def __init__(self, replay: Replay, launches: list[tuple[Any, ...]]) -> None:
        self._replay = replay  # and with it the constants
        self._launches = launches
        self._device_index = replay.device_index
        self._current_stream = driver.active.get_current_stream

    def __call__(self, x: Tensor) -> Tensor | None:
        """The launcher's output for an x of the recorded shape and dtype; None where this moment needs the launcher."""
        address = x.data_ptr()
        if (
            address % 16 != 0
            or not x.is_contiguous()
            or not self._device_index == x.get_device() == torch.cuda.current_device()
            or _hooked()
        ):
            return None
        replay = self._replay
        out = x.new_empty(*replay.out_shape)
        addresses = [address, 0, out.data_ptr()]  # by source: the last two are _WORKSPACE and _OUT
        if replay.workspace_nbytes:
            workspace = x.new_empty(replay.workspace_nbytes // x.itemsize)
            addresses[_WORKSPACE] = workspace.data_ptr()
        stream = self._current_stream(self._device_index)
        for run, grid, function, metadata, args, pointers in self._launches:
            args = args.copy()
            for position, source, offset in pointers:
                args[position] = addresses[source] + offset
            run(*grid, stream, function, metadata, None, None, None, *args)
        return out


def _hooked() -> bool:
    """Whether someone listens to Triton's launches, which a replay would not tell of."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # a chain of hooks, one hook or None


def record(
    launcher: Callable[..., Tensor], tensors: Sequence[Tensor | None], settings: Sequence[Any]
) -> tuple[Tensor, Replay | None]:
    """Run launcher(*tensors, *settings) once; its output, and its Replay if it did nothing that one cannot repeat."""
    seen: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
    with _Watch() as watch, observed(lambda *launch: seen.append(launch)), _counted_launches() as count:
        out = launcher(*tensors, *settings)
    if not watch.pure or count() != len(seen):  # a kernel started without `launch` was not seen
        return out, None
    return out, _replay(out, tensors, watch, seen)


@contextmanager
def _counted_launches() -> Iterator[Callable[[], int]]:
    """How many kernels of Triton's this thread has started in the context so far."""
    threads: list[int] = []
    hooks = knobs.runtime.launch_enter_hook

    def note(_: Any) -> None:
        threads.append(get_ident())

    if not hasattr(hooks, "add"):  # someone put a hook of their own in the chain's place
        yield lambda: -1
        return
    hooks.add(note)
    try:
        yield lambda: threads.count(get_ident())
    finally:
        hooks.remove(note)


def _replay(
    out: Tensor,
    tensors: Sequence[Tensor | None],
    watch: _Watch,
    seen: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]],
) -> Replay | None:
    first = tensors[0]
    assert first is not None
    if out.dtype != first.dtype or out.device != first.device or not out.is_contiguous():
        return None
    # Where each address comes from. Two inputs at one address cannot be told apart: no replay.
    sources: dict[int, tuple[int, int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor is not None and tensor.numel():
            if tensor.data_ptr() in sources:
                return None
            sources[tensor.data_ptr()] = index, 0
    borrowed = {t.untyped_storage().data_ptr() for t in tensors if t is not None}
    nbytes = 0
    for tensor in watch.allocated:
        if tensor.numel() == 0:
            continue
        if tensor.data_ptr() == out.data_ptr():
            sources[tensor.data_ptr()] = _OUT, 0
        else:
            sources[tensor.data_ptr()] = _WORKSPACE, nbytes
            nbytes += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
    launches, constants, written = [], [], False
    for compiled, grid, values in seen:
        if compiled is None:  # the interpreter
            return None
        args, pointers = list(values), []
        for position, value in enumerate(values):
            if not isinstance(value, Tensor):
                continue
            args[position] = value.data_ptr()
            source = sources.get(value.data_ptr())
            if source is not None:
                pointers.append((position, *source))
                written |= source == (_OUT, 0)
            elif value.numel():
                if value.untyped_storage().data_ptr() in borrowed or value.untyped_storage().data_ptr() in sources:
                    return None  # a view that starts inside of an input or a workspace
                constants.append(value)
        launches.append(
            _Launch(
                run=compiled.run,
                grid=grid,
                function=compiled.function,
                metadata=compiled.packed_metadata,
                args=tuple(args),
                pointers=tuple(pointers),
            )
        )
    if not written:
        return None
    return Replay(
        device_index=first.get_device(),
        out_shape=tuple(out.shape),
        workspace_nbytes=nbytes,
        launches=tuple(launches),
        constants=tuple(constants),
    )
