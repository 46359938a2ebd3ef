"""NF4 and FP4: 4-bit codes with one absmax per block, one algorithm with two 16-entry tables.

Blocks run along the input dimension and never straddle rows, so a row's last block may be partial. Where K is a
multiple of block_size the bytes equal bitsandbytes' flat layout. With `double_quant` the absmax are uint8 codes of
their own, in flat blocks of 256 around their mean (QLoRA, arXiv 2305.14314, section 3).
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from bigq import eager, ops, reference
from bigq.errors import ConfigError
from bigq.formats.base import Format, State, TensorSpec, like_weight, matrix_shape

__all__ = ["BLOCK_SIZES", "Block4"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class Block4(Format):
    """State: weight uint8 [..., ceil(K/2)], absmax [..., B], quant_map float32 [16]; two more with `double_quant`."""

    quant_type: str
    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.quant_type not in reference.CODES:
            raise ConfigError(f"quant_type is {self.quant_type!r}; expected one of {sorted(reference.CODES)}")
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"block_size is {self.block_size!r}; expected one of {list(BLOCK_SIZES)}")

    @property
    def name(self) -> str:
        return self.quant_type

    @property
    def custom_map_offload(self) -> str:
        return "preserve"  # as accelerate has it for 4-bit

    def state_spec(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        *leading, columns = shape or (1,)
        blocks = -(-columns // self.block_size)
        scales = (*leading, blocks)
        spec = {
            "weight": TensorSpec(shape=(*leading, -(-columns // 2)), dtype=torch.uint8),
            "absmax": TensorSpec(shape=scales, dtype=torch.uint8 if self.double_quant else torch.float32),
        }
        if self.double_quant:
            nested = -(-prod(scales) // reference.NESTED_BLOCK_SIZE)
            spec["nested_absmax"] = TensorSpec(shape=(nested,), dtype=torch.float32)
            spec["nested_offset"] = TensorSpec(shape=(1,), dtype=torch.float32)
        return {**spec, "quant_map": TensorSpec(shape=(16,), dtype=torch.float32)}

    def quantize_rows(self, rows: Tensor) -> dict[str, Tensor]:
        packed, absmax = ops.quantize_4bit(rows, self.quant_type, self.block_size)
        return {"weight": packed, "absmax": absmax}

    def finish(self, rows: State, shape: tuple[int, ...]) -> dict[str, Tensor]:
        absmax = like_weight(rows["absmax"], shape)
        state = {"weight": like_weight(rows["weight"], shape), "absmax": absmax}
        if self.double_quant:
            state["absmax"], state["nested_absmax"], state["nested_offset"] = ops.quantize_absmax(absmax)
        return state

    def constants(self, device: torch.device) -> State:
        return {"quant_map": _quant_map(self.quant_type, device)}

    def dequantize(self, state: State, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        weight, absmax = state["weight"], state["absmax"]
        if self.double_quant:
            absmax = ops.dequantize_absmax(absmax, state["nested_absmax"], state["nested_offset"])
        rows, columns = matrix_shape(shape)
        packed, scales = weight.reshape(rows, -(-columns // 2)), absmax.reshape(rows, -(-columns // self.block_size))
        dense = ops.dequantize_4bit(packed, scales, self.quant_type, self.block_size, columns, dtype)
        return dense.view(shape)  # type: ignore[no-any-return]

    def linear(self, x: Tensor, state: State, bias: Tensor | None) -> Tensor:
        tensors = (state["weight"], state["absmax"], bias, state.get("nested_absmax"), state.get("nested_offset"))
        return eager.linear("linear_4bit", x, tensors, (self.quant_type, self.block_size))

    def describe(self) -> dict[str, str | int | float | bool]:
        return {"format": self.quant_type, "block_size": self.block_size, "double_quant": self.double_quant}


@cache  # to upload 16 numbers for each layer would wait for the GPU each time
def _quant_map(quant_type: str, device: torch.device) -> Tensor:
    return torch.tensor(reference.CODES[quant_type], dtype=torch.float32, device=device)
