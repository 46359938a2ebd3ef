"""Packed4: the tensors and settings of a 4-bit weight, as a launcher passes them to the kernel that it chose."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Nested", "Packed4"]

Nested = tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]


class Packed4(NamedTuple):
    """Tensors are contiguous, scales float32, and the codes aligned to 16 bytes."""

    weight: Tensor  # [N, ceil(K / 2)] uint8: element 2i in the high nibble
    absmax: Tensor  # [N, B] float32, or uint8 codes if nested
    nested: Nested  # (nested_absmax [ceil(N * B / 256)], nested_offset [1], code table [256]), or no tensors
    quant_type: str  # "nf4" or "fp4"
    block_size: int  # elements of a row that share a scale
