"""newcomers: tensors that are added to an offloaded model, such as adapters, go to the device that runs their module.

PEFT makes an adapter where the weight is stored, which is the CPU for an offloaded block. A hook knows its device, and
moves what is new at its next call. torch reports modules and Parameters as they are registered anywhere in the process,
so a call looks for new tensors only if something was registered since the last one. A slice of a list of layers, as
transformers takes one in each forward pass, registers all of them again, and is nothing new.
"""

from collections.abc import Iterable, Iterator
from itertools import count
from weakref import WeakSet

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

__all__ = ["latest_registration", "settle"]


class _Registrations:
    """Counts what is registered from the first question on."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self.known: WeakSet[nn.Module] = WeakSet()  # modules that were looked through: what they get later is noted
        self.latest = 0
        self.counting = False

    def start(self) -> None:
        self.counting = True
        register_module_module_registration_hook(self._note)
        register_module_parameter_registration_hook(self._note)

    def _note(self, module: nn.Module, name: str, registered: object) -> None:
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and registered in self.known:
            return
        if not is_compiling():  # torch.compile would compile anew for every number
            self.latest = next(self._numbers)


_registrations = _Registrations()


def latest_registration() -> int:
    """A number that changes whenever a module or a Parameter is registered."""
    if not _registrations.counting:
        _registrations.start()
    return _registrations.latest


def settle(module: nn.Module, offloaded: Iterable[tuple[nn.Module, str]], device: torch.device) -> None:
    """Move the tensors of `module` that are on the CPU to `device`, except those that are stored there on purpose.

    Parameters stay the same objects, so an optimizer that holds them sees the move.

    Args:
        module: parts of it that have a hook of their own are left alone, and so are ScriptModules.
        offloaded: (owner, name) of the tensors that stay on the CPU.
        device: a GPU; nothing moves if it is the CPU.
    """
    if device.type == "cpu":
        return
    stay = {(id(owner), name) for owner, name in offloaded}
    for owner in _own_parts(module):
        _registrations.known.add(owner)
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.device.type == "cpu" and (id(owner), name) not in stay:
                    _move(tensor, device)


@torch.no_grad()
def _move(tensor: Tensor, device: torch.device) -> None:
    tensor.data = tensor.to(device)
    if tensor.grad is not None:
        tensor.grad = tensor.grad.to(device)


def _own_parts(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and what is in it, but for the parts that have a hook of their own."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    yield module
    for child in module.children():
        if not isinstance(vars(child).get("_hf_hook"), ModelHook):
            yield from _own_parts(child)
