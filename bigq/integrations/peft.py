"""merge_costs: what merging an adapter of PEFT would do to quantized weights, before it is done."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bigq.errors import ConfigError
from bigq.interop.expert_adapters import adapted_leaf, adapted_module
from bigq.interop.frozen_weights import whole_weights
from bigq.model.tree import tensor_name
from bigq.weight.convert import revert
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["MergeCost", "merge_costs"]

_INNER = ".base_layer"  # of layers that adapt one weight each, and are nested


@dataclass(frozen=True, kw_only=True)
class MergeCost:
    """What a merge does to one weight. Both numbers are Frobenius norms, divided by that of the weight.

    If the rounding is above the change, the weight without the adapter is closer to the sum than the merged weight is.

    Args:
        change: of what the adapter adds to the weight.
        rounding: of what quantizing the sum adds to it.
    """

    change: float
    rounding: float


def merge_costs(model: nn.Module, adapter_names: Sequence[str] | None = None) -> dict[str, MergeCost]:
    """Compute what merging adapters would change in each quantized weight, and what quantizing the sums would add.

    Nothing is changed. One weight at a time is dequantized, on its device. What PEFT cannot merge raises PEFT's error.
    For a model in frozen shards, all processes call it.

    Args:
        model: a PEFT model whose adapters are not merged.
        adapter_names: those that would be merged, as in PEFT's `merge_adapter`. None: the active ones.

    Returns:
        {name of the adapted module: its MergeCost}, for modules with quantized weights. For adapters of experts the
        name is that of the weight.

    Raises:
        ConfigError: an adapter is merged, or no adapter is on a quantized module.

    Example:
        >>> import bigq, peft, torch
        >>> from bigq.integrations.peft import merge_costs
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> model = bigq.load_and_quantize_model(model, None, bigq.QuantizationConfig("nf4"), device_map="cpu")
        >>> model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
        >>> costs = merge_costs(model)
        >>> list(costs)
        ['base_model.model.0']
        >>> 0 < costs["base_model.model.0"].rounding < costs["base_model.model.0"].change
        True
    """
    costs = {}
    for name, layer in _adapted(model):
        if layer.merged:
            raise ConfigError(f"the adapter of {name} is merged already: call the model's unmerge_adapter() first")
        base = adapted_module(layer)
        assert base is not None
        with whole_weights(base, adapted_leaf(layer), writes=False):
            costs[name] = _merge_cost(layer, base, adapter_names)
    if not costs:
        raise ConfigError(
            f"{type(model).__name__} has no adapter on a quantized module that can be merged; expected a model from "
            "peft.get_peft_model or peft.PeftModel.from_pretrained"
        )
    return costs


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The tuner layers over quantized modules, by the name of what each adapts."""
    for name, module in model.named_modules():
        if hasattr(module, "merge") and adapted_module(module) is not None:
            leaf = adapted_leaf(module)
            yield name if leaf is None else tensor_name(name.replace(_INNER, ""), leaf), module


def _merge_cost(layer: Any, base: QuantizedModule, adapter_names: Sequence[str] | None) -> MergeCost:
    leaf = adapted_leaf(layer)
    described = {own: description for own, description in base.descriptions.items() if leaf in (None, own)}
    plain = copy.copy(base)
    revert(plain, {})
    before = {own: base.stored_weight(own).dequantize(description.dtype) for own, description in described.items()}
    for own, weight in before.items():
        plain.register_parameter(own, nn.Parameter(weight.clone(), requires_grad=False))
    merged_layer = copy.deepcopy(layer, {id(base): plain})  # the same adapters on the plain module
    merged_layer.merge(adapter_names=None if adapter_names is None else list(adapter_names))
    size = change = rounding = 0.0
    for own, weight in before.items():
        merged, stored = plain.get_parameter(own).detach(), base.stored_weight(own)
        size += _square(weight.float())
        change += _square(merged.float() - weight.float())
        if not torch.equal(merged, weight):  # equal numbers keep their codes
            rounded = replace(stored, state=stored.quantize(merged)).dequantize(torch.float32)
            rounding += _square(rounded - merged.float())
    return MergeCost(change=(change / size) ** 0.5, rounding=(rounding / size) ** 0.5)


def _square(numbers: torch.Tensor) -> float:
    return float(numbers.norm()) ** 2
