"""What a checkpoint says about one of its tensors, before the tensor is read."""

from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["TensorInfo"]


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """The name, shape and dtype of a stored tensor, and the file that holds it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize
