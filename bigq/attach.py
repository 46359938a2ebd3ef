"""attach: put a hook on a module as accelerate does, so that the module still pickles and compiles."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

__all__ = ["attach", "outside_of_graphs"]


class HookedForward:
    """The forward of a module with a hook; accelerate makes one too, a closure that pickle cannot find."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        functools.update_wrapper(self, module._old_forward)  # type: ignore[arg-type]  # its signature is looked at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module
        args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
        output = module._old_forward(*args, **kwargs)
        return module._hf_hook.post_forward(module, output)


def attach(module: nn.Module, hook: ModelHook) -> None:
    """Add `hook` to `module`, after those it has; accelerate's functions know and remove it."""
    add_hook_to_module(module, hook, append=True)
    if "forward" in module.__dict__:  # accelerate gives a GraphModule's class the new forward
        module.forward = HookedForward(module)


def outside_of_graphs(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, never compiled: torch.compiler.disable, put off because importing what that needs takes a second."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # nothing is compiled yet
            return method(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(method))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return call
