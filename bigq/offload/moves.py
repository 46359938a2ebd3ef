"""refuse_moves: a model with hooks is neither moved nor cast as a whole; its tensors are where its device map says."""

from typing import Any, NoReturn

from torch import nn

from bigq.errors import PlacementError

__all__ = ["allow_moves", "refuse_moves"]

_METHODS = ("to", "cuda", "cpu", "half", "float", "double", "bfloat16")


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
