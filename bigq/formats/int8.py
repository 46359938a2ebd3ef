"""int8: one scale (absmax) for each row; products are LLM.int8(), with outlier columns (arXiv 2208.07339)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bigq import ops
from bigq.errors import ConfigError
from bigq.formats.base import Format, Product, Rows, State, TensorSpec, as_bits, like_weight, matrix_shape
from bigq.ops.checks import as_floats

__all__ = ["Int8"]

_LARGEST = torch.finfo(torch.float64).max  # an int may be larger, and is no number to an op


@dataclass(frozen=True, kw_only=True)
class Int8(Format):
    """int8 codes with one scale for each row: packed int8 [..., K] and absmax [..., 1].

    Args:
        threshold: a column of the activations with a magnitude of this or more is multiplied in the dtype of the
            activations; all others are quantized to int8. 0.0: none is an outlier column.

    Raises:
        ConfigError: `threshold` is not a finite number >= 0.

    Example:
        >>> import bigq
        >>> bigq.Int8(threshold=0.0)
        Int8(threshold=0.0)
    """

    threshold: float = 6.0

    def __post_init__(self) -> None:
        is_number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not (is_number and 0.0 <= self.threshold <= _LARGEST):
            raise ConfigError(f"threshold is {self.threshold!r}; expected a finite number >= 0 (0 for no outliers)")

    @property
    def name(self) -> str:
        return "int8"

    @property
    def custom_map_offload(self) -> str:
        return "quantized"  # accelerate's default for 8-bit

    def state_spec(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        *leading, columns = shape or (1,)
        return {
            "packed": TensorSpec(shape=(*leading, columns), dtype=torch.int8),
            "absmax": TensorSpec(shape=(*leading, 1), dtype=torch.int32),
        }

    def quantize_rows(
        self,
        rows: Tensor,
        *,
        method: str = "absmax",
        measured: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Rows:
        codes, absmax = ops.quantize_int8(rows)
        largest = absmax.amax() if absmax.numel() else absmax.new_zeros(())
        return Rows({"packed": codes, "absmax": as_bits(absmax)}, largest)

    def finish(self, rows: State, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {part: like_weight(tensor, shape) for part, tensor in rows.items()}

    def scales(self, state: State) -> Tensor:
        return as_floats(state["absmax"])

    def select(self, state: State, shape: tuple[int, ...], index: int | slice) -> tuple[Format, dict[str, Tensor]]:
        return self, {part: tensor[index] for part, tensor in state.items()}

    def take_rows(self, state: State, index: Tensor) -> tuple[Format, dict[str, Tensor]]:
        return self, {part: tensor.index_select(0, index) for part, tensor in state.items()}

    @property
    def column_group(self) -> int:
        return 1  # the scale of a row stays that of the whole row

    def select_columns(self, state: State, start: int, stop: int) -> dict[str, Tensor]:
        return {**state, "packed": state["packed"][..., start:stop]}

    def dequantize(self, state: State, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        rows, columns = matrix_shape(shape)
        packed, scales = state["packed"].reshape(rows, columns), self.scales(state).reshape(rows, 1)
        dense: Tensor = ops.dequantize_int8(packed, scales, dtype)
        return dense.view(shape)

    def product(self, in_features: int | None = None) -> Product:
        return Product("linear_int8", ("packed", "absmax", "bias"), (self.threshold,))

    @property
    def has_stack_products(self) -> bool:
        return True

    def stack_product(self, in_features: int | None = None, *, sorted_rows: bool) -> Product:
        return self.product(in_features)._replace(op="grouped_linear_int8" if sorted_rows else "routed_linear_int8")

    def describe(self) -> dict[str, str | int | float | bool]:
        return {"format": "int8", "threshold": self.threshold}
