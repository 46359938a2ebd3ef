"""What a weight format answers: what it stores, how it is made, undone and multiplied by."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bigq.errors import UnsupportedError
from bigq.ops import eager

__all__ = ["METHODS", "Format", "Product", "Rows", "State", "TensorSpec", "as_bits", "like_weight", "matrix_shape"]

State = Mapping[str, Tensor]  # the tensors of one quantized weight, by part: "packed", "absmax" and so on

METHODS = ("absmax",)  # how codes and scales are chosen; what is stored does not depend on it


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape and dtype of a tensor that may not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Product(NamedTuple):
    """How x times the transposed weight is called: `eager.linear(op, x, tensors, settings)`.

    `parts` are the tensors that the op takes, in its order, "bias" among them.
    """

    op: str
    parts: tuple[str, ...]
    settings: tuple[str | int | float | None, ...]


class Rows(NamedTuple):
    """What `quantize_rows` gives: `tensors` with one row for each row of the weight, and `largest`.

    `largest` is the largest scale, a 0-d float32 tensor: NaN or Inf if a weight held either.
    """

    tensors: dict[str, Tensor]
    largest: Tensor


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight of `shape` [..., K] seen as (rows, K); a scalar is one row of one."""
    return prod(shape[:-1]), shape[-1] if shape else 1


def like_weight(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor [R, C] with a row for each of a weight of `shape` [..., K], as [..., C]."""
    return rows if len(shape) == 2 else rows.view(*shape[:-1], rows.shape[1])


def as_bits(scales: Tensor) -> Tensor:
    """Float32 scales as int32 of the same bits, which nothing that casts floating-point tensors touches.

    Ops take them so; `bigq.ops.checks.as_floats` is the way back.
    """
    return scales.view(torch.int32)


class Format(Protocol):
    """A weight format; a frozen dataclass whose fields are its settings.

    Sizing, loading, placing and saving all follow from `state_spec`: nothing above this package tells formats apart.
    A weight of shape [..., K] is stored row by row, its leading dimensions kept. No tensor of the state is floating
    point: a scale is stored as the int32 of its bits.
    """

    @property
    def name(self) -> str:
        """The word for it in a config: "nf4", "fp4" or "int8"."""

    @property
    def custom_map_offload(self) -> str:
        """What a device map of the user's own keeps on "cpu" and "disk" by default: "preserve" or "quantized"."""

    @property
    def row_group(self) -> int:
        """How many neighbouring rows share a scale. A weight is quantized in pieces of whole groups."""
        return 1

    def state_spec(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The tensors that hold a weight of `shape`, by part; "packed" is its codes."""

    @property
    def measures(self) -> bool:
        """Whether `measure` has to see a whole weight before its first row is quantized."""
        return False

    def measure(self, rows: Tensor) -> Tensor:
        """What `quantize_rows` has to know of all `rows` [R, K] of a weight, such as a scale of the whole tensor."""
        raise UnsupportedError(f"format {self.name!r} quantizes row by row: there is nothing to measure")

    def quantize_rows(self, rows: Tensor, *, method: str = "absmax", measured: Tensor | None = None) -> Rows:
        """Quantize `rows` [R, K], whole groups of `row_group`, on their device; a group's result depends on it alone.

        So the rows of several weights can be quantized in one launch, and those of a huge weight in several.

        Args:
            rows: float16, bfloat16 or float32.
            method: how codes and scales are chosen, one of `METHODS`.
            measured: what `measure` gave.
        """

    def finish(self, rows: State, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The state of a weight of `shape`, from what `quantize_rows` gave for all of its rows.

        Each tensor owns its storage if those of `rows` do.
        """

    def quantize(self, weight: Tensor, *, method: str = "absmax") -> dict[str, Tensor]:
        """The state of `weight` [..., K], on its device; each tensor owns its storage."""
        shape = tuple(weight.shape)
        rows = weight.reshape(matrix_shape(shape))
        measured = self.measure(rows) if self.measures else None
        return self.finish(self.quantize_rows(rows, method=method, measured=measured).tensors, shape)

    def scales(self, state: State) -> Tensor:
        """The scales of `state` as float32, decoded where they are quantized themselves; [..., B] or [..., 1]."""

    def select(self, state: State, shape: tuple[int, ...], index: int | slice) -> tuple["Format", dict[str, Tensor]]:
        """`weight[index]` of a weight of `shape` [D, ...], three dimensions or more if `index` is an int.

        Returns:
            the format and the state of that part. The tensors are views of `state` where the format is the same; it is
            another one where a part cannot be stored alike, and then writing to the part does not write to the whole.
        """

    def take_rows(self, state: State, index: Tensor) -> tuple["Format", dict[str, Tensor]]:
        """Copies of the entries `index` [L] of the first dimension: the format and the state of [L, ..., K]."""

    def dequantize(self, state: State, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The weight of `shape` that `state` stands for, rounded once to `dtype`."""

    def product(self, in_features: int | None = None) -> Product:
        """How products with a weight of K = `in_features` are called; None where any K will do that its tensors fit."""

    def linear(self, x: Tensor, state: State, bias: Tensor | None, in_features: int | None = None) -> Tensor:
        """x [..., K] times the transposed [N, K] weight, plus bias [N], in x's dtype."""
        op, parts, settings = self.product(in_features)
        return eager.linear(op, x, tuple(bias if part == "bias" else state[part] for part in parts), settings)

    def describe(self) -> dict[str, str | int | float | bool]:
        """The name as "format", and the settings: `make_format` rebuilds the format from them."""
