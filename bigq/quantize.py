"""quantize_tensor and dequantize_tensor: quantize a single tensor, without a module."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bigq.config import QuantizationConfig
from bigq.errors import ConfigError
from bigq.formats import Description, importance_of
from bigq.interop.bitsandbytes_configs import as_config

__all__ = ["QuantizedTensor", "dequantize_tensor", "quantize_tensor"]


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A quantized tensor: what `quantize_tensor` returns.

    Args:
        description: the format, shape and dtype.
        tensors: the tensors that hold it, by part: "packed", "absmax" and so on, as docs/formats.md lists them.
    """

    description: Description
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all `tensors`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def quantize_tensor(
    weight: Tensor, quantization_config: QuantizationConfig | object, *, moments: Tensor | None = None
) -> QuantizedTensor:
    """Quantize a float tensor along its last dimension, on the tensor's own device.

    Args:
        weight: float16, bfloat16 or float32, of any shape [..., K]. It is not changed.
        quantization_config: as in `load_and_quantize_model`; its format, method and compute_dtype are used.
        moments: with method="search", the mean of x_j^2 of the weight's inputs: floating point [K], on any device. The
            moments of the config are those of a model, and are not used.

    Returns:
        new tensors, which share no memory with `weight`.

    Raises:
        ConfigError: `weight` has another dtype, or holds NaN or Inf; or the config has no format; or `moments` does not
            fit the method or the weight.

    Example:
        >>> import bigq, torch
        >>> state = bigq.quantize_tensor(torch.ones(8, 64), bigq.QuantizationConfig("nf4"))
        >>> {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in state.tensors.items()}
        {'packed': (torch.uint8, (8, 32)), 'absmax': (torch.int32, (8, 1))}
    """
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ConfigError(f"weight is {weight.dtype}; expected torch.float16, torch.bfloat16 or torch.float32")
    if not weight.isfinite().all():
        raise ConfigError(f"a weight of shape {list(weight.shape)} holds NaN or Inf and cannot be quantized")
    config = as_config(quantization_config)
    weight_format = config.weight_format()
    if weight_format is None:
        raise ConfigError("the quantization_config has rules and no format: pass the format of this tensor")
    description = Description(
        format=weight_format,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        compute_dtype=config.compute_dtype,
    )
    importance = _importance(config, moments, description.shape)
    tensors = weight_format.quantize(
        weight.detach(), method=config.method, importance=None if importance is None else importance.to(weight.device)
    )
    return QuantizedTensor(description=description, tensors=tensors)


def _importance(config: QuantizationConfig, moments: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """What the method of `config` needs of a weight of this shape."""
    if config.method != "search":
        if moments is not None:
            raise ConfigError(f"moments beside method={config.method!r}: pass QuantizationConfig(method='search')")
        return None
    if moments is None:
        raise ConfigError("method='search' needs the moments of the tensor's inputs: pass moments=, floating point [K]")
    importance = importance_of(moments)
    if importance.shape != shape[-1:]:
        raise ConfigError(f"moments has {len(importance)} numbers; expected {list(shape[-1:])}, one an input feature")
    return importance


def dequantize_tensor(state: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Decode a quantized tensor.

    Args:
        state: what `quantize_tensor` returned.
        dtype: dtype of the result, to which it is rounded once. None: the dtype of the original tensor.

    Returns:
        a new tensor of the original shape, on the device of `state`.

    Example:
        >>> import bigq, torch
        >>> state = bigq.quantize_tensor(torch.tensor([[0.0, 0.5, 1.0]]), bigq.QuantizationConfig("nf4"))
        >>> bigq.dequantize_tensor(state)
        tensor([[0.0000, 0.4407, 1.0000]])
    """
    what = state.description
    return what.format.dequantize(state.tensors, what.shape, dtype or what.dtype)
