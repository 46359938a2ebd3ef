"""keep: a node of autograd keeps Parameters itself, where autograd would save them as they are.

Under gradient checkpointing each tensor that a node saves goes through Python hooks three times, which takes about 25
us of host time in a step (2-core CPU). Parameters are not computed again, so nothing is gained by it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bigq.system.internals import TELLS_HOOKS, saved_tensor_hooks, version_of

__all__ = ["Kept", "keep"]


class Kept:
    """Parameters, and their versions at that time, which autograd checks of what it saves."""

    __slots__ = ("_parameters", "_versions")

    def __init__(self, parameters: Sequence[Tensor | None]) -> None:
        self._parameters = parameters
        self._versions = [0 if tensor is None else version_of(tensor) for tensor in parameters]

    def parameters(self) -> Sequence[Any]:
        """The Parameters.

        Raises:
            RuntimeError: one was written to since.
        """
        for tensor, version in zip(self._parameters, self._versions, strict=True):
            if tensor is not None and version_of(tensor) != version:
                raise RuntimeError(
                    f"a Parameter {list(tensor.shape)} that the backward pass of a quantized linear needs was modified "
                    f"by an inplace operation: it is at version {version_of(tensor)}, expected version {version}; call "
                    "backward() before anything writes to it"
                )
        return self._parameters


def keep(parameters: Sequence[Tensor | None]) -> Kept | None:
    """Keep Parameters for a backward pass; None if autograd has to save them, as its hooks may save others instead.

    Those of offloaded blocks do. Those of gradient checkpointing save nothing.
    """
    if not TELLS_HOOKS:
        return None
    hooks = saved_tensor_hooks()
    is_kept = hooks is None or getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"  # Tensor.cpu has none
    return Kept(parameters) if is_kept else None
