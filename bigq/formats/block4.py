"""NF4 and FP4: 4-bit codes with one scale (absmax) for each block: one algorithm with two tables of 16 values.

Blocks run along K, and none spans two rows: the last block of a row may be shorter. If K is a multiple of block_size,
the bytes equal those of bitsandbytes' flat layout. With `double_quant` the scales are quantized to uint8 codes too, in
flat blocks of 256 around their mean (QLoRA, arXiv 2305.14314, section 3).
"""

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from bigq import ops
from bigq.errors import ConfigError
from bigq.formats.base import METHODS, Format, Product, Rows, State, TensorSpec, as_bits, like_weight, matrix_shape
from bigq.ops import reference
from bigq.ops.checks import as_floats
from bigq.ops.sharding import shard_width

__all__ = ["BLOCK_SIZES", "FP4", "NF4", "Block4"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FUSED_DTYPES = (torch.bfloat16, torch.float16)  # and _FUSED_STEP columns: what products take without dequantizing
_FUSED_STEP = 32


@dataclass(frozen=True, kw_only=True)
class Block4(Format):
    """What NF4 and FP4 share: packed uint8 [..., ceil(K/2)] and absmax [..., B]; two more parts with `double_quant`."""

    block_size: int = 64
    double_quant: bool = False
    quant_type: ClassVar[str]

    def __post_init__(self) -> None:
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"block_size is {self.block_size!r}; expected one of {list(BLOCK_SIZES)}")
        if not isinstance(self.double_quant, bool):
            raise ConfigError(f"double_quant is {self.double_quant!r}; expected True or False")

    @property
    def name(self) -> str:
        return self.quant_type

    @property
    def custom_map_offload(self) -> str:
        return "preserve"  # accelerate's default for 4-bit

    def state_spec(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        *leading, columns = shape or (1,)
        scales = (*leading, -(-columns // self.block_size))
        spec = {
            "packed": TensorSpec(shape=(*leading, -(-columns // 2)), dtype=torch.uint8),
            "absmax": TensorSpec(shape=scales, dtype=torch.uint8 if self.double_quant else torch.int32),
        }
        if self.double_quant:
            nested = -(-prod(scales) // reference.NESTED_BLOCK_SIZE)
            spec["nested_absmax"] = TensorSpec(shape=(nested,), dtype=torch.int32)
            spec["nested_offset"] = TensorSpec(shape=(1,), dtype=torch.int32)
        return spec

    @property
    def row_format(self) -> Format:
        return self._plain()

    @property
    def methods(self) -> tuple[str, ...]:
        return METHODS

    def takes_whole(self, method: str) -> bool:
        # Codes are chosen for the scales as they are decoded, and those depend on the mean of all.
        return method == "search" and self.double_quant

    def quantize_rows(
        self,
        rows: Tensor,
        *,
        method: str = "absmax",
        measured: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Rows:
        if method == "search":
            return self._searched(rows, importance)
        packed, absmax = ops.quantize_4bit(rows, self.quant_type, self.block_size)
        largest = absmax.amax() if absmax.numel() else absmax.new_zeros(())
        return Rows({"packed": packed, "absmax": as_bits(absmax)}, largest)

    def _searched(self, rows: Tensor, importance: Tensor | None) -> Rows:
        """Rows whose scales lose least where `importance` [K] is large; those of NF4 may be negative."""
        if importance is None:
            raise ConfigError("method='search' needs the importance of the input features")
        scales = ops.search_scales_4bit(rows, importance, self.quant_type, self.block_size)
        decoded = ops.dequantize_absmax(*ops.quantize_absmax(scales)) if self.double_quant else scales
        packed = ops.encode_scaled_4bit(rows, decoded, self.quant_type, self.block_size)
        largest = scales.abs().amax() if scales.numel() else scales.new_zeros(())
        return Rows({"packed": packed, "absmax": as_bits(scales)}, largest)

    def finish(self, rows: State, shape: tuple[int, ...]) -> dict[str, Tensor]:
        absmax = like_weight(rows["absmax"], shape)
        state = {"packed": like_weight(rows["packed"], shape), "absmax": absmax}
        if self.double_quant:
            codes, nested_absmax, nested_offset = ops.quantize_absmax(absmax)
            state |= {"absmax": codes, "nested_absmax": as_bits(nested_absmax), "nested_offset": as_bits(nested_offset)}
        return state

    def scales(self, state: State) -> Tensor:
        if not self.double_quant:
            return as_floats(state["absmax"])
        decoded: Tensor = ops.dequantize_absmax(state["absmax"], *_nested(state))
        return decoded

    def select(self, state: State, shape: tuple[int, ...], index: int | slice) -> tuple[Format, dict[str, Tensor]]:
        return self._plain(), {"packed": state["packed"][index], "absmax": as_bits(self.scales(state))[index]}

    def take_rows(self, state: State, index: Tensor) -> tuple[Format, dict[str, Tensor]]:
        absmax = state["absmax"].index_select(0, index)
        if self.double_quant:  # decode only the scales of these rows: find the block of 256 that each belongs to
            row_numel = prod(state["absmax"].shape[1:])
            flat = index.unsqueeze(1) * row_numel + torch.arange(row_numel, device=index.device)
            nested_absmax, nested_offset = map(as_floats, _nested(state))
            scale = nested_absmax.index_select(0, flat.flatten() // reference.NESTED_BLOCK_SIZE)
            every_code = torch.arange(256, dtype=torch.uint8, device=index.device)
            code = ops.dequantize_absmax(every_code, torch.ones_like(nested_offset), torch.zeros_like(nested_offset))
            values = code.index_select(0, absmax.flatten().int())
            absmax = as_bits(values * scale + nested_offset).view(absmax.shape)
        return self._plain(), {"packed": state["packed"].index_select(0, index), "absmax": absmax}

    @property
    def column_group(self) -> int:
        return self.block_size

    def select_columns(self, state: State, start: int, stop: int) -> dict[str, Tensor]:
        return {
            "packed": state["packed"][..., start // 2 : -(-stop // 2)],
            "absmax": state["absmax"][..., start // self.block_size : -(-stop // self.block_size)],
        }

    def dequantize(self, state: State, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        rows, columns = matrix_shape(shape)
        packed = state["packed"].reshape(rows, -(-columns // 2))
        scales = self.scales(state).reshape(rows, -(-columns // self.block_size))
        width = shard_width(packed, columns)
        dense: Tensor = ops.dequantize_4bit(packed, scales, self.quant_type, self.block_size, width, dtype)
        return dense.view(shape)

    def product(self, in_features: int | None = None) -> Product:
        settings = (self.quant_type, self.block_size, in_features)
        if self.double_quant:
            return Product("linear_4bit", ("packed", "absmax", "bias", "nested_absmax", "nested_offset"), settings)
        return Product("linear_4bit", ("packed", "absmax", "bias"), (None, None, *settings))

    def reads_hit_experts(self, in_features: int, dtype: torch.dtype) -> bool:
        return dtype in _FUSED_DTYPES and in_features % _FUSED_STEP == 0

    def multiplies_rows_apart(
        self, shape: tuple[int, ...], rows: int, dtype: torch.dtype, device: torch.device
    ) -> bool:
        e, n, k = shape
        return ops.multiplies_rows_apart(device, rows, e, n, k, self.block_size, dtype)

    def parts_by_matrix(self, shape: tuple[int, ...]) -> dict[str, bool] | None:
        if not self.double_quant:
            return {"packed": True, "absmax": True}
        scales = prod(shape[1:-1]) * -(-shape[-1] // self.block_size)
        if scales % reference.NESTED_BLOCK_SIZE:
            return None  # two matrices share a second-level scale
        return {"packed": True, "absmax": True, "nested_absmax": True, "nested_offset": False}

    @property
    def has_stack_products(self) -> bool:
        return True

    def stack_product(self, in_features: int | None = None, *, sorted_rows: bool) -> Product:
        return self.product(in_features)._replace(op="grouped_linear_4bit" if sorted_rows else "routed_linear_4bit")

    def describe(self) -> dict[str, str | int | float | bool]:
        return {"format": self.quant_type, "block_size": self.block_size, "double_quant": self.double_quant}

    def _plain(self) -> "Block4":
        """This format with float32 scales: a part's blocks of 256 scales would not begin where the weight's do."""
        return replace(self, double_quant=False)


class NF4(Block4):
    """4-bit NormalFloat: the 16 values are quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E).

    Args:
        block_size: how many numbers of a row share a scale: a power of two, 32 to 4096.
        double_quant: whether the scales are quantized too (4.13 instead of 4.5 bits a number, in blocks of 64).

    Raises:
        ConfigError: an argument has another value.

    Example:
        >>> import bigq
        >>> bigq.NF4(block_size=128, double_quant=True)
        NF4(block_size=128, double_quant=True)
    """

    quant_type = "nf4"


class FP4(Block4):
    """4-bit floating point: a sign bit and eight magnitudes, in bitsandbytes' order. The arguments are those of NF4.

    Example:
        >>> import bigq
        >>> bigq.FP4()
        FP4(block_size=64, double_quant=False)
    """

    quant_type = "fp4"


def _nested(state: State) -> tuple[Tensor, Tensor]:
    return state["nested_absmax"], state["nested_offset"]
