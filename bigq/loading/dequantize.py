"""dequantize: a quantized model as the plain model that it was, with the numbers of its quantized weights."""

from typing import Any

import torch
from torch import nn

from bigq.errors import ConfigError, UnsupportedError
from bigq.model.placeholders import drop_placeholders
from bigq.model.transaction import restored_on_error
from bigq.model.tree import ModelTree, assign_tensor
from bigq.offload.attach import allow_moves
from bigq.offload.materialize import materialize
from bigq.weight.convert import revert
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["dequantize"]

_ATTRIBUTES = ("quantization_method", "quantization_report", "is_loaded_in_8bit", "num_parameters")


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Make a quantized model a plain one: every quantized weight becomes a Parameter of floats, decoded.

    What is offloaded moves to the device that runs it first, as with `materialize`. Tied weights stay tied. Modules get
    their old classes back, and the attributes that a load has set go.

    Args:
        model: one that `load_and_quantize_model` returned. It is changed.
        dtype: of the decoded weights. None: that of each weight, as `module.weight.dtype` says.

    Returns:
        `model` itself.

    Raises:
        UnsupportedError: `model` holds no quantized weight.
        ConfigError: `dtype` is no floating-point dtype.
        PlacementError: offloaded tensors do not fit on the device that runs them; nothing was changed.

    Example:
        >>> import bigq, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig("nf4"), device_map="cpu")
        >>> decoded = model[0].dequantize()
        >>> model = bigq.dequantize(model)
        >>> model[0], torch.equal(model[0].weight, decoded)
        (Linear(in_features=64, out_features=32, bias=True), True)
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"dtype is {dtype}; expected a floating-point dtype, such as torch.bfloat16")
    modules = ModelTree(model).modules
    quantized = {name: module for name, module in modules.items() if isinstance(module, QuantizedModule)}
    if not quantized:
        raise UnsupportedError(f"{type(model).__name__} holds no quantized weight")
    if hasattr(model, "hf_device_map"):
        materialize(model)
    with restored_on_error(modules):
        allow_moves(model)
        weights: dict[int, nn.Parameter] = {}  # the decoded weight, by the id of its codes: ties stay
        for module in dict.fromkeys(quantized.values()):
            decoded = {leaf: _decoded(module, leaf, dtype, weights) for leaf in module.descriptions}
            revert(module, {})
            for leaf, weight in decoded.items():
                assign_tensor(module, leaf, weight)
        for inner in modules.values():  # a model of transformers or diffusers, perhaps in a wrapper
            drop_placeholders(inner)
            quantizer: Any = vars(inner).get("hf_quantizer")
            if quantizer is not None:
                quantizer.remove_quantization_config(inner)
        for name in _ATTRIBUTES:
            vars(model).pop(name, None)
    return model


def _decoded(
    module: QuantizedModule, leaf: str, dtype: torch.dtype | None, weights: dict[int, nn.Parameter]
) -> nn.Parameter:
    """The weight `leaf` of `module` as floats; the Parameter that a tied one has got already."""
    stored = module.stored_weight(leaf)
    key = id(stored.state["packed"])
    if key not in weights:
        numbers = stored.dequantize(dtype or module.descriptions[leaf].dtype)
        weights[key] = nn.Parameter(numbers.contiguous())
    return weights[key]
