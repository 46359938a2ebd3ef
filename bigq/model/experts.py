"""Mixtures of experts: which modules hold fused experts, and which linears are the routers beside experts."""

from collections.abc import Iterable, Iterator
from itertools import islice

from torch import Tensor, nn

from bigq.weight.convert import is_transposed_linear, original_class

__all__ = ["expert_weights", "has_rows_for_each_expert", "holds_experts_in_matrices", "is_transposed", "routers"]

# Classes of transformers that do not say `is_transposed`, and whose stacks have names of their own: whether they hold
# [E, K, N].
_OTHER_EXPERTS = {"AriaGroupedExpertsGemm": True, "InklingSharedExperts": False, "JetMoeParallelExperts": False}
# Those that hold experts one below the other, as [E * I, H], whether H is K or N. Their code reads views [E, I, H].
_IN_MATRICES = {"DbrxExpertGLU"}
# Those whose forward takes [E * T, H]: the rows of one expert after the other, as many for each.
_OF_ALL_ROWS = {"Llama4TextExperts"}


def expert_weights(module: nn.Module) -> tuple[str, ...]:
    """The Parameters of `module` that are transformers' fused experts: [E, N, K], or [E, K, N] if they are transposed.

    Those of some classes are matrices, see `holds_experts_in_matrices`.
    """
    if holds_experts_in_matrices(module):
        dimensions = 2
    elif _layout(module) is not None:
        dimensions = 3
    else:
        return ()
    held = module._parameters.items()
    return tuple(leaf for leaf, tensor in held if tensor is not None and tensor.dim() == dimensions)


def holds_experts_in_matrices(module: nn.Module) -> bool:
    """Whether `module` holds its experts one below the other in matrices: its input is not that of all of them."""
    return _of_transformers(module) in _IN_MATRICES


def has_rows_for_each_expert(module: nn.Module) -> bool:
    """Whether the forward of `module` takes the rows of one expert after the other, [E * T, H], and no routes."""
    return _of_transformers(module) in _OF_ALL_ROWS


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` holds its weights as [..., K, N]."""
    return is_transposed_linear(module) or _layout(module) is True


def routers(modules: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    """The linears that choose among experts or weigh a shared one: beside experts, with one output for each, or one.

    `modules` are all modules of a model. A small error there sends a token to another expert. Experts are fused, or a
    module whose name ends with "experts": a ModuleList, a ModuleDict, or one that holds stacks of weights or says
    `num_experts`. A router may be a module of its own with a single linear. One that is called a router, as
    its class may be, may have several linears and any number of outputs: Zaya's is an MLP, Doge's gives halves of keys.
    A layer with that name that holds the experts too is none.
    """
    found: dict[nn.Linear, None] = {}
    for module in modules:
        counts: set[int] = set()
        for name, child in module._modules.items():
            if child is None:
                continue
            if ("router" in name or "Router" in type(child).__name__) and not _holds_experts(child):
                found |= dict.fromkeys(_linears(child))
            if not isinstance(child, nn.Linear):  # a model may have 19,000 linears
                counts |= _counts(name, child)
        for child in module.children() if counts else ():
            linears = list(islice(_linears(child), 2))
            if len(linears) == 1 and linears[0].out_features in (*counts, 1):
                found[linears[0]] = None
    yield from found


def _holds_experts(module: nn.Module) -> bool:
    held = ((name, child) for inner in module.modules() for name, child in inner._modules.items())
    return any(_counts(name, child) for name, child in held if child is not None and not isinstance(child, nn.Linear))


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    return (inner for inner in module.modules() if isinstance(inner, nn.Linear))


def _layout(module: nn.Module) -> bool | None:
    """Whether `module` holds fused experts that are transposed; None if it holds none."""
    if isinstance(module, nn.Linear):  # hasattr of a module takes 2 us
        return None
    kind = _of_transformers(module)
    if kind in _OTHER_EXPERTS:
        return _OTHER_EXPERTS[kind]
    if kind.endswith("Experts") and not hasattr(module, "is_transposed"):
        return _layout_by_shape(module)
    if not (hasattr(module, "is_transposed") and hasattr(module, "num_experts")):
        return None
    said: object = module.is_transposed
    return said is True


def _of_transformers(module: nn.Module) -> str:
    """The name of the class of `module`, if it is one of transformers' models."""
    kind = original_class(module)
    return kind.__name__ if kind.__module__.startswith("transformers.models.") else ""


def _layout_by_shape(module: nn.Module) -> bool | None:
    """The same of a class that does not say it, and holds `gate_up_proj` of 2 I rows and `down_proj` of I columns.

    Llama4's are transposed; those of LongCat-Flash and Step3p7 are not. Both cannot fit one pair of shapes.
    """
    up, down = (getattr(module, leaf, None) for leaf in ("gate_up_proj", "down_proj"))
    if not (isinstance(up, Tensor) and isinstance(down, Tensor) and up.dim() == down.dim() == 3):
        return None
    rows, columns = up.shape[1:]
    if (columns, rows) == (down.shape[1], 2 * down.shape[2]):
        return False
    return True if (rows, columns) == (down.shape[2], 2 * down.shape[1]) else None


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
    if not is_named and not (stacks and expert_weights(child)):  # to ask a module for attributes takes longer
        return set()
    own = getattr(child, "num_experts", None)
    return stacks | {own} if isinstance(own, int) else stacks


def _has_parameters(module: nn.Module) -> bool:
    """As `module.parameters()` tells, which takes 10 us."""
    return any(weight is not None for inner in module.modules() for weight in inner._parameters.values())
