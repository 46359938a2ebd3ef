"""expert_adapters: LoRA of PEFT on quantized experts, whose layers PEFT makes, names, saves and loads itself.

PEFT's `target_parameters` names Parameters, and a quantized weight is none. So while PEFT looks for Parameters to
adapt, each quantized weight of experts is named in place of its parts. The layer that PEFT makes replaces the Parameter
by one with the adapter's change in it. For experts that is a second weight of full size in high precision in each call.
Here the layer hands the factors of the change to the forward of the experts, which multiplies rows by them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from bigq.weight.experts import QuantizedExperts
from bigq.weight.low_rank import LowRank
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["adapted_forward", "adapted_leaf", "adapted_module", "named_as_parameters"]

_CHANGES = "changes"  # the argument of QuantizedExperts.forward


def adapted_leaf(layer: nn.Module) -> str | None:
    """The leaf of the one weight that a tuner layer of PEFT adapts; None if it adapts the whole module."""
    leaf = vars(layer).get("parameter_name")
    return leaf if isinstance(leaf, str) else None


def adapted_module(layer: nn.Module) -> QuantizedModule | None:
    """The quantized module that a tuner layer of PEFT adapts; None if the module is not quantized.

    Layers that adapt one weight each are nested, one for each weight of the module.
    """
    base = getattr(layer, "base_layer", None)
    if isinstance(base, nn.Module) and adapted_leaf(layer) is not None and adapted_leaf(base) is not None:
        return adapted_module(base)
    return base if isinstance(base, QuantizedModule) else None


@contextmanager
def named_as_parameters(model: nn.Module) -> Iterator[None]:
    """In the context, `named_parameters` of quantized experts of `model` gives their weights in place of the parts."""
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    for module in experts:
        vars(module)["named_parameters"] = partial(_named_weights, module)
    try:
        yield
    finally:
        for module in experts:
            vars(module).pop("named_parameters", None)


def _named_weights(module: QuantizedExperts, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
    leaves = [leaf for leaf in module.descriptions if module.adapts(leaf)]
    seen: set[str] = set()
    for name, parameter in type(module).named_parameters(module, *args, **kwargs):
        leaf = module.weight_of(name)
        if leaf not in leaves:
            yield name, parameter
        elif leaf not in seen:
            seen.add(leaf)
            yield leaf, module.read_weight(leaf)


def adapted_forward(layer: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the base layer of `layer`, a ParamWrapper over quantized experts, with its active adapters.

    Args:
        layer: LoRA of PEFT for one weight.
        method: the forward of its class, which is called where there is nothing to add.
        args: of the call.
        kwargs: of the call. A layer around this one may have added its own adapters.
    """
    if layer.disable_adapters or layer.merged or kwargs.get("adapter_names") is not None:  # PEFT refuses the last
        return method(layer, *args, **kwargs)
    leaf = adapted_leaf(layer)
    transposed = adapted_module(layer).descriptions[leaf].transposed  # type: ignore[union-attr, index]
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    changes = {**kwargs.pop(_CHANGES, {}), leaf: [_change(layer, name, transposed=transposed) for name in active]}
    return layer.base_layer(*args, **kwargs, **{_CHANGES: changes})


def _change(layer: Any, adapter: str, *, transposed: bool) -> LowRank:
    """What `adapter` adds to the stored weights [E, N, K].

    PEFT holds the factors of all experts as two linears: A [E * r, in], and B [out, r * E]. What it calls "in" is not K
    for a weight [E, K, N] whose module has no `is_transposed`.
    """
    first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    experts = layer.num_experts
    down = first.view(experts, -1, first.shape[-1])
    up = second.view(second.shape[0], -1, experts).permute(2, 0, 1)
    if getattr(layer, "_did_swap_in_out_features", False) == transposed:
        down, up = up.mT, down.mT
    return LowRank(down=down, up=up, scaling=layer.scaling[adapter])
