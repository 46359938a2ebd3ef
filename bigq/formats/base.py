"""What a weight format answers: what it stores, how it is made, undone and multiplied by."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Format", "State", "TensorSpec", "like_weight", "matrix_shape"]

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape and dtype of a tensor that may not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight of `shape` [..., K] seen as (rows, K); a scalar is one row of one."""
    return prod(shape[:-1]), shape[-1] if shape else 1


def like_weight(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor [R, C] with a row for each of a weight of `shape` [..., K], as [..., C]."""
    return rows if len(shape) == 2 else rows.view(*shape[:-1], rows.shape[1])


class Format(Protocol):
    """A weight format; a frozen dataclass whose fields are its settings.

    Sizing, loading, placing and saving all follow from `state_spec`: nothing above this package tells formats apart.
    A weight of shape [..., K] is stored row by row, its leading dimensions kept.
    """

    @property
    def name(self) -> str:
        """The word for it in a config: "nf4", "fp4" or "int8"."""

    @property
    def custom_map_offload(self) -> str:
        """What a device map of the user's own keeps on "cpu" and "disk" by default: "preserve" or "quantized"."""

    def state_spec(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The named tensors that hold a weight of `shape`; "weight" is the packed codes."""

    def quantize_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Tensors with one row for each of `rows` [R, K], on its device; what a row gives depends on it alone.

        So the rows of several weights can be quantized in one launch, and those of a huge weight in several.
        """

    def finish(self, rows: State, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """What is a weight's own, from what `quantize_rows` gave for all rows of a weight of `shape`.

        Each owns its storage if those of `rows` do.
        """

    def constants(self, device: torch.device) -> State:
        """The rest of `state_spec`, which is the same for all weights; each of them gets a copy of its own."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of `state_spec`, on the weight's device; each owns its storage."""
        shape = tuple(weight.shape)
        own = self.finish(self.quantize_rows(weight.reshape(matrix_shape(shape))), shape)
        return {**own, **{leaf: tensor.clone() for leaf, tensor in self.constants(weight.device).items()}}

    def dequantize(self, state: State, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The weight of `shape` that `state` stands for, rounded once to `dtype`."""

    def linear(self, x: Tensor, state: State, bias: Tensor | None) -> Tensor:
        """x [..., K] times the transposed [N, K] weight, plus bias [N], in x's dtype."""

    def describe(self) -> dict[str, str | int | float | bool]:
        """What a checkpoint must say of this format for `format_from_description` to rebuild it."""
