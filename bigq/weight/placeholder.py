"""Placeholder: an empty tensor under the name of a quantized weight, in the state of a transformers model.

A transformers without bigq takes no notice of a `quantization_config` that it does not know but a warning, and
initializes weights that it does not find at random. A weight of a wrong shape makes it raise.
"""

import torch
from torch import Tensor

__all__ = ["is_placeholder", "placeholder"]

_SHAPE, _DTYPE = (0,), torch.uint8


def placeholder() -> Tensor:
    """An empty tensor with memory of its own: accelerate drops all but one of those that share memory, or have none."""
    return torch.empty(1, dtype=_DTYPE)[:0]


def is_placeholder(value: object) -> bool:
    """Whether a tensor, or what describes one, stands for a quantized weight, in a state that holds some."""
    return getattr(value, "dtype", None) is _DTYPE and tuple(getattr(value, "shape", ())) == _SHAPE
