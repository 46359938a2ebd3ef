"""Format: what a weight format stores, how it quantizes and dequantizes, and how products with it are computed."""

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

METHODS = ("absmax", "search")  # how codes and scales are chosen; decoding does not depend on it


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape and dtype of a tensor that may not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Product(NamedTuple):
    """The call that computes x times the transposed weight: `eager.linear(op, x, tensors, settings)`.

    `parts` names the tensors that the op takes after x, in its order. One of them is "bias".
    """

    op: str
    parts: tuple[str, ...]
    settings: tuple[str | int | float | None, ...]


class Rows(NamedTuple):
    """What `quantize_rows` returns.

    `tensors` have one row for each row of the weight. `largest` is the largest magnitude of a scale, a float32 tensor
    of no dimensions. It is NaN or Inf if the weight contains either.
    """

    tensors: dict[str, Tensor]
    largest: Tensor


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, K) of a weight of `shape` [..., K] as a matrix; a scalar is one row of one element."""
    return prod(shape[:-1]), shape[-1] if shape else 1


def like_weight(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View a tensor [R, C], with one row for each row of a weight of `shape` [..., K], as [..., C]."""
    return rows if len(shape) == 2 else rows.view(*shape[:-1], rows.shape[1])


def as_bits(scales: Tensor) -> Tensor:
    """View float32 scales as int32 of the same bits. Casts of floating-point tensors then leave them alone.

    Ops accept both; `bigq.ops.checks.as_floats` is the inverse.
    """
    return scales.view(torch.int32)


class Format(Protocol):
    """A weight format: a frozen dataclass whose fields are its settings.

    Sizing, loading, placing and saving all follow from `state_spec`: no code above this package distinguishes formats.
    A weight of shape [..., K] is stored row by row, and its leading dimensions are kept. No tensor of its state is
    floating point: scales are stored as int32 of the same bits.

    `NF4`, `FP4` and `Int8` are the formats of this library. docs/formats.md describes their tensors.

    Example:
        >>> import torch
        >>> from bigq import NF4
        >>> NF4().state_spec((128, 64))["packed"].shape
        (128, 32)
        >>> state = NF4().quantize(torch.ones(128, 64))
        >>> NF4().dequantize(state, (128, 64), torch.bfloat16).dtype
        torch.bfloat16
    """

    @property
    def name(self) -> str:
        """Its name in a config: "nf4", "fp4" or "int8"."""

    @property
    def custom_map_offload(self) -> str:
        """How weights on "cpu" and "disk" are stored if device_map is a dict: "preserve" or "quantized".

        The defaults are those of accelerate.
        """

    @property
    def row_group(self) -> int:
        """How many neighbouring rows share a scale. A weight that is quantized in pieces is split between groups."""
        return 1

    @property
    def row_format(self) -> "Format":
        """The format of what `quantize_rows` makes of some rows: another one if `finish` needs all rows of a weight."""
        return self

    def state_spec(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Shapes and dtypes of the parts of a weight of `shape` [..., K]; the part "packed" holds its codes."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Those of `METHODS` by which it chooses codes and scales; "absmax" is every format's."""
        return METHODS[:1]

    def takes_whole(self, method: str) -> bool:
        """Whether `quantize_rows` has to get all rows of one weight at once, and no others."""
        return self.measures

    @property
    def measures(self) -> bool:
        """Whether `measure` has to be called with a whole weight before its first row is quantized."""
        return False

    def measure(self, rows: Tensor) -> Tensor:
        """Compute what `quantize_rows` needs from all `rows` [R, K] of a weight, such as one scale for all."""
        raise UnsupportedError(f"format {self.name!r} quantizes row by row: there is nothing to measure")

    def quantize_rows(
        self,
        rows: Tensor,
        *,
        method: str = "absmax",
        measured: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Rows:
        """Quantize rows of one or several weights. The result of each group of `row_group` rows depends on it alone.

        So the rows of several weights can be quantized in one launch, and those of a huge weight in several, unless the
        format `takes_whole` weights by this method.

        Args:
            rows: [R, K], float16, bfloat16 or float32, on the device that quantizes; R is a multiple of `row_group`.
            method: how codes and scales are chosen, one of `methods`.
            measured: what `measure` returned, if the format `measures`.
            importance: with "search", float32 [K] on the device of `rows`: what `importance_of` makes of the moments of
                the weight's inputs.
        """

    def finish(self, rows: State, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Make the state of a weight of `shape` from what `quantize_rows` returned for all of its rows.

        Each tensor owns its storage if the tensors of `rows` do.
        """

    def quantize(
        self, weight: Tensor, *, method: str = "absmax", importance: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Quantize a float `weight` [..., K] on its device, into new tensors that own their storage.

        The other arguments are those of `quantize_rows`.
        """
        shape = tuple(weight.shape)
        rows = weight.reshape(matrix_shape(shape))
        measured = self.measure(rows) if self.measures else None
        given = {} if importance is None else {"importance": importance}
        result = self.quantize_rows(rows, method=method, measured=measured, **given)
        return self.finish(result.tensors, shape)

    def scales(self, state: State) -> Tensor:
        """The scales of `state` as float32, [..., B] or [..., 1]. Quantized scales are decoded."""

    def select(self, state: State, shape: tuple[int, ...], index: int | slice) -> tuple["Format", dict[str, Tensor]]:
        """Return the format and the state of `weight[index]`.

        The format is another one if this format cannot store a part in the same way. Then the tensors are new, and a
        write to the part does not write to the weight. Otherwise the tensors are views of `state`.

        Args:
            state: of the weight.
            shape: of the weight, [D, ..., K]; of three dimensions or more if `index` is an int.
            index: an entry, or a range of step 1, of the first dimension.
        """

    def take_rows(self, state: State, index: Tensor) -> tuple["Format", dict[str, Tensor]]:
        """Copy the entries `index` [L] of the first dimension: the format and the state of a weight [L, ..., K]."""

    @property
    def column_group(self) -> int | None:
        """How many neighbouring columns a scale covers: a weight is cut along K between groups. None: it is not cut."""
        return None

    def select_columns(self, state: State, start: int, stop: int) -> dict[str, Tensor]:
        """Return views of `state`, in a format that `select` gave, that store the columns `start` to `stop`.

        Both are multiples of `column_group`, or K.
        """
        raise UnsupportedError(f"format {self.name!r} cannot cut a weight along K")

    def dequantize(self, state: State, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Decode `state` to a new tensor of `shape`, rounded once to `dtype`."""

    def product(self, in_features: int | None = None) -> Product:
        """The call of products with a weight of K = `in_features`. None: any K that fits the tensors."""

    def reads_hit_experts(self, in_features: int, dtype: torch.dtype) -> bool:
        """Whether a product of a few rows in `dtype` with a stack is known to read only the weights of these rows."""
        return False

    def multiplies_rows_apart(
        self, shape: tuple[int, ...], rows: int, dtype: torch.dtype, device: torch.device
    ) -> bool:
        """Whether a product of `rows` unsorted rows in `dtype` with a stack [E, N, K] multiplies each by itself.

        Its bits depend on no other row then, nor on where its weight stands in the stack. So a product with a part of
        the stack, which is told E, has them too.
        """
        return False

    def parts_by_matrix(self, shape: tuple[int, ...]) -> dict[str, bool] | None:
        """For each part of a stack [E, N, K] whether it holds one matrix after the other; False: all of them share it.

        A part of the stack is stored as these parts of its matrices, in this format. None if that is not so.
        """
        return None

    @property
    def has_stack_products(self) -> bool:
        """Whether there are `stack_product`s. If not, the host reads which weight multiplies which row."""
        return False

    def stack_product(self, in_features: int | None = None, *, sorted_rows: bool) -> Product:
        """The call of products with a stack of weights, each row by its own: `eager.routed(op, x, route, ...)`.

        Args:
            in_features: K of the weights.
            sorted_rows: whether the rows are sorted by weight, and `route` says where those of each end, int32 [E].
                Otherwise `route` holds the weight of each row of the result, int32 or int64 [S].
        """
        raise UnsupportedError(f"format {self.name!r} has no product with a stack of weights")

    def linear(self, x: Tensor, state: State, bias: Tensor | None, in_features: int | None = None) -> Tensor:
        """Compute x [..., K] times the transposed weight [N, K], plus bias [N]: [..., N], in x's dtype."""
        op, parts, settings = self.product(in_features)
        return eager.linear(op, x, tuple(bias if part == "bias" else state[part] for part in parts), settings)

    def describe(self) -> dict[str, str | int | float | bool]:
        """{"format": name, and each setting by its name}, from which `make_format` makes the format again."""
