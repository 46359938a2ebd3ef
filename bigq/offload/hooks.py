"""Hooks that bring a module's inputs and its offloaded tensors to the device it runs on; accelerate `ModelHook`s."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bigq.offload.attach import SurroundingHook, allow_moves, outside_of_graphs
from bigq.offload.block import OffloadedBlock
from bigq.offload.containers import first_tensor, map_tensors
from bigq.offload.newcomers import latest_registration, settle
from bigq.offload.prefetch import Call, Prefetcher
from bigq.offload.state_guard import StateGuard

__all__ = ["Float32Hook", "PlacementHook"]


class PlacementHook(SurroundingHook):
    """Runs a module on `device`: moves its inputs there, and gives it copies of its offloaded tensors during the call.

    Between calls the module holds its own tensors, on the CPU or file-backed. The copies are frozen. They are taken
    back when the last call of the module ends, also by an exception.

    Args:
        device: where the module runs.
        block: its offloaded tensors, and `prefetcher`: what copies them.
        io_same_device: move the outputs back to the device of the first input tensor.
        skip_keys: keyword arguments that are left where they are, such as a KV cache.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        block: OffloadedBlock | None = None,
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
        self.state_guard: RemovableHandle | None = None
        self._module: nn.Module | None = None
        self._settled: int | None = None  # the registration up to which newcomers of the module are on its device

    def init_hook(self, module: nn.Module) -> nn.Module:
        self._module = module
        return super().init_hook(module)

    @property
    def execution_device(self) -> torch.device:
        """Where the module runs, by the name that accelerate's hooks have for it; pipelines of diffusers read it."""
        return self.device

    def guard_state(self, module: nn.Module, blocks: Sequence[OffloadedBlock]) -> None:
        """Put a StateGuard for `blocks` on `module`, as long as this hook is on it."""
        self.state_guard = module.register_state_dict_pre_hook(StateGuard(blocks))  # type: ignore[no-untyped-call]

    def detach_hook(self, module: nn.Module) -> nn.Module:
        allow_moves(module)  # `_module` stays: a model whose change failed gets its hooks back as they were
        if self.state_guard is not None:
            self.state_guard.remove()
        for experts in [] if self.block is None else self.block.experts:
            experts.drop_cache()  # nothing is read in host memory without the hook
        return super().detach_hook(module)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_settled": None}  # another process counts registrations anew

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs, input_device = self._bring(args, kwargs)
        if self.block is None:
            output = forward(*args, **kwargs)
        else:
            block_call = self._onload(args, kwargs)
            try:
                output = forward(*args, **kwargs)
            finally:
                self._release(block_call)
        return output if input_device is None else self._send_back(output, input_device)

    @outside_of_graphs
    def _bring(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], torch.device | None]:
        """The inputs on the device, and where the first of them came from if the outputs go back there."""
        if self._settled != (latest := latest_registration()) and self._module is not None:
            settle(self._module, () if self.block is None else self.block.members, self.device)
            self._settled = latest
        input_device = None
        if self.io_same_device and (first := first_tensor((args, kwargs))) is not None:
            input_device = first.device
        return self._moved(args, self.device), self._moved(kwargs, self.device), input_device

    @outside_of_graphs
    def _send_back(self, output: Any, device: torch.device) -> Any:
        return self._moved(output, device)

    def _moved(self, value: Any, device: torch.device) -> Any:
        """`value` with its tensors on `device`; containers of none that moves are the same objects."""
        keys = self.skip_keys
        return map_tensors(
            lambda tensor: tensor if tensor.device == device else tensor.to(device),
            value,
            skip_keys=(keys,) if isinstance(keys, str) else keys or (),
        )

    @outside_of_graphs
    def _onload(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        assert self.block is not None
        assert self.prefetcher is not None
        call = self.prefetcher.enter(self.block, in_place=self.block.may_read_in_place(args, kwargs))
        call.begin()
        return call

    @outside_of_graphs
    def _release(self, call: Call) -> None:
        call.prefetcher.leave(call)


class Float32Hook(SurroundingHook):
    """Lets a float32 module live among half-precision ones: casts its floating inputs to float32.

    With `restore` its float32 outputs are cast back to the dtype the inputs had; an output head keeps them.
    """

    def __init__(self, *, restore: bool) -> None:
        super().__init__()
        self.restore = restore

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dtype: torch.dtype | None = None  # of the first half-precision input

        def up(tensor: Tensor) -> Tensor:
            nonlocal dtype
            if tensor.dtype not in (torch.float16, torch.bfloat16):
                return tensor
            dtype = dtype or tensor.dtype
            return tensor.float()

        args, kwargs = map_tensors(up, args), map_tensors(up, kwargs)
        output = forward(*args, **kwargs)
        if not self.restore or dtype is None:
            return output
        return map_tensors(lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor, output)
