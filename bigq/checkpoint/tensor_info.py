"""What a checkpoint says about one of its tensors, before the tensor is read."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

__all__ = ["TensorInfo"]


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """The name, shape and dtype of a stored tensor, the file that holds it, and where.

    `offset` is that of its bytes in the file, row-major and little-endian; None where they are not laid out like that.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    file: Path
    offset: int | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize
