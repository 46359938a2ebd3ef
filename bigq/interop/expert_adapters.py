"""expert_adapters: LoRA of PEFT on quantized experts, whose layers PEFT makes, names, saves and loads itself.

PEFT's `target_parameters` names Parameters, and a quantized weight is none. So while PEFT looks for Parameters to
adapt, each quantized weight of experts is named in place of its parts. The layer that PEFT makes replaces the Parameter
by one with the adapter's change in it. For experts that is a second weight of full size in high precision in each call.
Here the layer hands the factors of the change to the forward of the experts, which multiplies rows by them. A forward
of others, which reads the weight, gets the weight with the change in it, as from PEFT.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bigq.model.experts import holds_experts_in_matrices
from bigq.weight.experts import QuantizedExperts
from bigq.weight.linear import QuantizedEmbedding, QuantizedMatrix
from bigq.weight.low_rank import LowRank
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.slices import is_sliced

__all__ = ["adapted_forward", "adapted_leaf", "adapted_module", "named_as_parameters", "takes_adapters"]

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
    """In the context, `named_parameters` of modules of `model` names weights that take adapters, and no parts."""
    named = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    for module in named:
        vars(module)["named_parameters"] = partial(_named_weights, module)
    try:
        yield
    finally:
        for module in named:
            vars(module).pop("named_parameters", None)


def takes_adapters(module: QuantizedModule, leaf: str) -> bool:
    """Whether a call of `module` computes with what an adapter of PEFT adds to its weight `leaf`.

    That of a linear or an embedding does not read the weight, and neither do our own products of experts, which take
    factors. The matrices of DBRX are read by the module around theirs. A slice has fewer experts than an adapter.
    """
    if isinstance(module, QuantizedExperts) and module.multiplies:
        return module.adapts(leaf)
    reads = not isinstance(module, (QuantizedMatrix, QuantizedEmbedding)) and not holds_experts_in_matrices(module)
    return reads and not is_sliced(module) and len(module.descriptions[leaf].shape) in (2, 3)


def _named_weights(module: QuantizedModule, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
    leaves = [leaf for leaf in module.descriptions if takes_adapters(module, leaf)]
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
    base, leaf = adapted_module(layer), adapted_leaf(layer)
    assert base is not None
    assert leaf is not None
    if layer.disable_adapters or layer.merged or kwargs.get("adapter_names") is not None:  # PEFT refuses the last
        with base.changed(leaf, None) if base.was_changed else nullcontext():  # so that it may be computed again
            return method(layer, *args, **kwargs)
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if isinstance(base, QuantizedExperts) and (base.multiplies or is_sliced(base)):
        transposed = base.descriptions[leaf].transposed
        changes = {**kwargs.pop(_CHANGES, {}), leaf: [_change(layer, name, transposed=transposed) for name in active]}
        return layer.base_layer(*args, **kwargs, **{_CHANGES: changes})
    with base.changed(leaf, partial(_added, layer, active)):
        return layer.base_layer(*args, **kwargs)


def _added(layer: Any, adapters: list[str], weight: Tensor) -> Tensor:
    """`weight` with the changes of `adapters` added, in its dtype, as PEFT rounds them."""
    for adapter in adapters:
        change = _change(layer, adapter, transposed=False)
        down, up = (factor.to(weight.device, weight.dtype) for factor in (change.down, change.up))
        if weight.dim() == 2:
            weight = torch.addmm(weight, up[0], down[0], alpha=change.scaling)
        else:
            weight = torch.baddbmm(weight, up, down, alpha=change.scaling)
    return weight


def _change(layer: Any, adapter: str, *, transposed: bool) -> LowRank:
    """What `adapter` adds to the stored weights [E, N, K]; if they are not transposed, to the weight as it is read.

    PEFT holds the factors of all experts as two linears: A [E * r, in], and B [out, r * E]. What it calls "in" is not K
    for a weight [E, K, N] whose module has no `is_transposed`. It takes a matrix for one expert, and "in" is K then.
    """
    first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    experts = layer.num_experts
    down = first.view(experts, -1, first.shape[-1])
    up = second.view(second.shape[0], -1, experts).permute(2, 0, 1)
    is_stack = len(adapted_module(layer).descriptions[adapted_leaf(layer)].shape) == 3  # type: ignore[union-attr, index]
    if is_stack and getattr(layer, "_did_swap_in_out_features", False) == transposed:
        down, up = up.mT, down.mT
    return LowRank(down=down, up=up, scaling=layer.scaling[adapter])
