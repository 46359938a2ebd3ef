"""Replay: repeat the launches of one launcher call on other tensors of the same signature, without its Python.

What a launcher does follows from the signatures of its tensors (shape, strides, dtype, device, alignment): it
allocates, takes views and launches, and may end with a `dense_linear`. `record` watches one call do that and keeps what
it launched, with a source for each pointer. A call that does anything else, such as a copy, has no replay.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from bigq_kernels import internals
from bigq_kernels.launch import in_product, launch, observed

__all__ = ["BoundReplay", "Replay", "can_replay", "record"]

_ALIGNMENT = 256  # bytes between workspaces: more than any vector load or TMA descriptor asks for
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


class _Source(NamedTuple):
    """An argument that is known at the call: "input" number `place`, "out", "workspace" at byte `place`, "stream"."""

    kind: str
    place: int = 0


class _Watch(internals.DispatchMode):  # type: ignore[misc]
    """Notes what a launcher allocates, and whether it runs anything but allocations and views."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []  # kept alive, so that no two share an address
        self.pure = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if in_product():
            return out
        if func in _ALLOCATIONS:
            self.allocated.append(out)
        elif not func.is_view:
            self.pure = False
        return out


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What `record` saw; input 0 is the tensor whose dtype and device the output shares.

    Inputs 0 to `live` - 1 are others in each call, and the ones behind them are bound.
    With a `dense_linear` at the end, "out" is its weight, transposed if it `transposes`, and `bias` is the number of
    the input that it adds.
    """

    device_index: int
    out_shape: tuple[int, ...]
    workspace_numel: int  # in elements of input 0's dtype
    launches: tuple[internals.Launch, ...]
    constants: tuple[Tensor, ...]  # tables of the launcher's own, kept alive for their addresses
    live: int = 1
    multiplies: bool = False
    transposes: bool = False
    bias: int | None = None

    def bind(self, pointers: Sequence[int | None]) -> "BoundReplay":
        """For inputs `live` and up at these addresses, each aligned as when recorded; None for no tensor."""
        return BoundReplay(self, pointers)


class BoundReplay:
    """A Replay whose inputs but the live ones have their addresses.

    A call puts all that its launches need into one list, from which each picks its 30 arguments in C.
    """

    __slots__ = ("_current_stream", "_device_index", "_fixed", "_launches", "_offsets", "_replay")

    def __init__(self, replay: Replay, pointers: Sequence[int | None]) -> None:
        self._replay = replay
        self._device_index = replay.device_index
        self._current_stream = internals.current_stream_getter()
        arguments = [argument for _, args, last in replay.launches for argument in args + last]
        self._offsets = sorted({a.place for a in arguments if isinstance(a, _Source) and a.kind == "workspace"})
        self._fixed: list[Any] = []
        known = {_Source("input"): 0, _Source("out"): 1, _Source("stream"): 2}
        known |= {_Source("workspace", offset): 3 + i for i, offset in enumerate(self._offsets)}
        known |= {_Source("input", place): len(known) + place - 1 for place in range(1, replay.live)}

        def index(argument: Any) -> int:
            if isinstance(argument, _Source):
                if argument in known:
                    return known[argument]
                argument = pointers[argument.place - replay.live]
            self._fixed.append(argument)
            return len(known) + len(self._fixed) - 1

        self._launches: list[tuple[Any, Any, Any]] = [
            (start, itemgetter(*map(index, args)), itemgetter(*map(index, last)) if last else None)
            for start, args, last in replay.launches
        ]

    def __call__(self, x: Tensor, inputs: Sequence[Tensor | None], live: Sequence[Tensor] = ()) -> Tensor | None:
        """The launcher's output for an x of the recorded shape and dtype; None where this moment needs the launcher.

        `inputs` are the tensors whose addresses were bound, and `live` are the other live inputs, of the shapes and
        dtypes that were recorded.
        """
        address = x.data_ptr()
        if (
            address % 16 != 0
            or not x.is_contiguous()
            or not self._device_index == x.get_device() == torch.cuda.current_device()
            or internals.has_launch_hooks()
        ):
            return None
        out = x.new_empty(*self._replay.out_shape)
        values = [address, out.data_ptr(), self._current_stream(self._device_index)]
        if self._offsets:
            workspace = x.new_empty(self._replay.workspace_numel)
            base = workspace.data_ptr()
            values += [base + offset for offset in self._offsets]
        for tensor in live:
            if tensor.data_ptr() % 16 != 0 or not tensor.is_contiguous():
                return None
            values.append(tensor.data_ptr())
        values += self._fixed
        for start, pick, pick_last in self._launches:
            if pick_last is None:
                start(*pick(values))
            else:
                start(*pick(values), pick_last(values))
        if self._replay.multiplies:
            bias = self._replay.bias
            weight = out.mT if self._replay.transposes else out
            return F.linear(x, weight, None if bias is None else inputs[bias - 1])
        return out


_works: bool | None = None  # whether a replay had the bits of its launcher; None: not tried yet


def can_replay() -> bool:
    """Whether replays have the bits of their launchers here, which is tried once, on a tiny kernel.

    While a graph is captured, code is traced, kernels are interpreted or someone listens to launches, it is not tried,
    and the answer is no. Warns, once, where replays do not work.
    """
    global _works
    if _works is None:
        why = None
        if not internals.is_tested():
            tested = ", ".join(f"{major}.{minor}" for major, minor in internals.TESTED_TRITON)
            why = f"Triton {triton.__version__} is not one of {tested}"
        elif not internals.IS_COMPLETE:
            why = "parts of Triton or torch that they use are not there"
        else:
            try:
                if is_compiling() or torch.cuda.is_current_stream_capturing():
                    return False
                if internals.has_launch_hooks() or triton.knobs.runtime.interpret:
                    return False
                if not _has_the_bits_of_its_launcher("cuda"):
                    why = "one gave other numbers than its launcher"
            except Exception as error:
                why = f"one raised {type(error).__name__}: {error}"
        _works = why is None
        if why is not None:
            warnings.warn(
                f"launches are not replayed with this Triton, so linears of few tokens take up to 160 us of host time "
                f"each, not 24 or less: {why}. Install a release of Triton that bigq is tested with.",
                stacklevel=2,
            )
    return _works


@triton.jit
def _multiply_kernel(x_ptr, factor_ptr, out_ptr, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n, other=0.0)
    tl.store(out_ptr + index, x * tl.load(factor_ptr), mask=index < n)


def _multiply_twice(x: Tensor, factor: Tensor) -> Tensor:
    """A launcher with a workspace. The numbers are small and whole, so every way gives the same bits."""
    once, twice = x.new_empty(x.shape), x.new_empty(x.shape)
    for source, out in ((x, once), (once, twice)):
        launch(_multiply_kernel, (1,), source, factor, out, x.numel(), BLOCK=128, options={"num_warps": 1})
    return twice


def _has_the_bits_of_its_launcher(device: str) -> bool:
    """Whether a replay repeats a launcher of ours on other inputs, and both give what torch does."""
    inputs = [
        (torch.arange(start, start + 100, device=device).float(), torch.tensor([factor], device=device).float())
        for start, factor in ((1, 3), (5, 7))
    ]
    (x, factor), (other, other_factor) = inputs
    out, kept = record(_multiply_twice, (x, factor), ())
    if kept is None:
        return False
    replayed = kept.bind([other_factor.data_ptr()])(other, (other_factor,))
    expected = [x * factor * factor for x, factor in inputs]
    outs = [out, replayed, *(_multiply_twice(*pair) for pair in inputs)]
    return all(out is not None and torch.equal(out, right) for out, right in zip(outs, expected * 2, strict=True))


def record(
    launcher: Callable[..., Tensor], tensors: Sequence[Tensor | None], settings: Sequence[Any], live: int = 1
) -> tuple[Tensor, Replay | None]:
    """Run launcher(*tensors, *settings) once; its output, and its Replay if it did nothing that one cannot repeat.

    The first `live` tensors are others in each call.
    """
    seen: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
    with _Watch() as watch, observed(lambda *launch: seen.append(launch)), internals.counted_launches() as count:
        out = launcher(*tensors, *settings)
    product = seen.pop()[2] if seen and seen[-1][0] is F.linear else None
    if not watch.pure or count() != len(seen):  # a kernel started without `launch` was not seen
        return out, None
    if product is None:
        return out, _replay(out, tensors, watch, seen, live)
    x, dense, bias, result = product
    place = next((place for place, tensor in enumerate(tensors) if tensor is bias and bias is not None), None)
    if result is not out or x is not tensors[0] or (place is None) != (bias is None):
        return out, None
    transposes = not dense.is_contiguous()  # and its transposed view is, or there is no replay
    replay = _replay(dense.mT if transposes else dense, tensors, watch, seen, live)
    return out, replay and replace(replay, multiplies=True, transposes=transposes, bias=place)


def _replay(
    out: Tensor,
    tensors: Sequence[Tensor | None],
    watch: _Watch,
    seen: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]],
    live: int,
) -> Replay | None:
    first = tensors[0]
    assert first is not None
    if out.dtype != first.dtype or out.device != first.device or not out.is_contiguous():
        return None
    sources: dict[int, _Source] = {}
    for place, tensor in enumerate(tensors):
        if tensor is not None and tensor.numel():
            if tensor.data_ptr() in sources:  # two inputs at one address cannot be told apart
                return None
            sources[tensor.data_ptr()] = _Source("input", place)
    nbytes = 0
    for tensor in watch.allocated:
        if tensor.numel() and tensor.data_ptr() != out.data_ptr():
            sources[tensor.data_ptr()] = _Source("workspace", nbytes)
            nbytes += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        elif tensor.numel():
            sources[tensor.data_ptr()] = _Source("out")
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*watch.allocated, *tensors) if tensor is not None}
    launches, constants, written = [], [], False
    for compiled, grid, values in seen:
        if compiled is None:  # the interpreter
            return None
        args: list[Any] = list(values)
        for position, value in enumerate(values):
            if isinstance(value, Tensor):
                args[position] = sources.get(value.data_ptr(), value.data_ptr())
                if value.data_ptr() not in sources and value.numel():
                    if value.untyped_storage().data_ptr() in storages:  # starts inside of an input or a workspace
                        return None
                    constants.append(value)
        launches.append(internals.launch_of(compiled, grid, _Source("stream"), tuple(args)))
        written |= _Source("out") in args
    if not written:
        return None
    return Replay(
        device_index=first.get_device(),
        out_shape=tuple(out.shape),
        workspace_numel=nbytes // first.itemsize,
        launches=tuple(launches),
        constants=tuple(constants),
        live=live,
    )
