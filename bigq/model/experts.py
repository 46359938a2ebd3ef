"""Mixtures of experts: which modules hold fused experts, and which linears are the routers beside experts."""

from collections.abc import Iterable, Iterator
from itertools import islice

from torch import nn

from bigq.weight.convert import is_transposed_linear, original_class

__all__ = ["holds_fused_experts", "is_transposed", "routers"]

# Classes of transformers with a forward of their own, which do not say `is_transposed`: whether they hold [E, K, N].
_OTHER_EXPERTS = {"InklingSharedExperts": False, "JetMoeParallelExperts": False, "Llama4TextExperts": True}


def holds_fused_experts(module: nn.Module) -> bool:
    """Whether `module` holds transformers' fused experts [E, N, K], or [E, K, N] if they are transposed."""
    return _layout(module) is not None


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` holds its weights as [..., K, N]."""
    return is_transposed_linear(module) or _layout(module) is True


def routers(modules: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    """The linears that choose among experts or weigh a shared one: beside experts, with one output for each, or one.

    `modules` are all modules of a model. A small error there sends a token to another expert. Experts are fused, or a
    module whose name ends with "experts": a ModuleList, a ModuleDict, or one that holds stacks of weights or says
    `num_experts`. A router may be a module of its own with a single linear.
    """
    for module in modules:
        counts: set[int] = set()
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, nn.Linear):  # a model may have 19,000 linears
                counts |= _counts(name, child)
        for child in module.children() if counts else ():
            linears = list(islice((inner for inner in child.modules() if isinstance(inner, nn.Linear)), 2))
            if len(linears) == 1 and linears[0].out_features in (*counts, 1):
                yield linears[0]


def _layout(module: nn.Module) -> bool | None:
    """Whether `module` holds fused experts that are transposed; None if it holds none."""
    if isinstance(module, nn.Linear):  # hasattr of a module takes 2 us
        return None
    kind = original_class(module)
    if kind.__name__ in _OTHER_EXPERTS and kind.__module__.startswith("transformers.models."):
        return _OTHER_EXPERTS[kind.__name__]
    if not (hasattr(module, "is_transposed") and hasattr(module, "num_experts")):
        return None
    said: object = module.is_transposed
    return said is True


def _counts(name: str, child: nn.Module) -> set[int]:
    """How many experts `child` may hold; none if it holds none.

    A list of experts may have a dropout among them (NLLB-MoE), or experts that compute nothing, with an output of the
    router for each. LongCat-Flash has stacks of two sizes for these.
    """
    is_named = name.endswith("experts")
    if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
        members = list(child.children()) if is_named else []
        return {len(members), sum(map(_has_parameters, members))} - {0}
    stacks = {weight.shape[0] for weight in child._parameters.values() if weight is not None and weight.dim() == 3}
    if not is_named and not (stacks and holds_fused_experts(child)):  # to ask a module for attributes takes longer
        return set()
    own = getattr(child, "num_experts", None)
    return stacks | {own} if isinstance(own, int) else stacks


def _has_parameters(module: nn.Module) -> bool:
    """As `module.parameters()` tells, which takes 10 us."""
    return any(weight is not None for inner in module.modules() for weight in inner._parameters.values())
