"""attach: put a hook on a module as accelerate does, so that it pickles and compiles. Such a model is not moved."""

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from bigq.errors import PlacementError, UnsupportedError

__all__ = [
    "SurroundingHook",
    "allow_moves",
    "attach",
    "detach",
    "hooks_of",
    "outside_of_graphs",
    "refuse_moves",
]

_METHODS = ("to", "cuda", "cpu", "half", "float", "double", "bfloat16")


class SurroundingHook(ModelHook):  # type: ignore[misc]
    """A hook whose work surrounds the forward of its module, so that what belongs to a call is local to `call`.

    accelerate's own `pre_forward` and `post_forward` share nothing but the hook, whatever the thread and the depth of
    the recursion, and an exception skips `post_forward`. So the hook stands in front of `module._old_forward`, which is
    what accelerate calls, also for `module.forward(x)`.
    """

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`forward(*args, **kwargs)` with what the hook does before and after."""
        raise NotImplementedError

    def init_hook(self, module: nn.Module) -> nn.Module:
        module._old_forward = _Surrounded(self, module._old_forward)  # type: ignore[assignment, arg-type]
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        module._old_forward = _without(self, module._old_forward)  # type: ignore[assignment, arg-type]
        return module


class _Surrounded:
    """A forward in the middle of what a hook does; a class and no closure, so that the module pickles."""

    def __init__(self, hook: SurroundingHook, forward: Callable[..., Any]) -> None:
        self.hook, self.forward = hook, forward
        functools.update_wrapper(self, forward, updated=())  # its signature is looked at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hook.call(self.forward, args, kwargs)


def _without(hook: SurroundingHook, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` without `hook`, which may be under others."""
    if not isinstance(forward, _Surrounded):
        return forward
    if forward.hook is hook:
        return forward.forward
    return _Surrounded(forward.hook, _without(hook, forward.forward))


class HookedForward:
    """The forward of a module with a hook; accelerate makes one too, a closure that pickle cannot find."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        functools.update_wrapper(self, module._old_forward, updated=())  # type: ignore[arg-type]  # its signature is looked at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module
        hook = module._hf_hook
        if _only_surrounds(hook):  # accelerate's pre_forward takes no keyword argument called "module"
            return module._old_forward(*args, **kwargs)
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        output = module._old_forward(*args, **kwargs)
        return hook.post_forward(module, output)


def _only_surrounds(hook: ModelHook) -> bool:
    """Whether all that a hook does is in front of `_old_forward`."""
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return all(isinstance(one, SurroundingHook) for one in hooks)


def attach(module: nn.Module, hook: ModelHook) -> None:
    """Add `hook` to `module`, after those it has; accelerate's functions know and remove it."""
    module = _holder_of_attributes(module)
    add_hook_to_module(module, hook, append=True)
    if "forward" in module.__dict__:  # accelerate gives a GraphModule's class the new forward
        module.forward = HookedForward(module)


def _holder_of_attributes(module: nn.Module) -> nn.Module:
    """`module`, or the one inside of it that gets the attributes that are set on it, as in torch.compile's wrapper.

    A hook of the wrapper would stand in the place of that of the module inside, and call itself.
    """
    probe = "_bigq_probe"
    try:
        setattr(module, probe, True)
    except Exception as error:
        raise UnsupportedError(
            f"{type(module).__name__} takes no new attributes ({error}), and a hook of a device map is one: "
            "pass one device, or load the model before it is sealed"
        ) from error
    holder = next((inner for inner in (module, *module.children()) if probe in vars(inner)), module)
    vars(holder).pop(probe, None)
    return holder


def hooks_of(module: nn.Module) -> list[ModelHook]:
    """The hooks that `module` has, in their order."""
    hook: ModelHook | None = vars(module).get("_hf_hook")
    return list(hook.hooks) if isinstance(hook, SequentialHook) else [] if hook is None else [hook]


def detach(module: nn.Module, kinds: tuple[type[ModelHook], ...]) -> None:
    """Remove the hooks of `module` that are of these `kinds`; the others stay, in their order."""
    hooks = hooks_of(module)
    remove_hook_from_module(module)
    if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        del module.forward  # accelerate leaves the method there, which looks like a patch
    for hook in hooks:
        if not isinstance(hook, kinds):
            attach(module, hook)


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


class _Refusal:
    """Stands in for a method of a model; a class and no closure, so that the model pickles."""

    def __init__(self, method: str, model: str) -> None:
        self.method, self.model = method, model

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise PlacementError(
            f"{self.model}.{self.method}() would undo its device map: parts of it are offloaded, or on several GPUs. "
            "bigq.materialize(model) brings all of it to where it runs; then it can be moved"
        )


def refuse_moves(model: nn.Module) -> None:
    """Make `.to()`, `.cuda()`, `.half()` and their kin of `model` raise a PlacementError."""
    for method in _METHODS:
        model.__dict__[method] = _Refusal(method, type(model).__name__)


def allow_moves(module: nn.Module) -> None:
    """Undo `refuse_moves`; accelerate's removal of hooks does that for `.to()` and `.cuda()` only."""
    for method in _METHODS:
        if isinstance(module.__dict__.get(method), _Refusal):
            del module.__dict__[method]
