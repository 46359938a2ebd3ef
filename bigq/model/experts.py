"""Mixtures of experts: which modules hold fused experts, and which linears are the routers beside experts."""

from collections.abc import Iterator

from torch import nn

from bigq.weight.convert import is_transposed_linear, original_class

__all__ = ["holds_fused_experts", "is_transposed", "routers"]

# Classes of transformers with a forward of their own, which do not say `is_transposed`: whether they hold [E, K, N].
_OTHER_EXPERTS = {"InklingSharedExperts": False, "JetMoeParallelExperts": False, "Llama4TextExperts": True}


def holds_fused_experts(module: nn.Module) -> bool:
    """Whether `module` holds transformers' fused experts [E, N, K], or [E, K, N] if they are transposed."""
    if isinstance(module, nn.Linear):  # hasattr of a module takes 2 us
        return False
    return _layout(module) is not None or (hasattr(module, "is_transposed") and hasattr(module, "num_experts"))


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` holds its weights as [..., K, N]."""
    if is_transposed_linear(module):
        return True
    if not holds_fused_experts(module):
        return False
    layout = _layout(module)
    said: object = module.is_transposed if layout is None else layout
    return said is True


def routers(model: nn.Module) -> Iterator[nn.Linear]:
    """The linears that choose among experts or weigh a shared one: beside experts, with one output for each, or one.

    A small error there sends a token to another expert. Experts are fused, or a module whose name ends with "experts":
    a ModuleList, a ModuleDict, or one that holds stacks of weights or says `num_experts`. A router may be a module of
    its own with a single linear.
    """
    for module in model.modules():
        counts = {count for name, child in module.named_children() for count in _counts(name, child)}
        for child in module.children() if counts else ():
            linears = [inner for inner in child.modules() if isinstance(inner, nn.Linear)]
            if len(linears) == 1 and linears[0].out_features in (*counts, 1):
                yield linears[0]


def _layout(module: nn.Module) -> bool | None:
    """Whether a class of `_OTHER_EXPERTS` is transposed; None for all other modules."""
    kind = original_class(module)
    is_of_transformers = kind.__module__.startswith("transformers.models.")
    return _OTHER_EXPERTS.get(kind.__name__) if is_of_transformers else None


def _counts(name: str, child: nn.Module) -> set[int]:
    """How many experts `child` may hold; none if it holds none.

    A list of experts may have a dropout among them (NLLB-MoE), or experts that compute nothing, with an output of the
    router for each. LongCat-Flash has stacks of two sizes for these.
    """
    is_named = name.endswith("experts")
    if isinstance(child, nn.ModuleList | nn.ModuleDict):
        members = list(child.children()) if is_named else []
        return {len(members), sum(any(True for _ in member.parameters()) for member in members)} - {0}
    if not is_named and not holds_fused_experts(child):
        return set()
    stacks = {parameter.shape[0] for parameter in child.parameters(recurse=False) if parameter.dim() == 3}
    own = getattr(child, "num_experts", None)
    return stacks | {own} if isinstance(own, int) else stacks
