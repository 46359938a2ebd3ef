"""Host memory: a tensor's bytes, and where the next tensor may start."""

import ctypes

from torch import Tensor

__all__ = ["ALIGNMENT", "align", "memory_of"]

ALIGNMENT = 256  # bytes; what CUDA gives an allocation, so that a kernel finds each tensor as aligned as its own


def align(nbytes: int) -> int:
    """`nbytes`, rounded up to where the next tensor may start."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, which has to outlive the view."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
