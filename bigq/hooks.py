"""Hooks that bring a module's inputs and its offloaded tensors to the device it runs on; accelerate `ModelHook`s."""

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import ModelHook
from accelerate.utils import find_device, recursively_apply, send_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bigq.attach import outside_of_graphs
from bigq.moves import allow_moves
from bigq.prefetch import Block, Prefetcher

__all__ = ["Float32Hook", "PlacementHook"]


@dataclass(kw_only=True)
class _Call:
    """A call that has begun and not ended."""

    input_device: torch.device | None = None
    entered: bool = False
    saving: AbstractContextManager[object] | None = None  # in force while the block computes


class PlacementHook(ModelHook):  # type: ignore[misc]
    """Runs a module on `device`: moves its inputs there, and lends it its offloaded tensors for the length of the call.

    At rest the module keeps its own tensors, on the CPU or file-backed. What it is lent are frozen copies, given back
    when the last call of it ends, also by an exception.

    Args:
        device: where the module runs.
        block: what to lend it, and `prefetcher`: who lends it.
        io_same_device: move the outputs back to the device of the first input tensor.
        skip_keys: keyword arguments that are left where they are, such as a KV cache.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        block: Block | None = None,
        prefetcher: Prefetcher | None = None,
        io_same_device: bool = False,
        skip_keys: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        self.device = device
        self.block = block
        self.prefetcher = prefetcher
        self.io_same_device = io_same_device
        self.skip_keys = skip_keys
        self._calls = threading.local()
        self._handle: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_calls"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _calls=threading.local())

    def init_hook(self, module: nn.Module) -> nn.Module:
        # accelerate calls no post_forward after an exception; torch calls this hook always
        self._handle = module.register_forward_hook(self._after_call, always_call=True)
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        if self._handle is not None:
            self._handle.remove()
        allow_moves(module)
        return module

    @outside_of_graphs
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._calls.returned = False
        call = _Call(input_device=find_device([args, kwargs]) if self.io_same_device else None)
        self._stack.append(call)
        args = send_to_device(args, self.device)
        kwargs = send_to_device(kwargs, self.device, skip_keys=self.skip_keys)
        if self.block is not None and self.prefetcher is not None:
            call.saving = self.prefetcher.enter(self.block)
            call.entered = True
            if call.saving is not None:
                call.saving.__enter__()
        return args, kwargs

    @outside_of_graphs
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        call = self._stack.pop()
        self._calls.returned = True
        self._end(call)
        if call.input_device is not None:
            output = send_to_device(output, call.input_device, skip_keys=self.skip_keys)
        return output

    @outside_of_graphs
    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._calls.returned:  # the call raised before post_forward
            self._end(self._stack.pop())
        self._calls.returned = False

    @property
    def _stack(self) -> list[_Call]:
        """The calls of this thread: a module may call itself."""
        if not hasattr(self._calls, "stack"):
            self._calls.stack = []
        stack: list[_Call] = self._calls.stack
        return stack

    def _end(self, call: _Call) -> None:
        if call.saving is not None:
            call.saving.__exit__(None, None, None)
        if call.entered:
            assert self.block is not None
            assert self.prefetcher is not None
            self.prefetcher.leave(self.block)


class Float32Hook(ModelHook):  # type: ignore[misc]
    """Lets a float32 module live among half-precision ones: casts its floating inputs to float32.

    With `restore` its float32 outputs are cast back to the dtype the inputs had; an output head keeps them.
    """

    def __init__(self, *, restore: bool) -> None:
        super().__init__()
        self.restore = restore
        self._dtype: torch.dtype | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._dtype = None

        def up(tensor: Tensor) -> Tensor:
            if self._dtype is None:
                self._dtype = tensor.dtype
            return tensor.float()

        cast: tuple[tuple[Any, ...], dict[str, Any]] = recursively_apply(up, (args, kwargs), test_type=_is_half)
        return cast

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not self.restore or self._dtype is None:
            return output
        return recursively_apply(lambda tensor: tensor.to(self._dtype), output, test_type=_is_float32)


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _is_float32(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32
