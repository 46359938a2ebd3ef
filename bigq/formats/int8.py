"""int8: one absmax per output row, multiplied as LLM.int8() with high-precision outlier columns (arXiv 2208.07339)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bigq import eager, ops
from bigq.errors import ConfigError
from bigq.formats.base import Format, State, TensorSpec, like_weight, matrix_shape

__all__ = ["Int8"]


@dataclass(frozen=True, kw_only=True)
class Int8(Format):
    """State: weight int8 [..., K], absmax float32 [..., 1].

    `threshold` is the activation magnitude from which a column of x is multiplied in x's own dtype; 0 for never.
    """

    threshold: float = 6.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.threshold < float("inf")):
            raise ConfigError(f"threshold is {self.threshold!r}; expected a finite number >= 0 (0 for no outliers)")

    @property
    def name(self) -> str:
        return "int8"

    @property
    def custom_map_offload(self) -> str:
        return "quantized"  # as accelerate has it for 8-bit

    def state_spec(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        *leading, columns = shape or (1,)
        return {
            "weight": TensorSpec(shape=(*leading, columns), dtype=torch.int8),
            "absmax": TensorSpec(shape=(*leading, 1), dtype=torch.float32),
        }

    def quantize_rows(self, rows: Tensor) -> dict[str, Tensor]:
        codes, absmax = ops.quantize_int8(rows)
        return {"weight": codes, "absmax": absmax}

    def finish(self, rows: State, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {leaf: like_weight(tensor, shape) for leaf, tensor in rows.items()}

    def constants(self, device: torch.device) -> State:
        return {}

    def dequantize(self, state: State, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        weight, absmax = state["weight"], state["absmax"]
        rows, columns = matrix_shape(shape)
        dense = ops.dequantize_int8(weight.reshape(rows, columns), absmax.reshape(rows, 1), dtype)
        return dense.view(shape)  # type: ignore[no-any-return]

    def linear(self, x: Tensor, state: State, bias: Tensor | None) -> Tensor:
        return eager.linear("linear_int8", x, (state["weight"], state["absmax"], bias), (self.threshold,))

    def describe(self) -> dict[str, str | int | float | bool]:
        return {"format": "int8", "threshold": self.threshold}
