"""Hooks that bring a module's inputs and its offloaded tensors to the device it runs on; accelerate `ModelHook`s."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook
from accelerate.utils import find_device, recursively_apply, send_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bigq.model_tensors import assign_tensor
from bigq.offload import is_file_backed

__all__ = ["Float32Hook", "PlacementHook"]


class PlacementHook(ModelHook):  # type: ignore[misc]
    """Runs a module on `device`: moves its inputs there, and lends it its offloaded tensors for the length of the call.

    At rest the module keeps its own tensors, on the CPU or file-backed. What it is lent are frozen copies, given back
    when the call ends, also by an exception; a module that calls itself borrows once.

    Args:
        device: where the module runs.
        borrowed: (owner, name) of each parameter or buffer to lend.
        io_same_device: move the outputs back to the device of the first input tensor.
        skip_keys: keyword arguments that are left where they are, such as a KV cache.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        borrowed: Sequence[tuple[nn.Module, str]] = (),
        io_same_device: bool = False,
        skip_keys: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        self.device = device
        self.borrowed = list(borrowed)
        self.io_same_device = io_same_device
        self.skip_keys = skip_keys
        self._at_rest: list[tuple[nn.Module, str, Tensor]] = []
        self._depth = 0
        self._returned = False
        self._input_device: torch.device | None = None
        self._handle: RemovableHandle | None = None

    def init_hook(self, module: nn.Module) -> nn.Module:
        if self.borrowed:  # accelerate calls no post_forward after an exception; torch calls this hook always
            self._handle = module.register_forward_hook(self._after_call, always_call=True)
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        if self._handle is not None:
            self._handle.remove()
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.io_same_device:
            self._input_device = find_device([args, kwargs])
        self._returned = False
        self._depth += 1
        if self._depth == 1:
            self._borrow()
        return (
            send_to_device(args, self.device),
            send_to_device(kwargs, self.device, skip_keys=self.skip_keys),
        )

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._give_back()
        self._returned = True
        if self.io_same_device and self._input_device is not None:
            output = send_to_device(output, self._input_device, skip_keys=self.skip_keys)
        return output

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._returned:  # the call raised before post_forward
            self._give_back()
        self._returned = False

    def _borrow(self) -> None:
        copies: dict[int, Tensor] = {}
        for owner, name in self.borrowed:
            own: Tensor = getattr(owner, name)
            if id(own) not in copies:
                # A file-backed tensor is copied also when the CPU runs the module: one read instead of page faults.
                copy = own.detach().to(self.device, non_blocking=True, copy=is_file_backed(own))
                copies[id(own)] = nn.Parameter(copy, requires_grad=False) if isinstance(own, nn.Parameter) else copy
            self._at_rest.append((owner, name, own))
            assign_tensor(owner, name, copies[id(own)])

    def _give_back(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            while self._at_rest:
                assign_tensor(*self._at_rest.pop())


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
