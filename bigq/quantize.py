"""quantize_tensor and dequantize_tensor: the formats on a single tensor, without a module."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigq.errors import ConfigError
from bigq.formats import Description
from bigq.integrations.bitsandbytes_configs import as_config

__all__ = ["QuantizedTensor", "dequantize_tensor", "quantize_tensor"]


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A quantized weight: what it is, and the tensors that hold it, by part: "packed", "absmax" and so on."""

    description: Description
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def quantize_tensor(weight: Tensor, quantization_config: Any) -> QuantizedTensor:
    """Quantize a float tensor of any shape along its last dimension, on its own device.

    Raises:
        ConfigError: `weight` is not fp16, bf16 or fp32, or holds NaN or Inf.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ConfigError(f"weight is {weight.dtype}; expected torch.float16, torch.bfloat16 or torch.float32")
    if not weight.isfinite().all():
        raise ConfigError(f"a weight of shape {list(weight.shape)} holds NaN or Inf and cannot be quantized")
    config = as_config(quantization_config)
    description = Description(
        format=config.weight_format(),
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        compute_dtype=config.compute_dtype,
    )
    return QuantizedTensor(
        description=description, tensors=description.format.quantize(weight.detach(), method=config.method)
    )


def dequantize_tensor(state: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that `state` stands for, in `dtype` (by default that of the original)."""
    what = state.description
    return what.format.dequantize(state.tensors, what.shape, dtype or what.dtype)
