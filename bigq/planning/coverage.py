"""coverage: which share of a model's weights a plan quantizes, and a warning where it leaves most of them."""

import warnings
from math import prod

from bigq.config import QuantizationConfig
from bigq.model.patterns import match_patterns
from bigq.model.tree import ModelTree
from bigq.planning.plan import Plan

__all__ = ["quantized_share", "warn_of_weights_left"]

SHOWN = 10
MANY = 1_000_000  # numbers: fewer are no loss


def quantized_share(plan: Plan) -> float:
    """How many of all numbers in the parameters of a model are quantized, from 0 to 1. Tied ones count once."""
    quantized, state = _quantized_numel(plan), plan.weights_of_state()
    kept = sum(prod(t.spec.shape) for t in plan.tensors if not t.is_buffer and t.names[0] not in state)
    return quantized / max(quantized + kept, 1)


def warn_of_weights_left(tree: ModelTree, plan: Plan, config: QuantizationConfig) -> None:
    """Warn if more numbers are in matrices that nothing asks to keep than are quantized, and these are many.

    Such matrices belong to modules that bigq does not know, such as experts of one's own. Those of torch's modules are
    not counted, such as convolutions and embeddings, and neither is what has a reason to be kept.
    """
    left: dict[str, int] = {}
    names = [name for tensor in plan.tensors for name in tensor.names]
    asked = match_patterns("skip_modules", config.skip_modules, [*tree.modules, *names]) if config.skip_modules else {}
    for tensor in plan.tensors:
        name = tensor.names[0]
        owner = name.rpartition(".")[0]
        is_matrix = not tensor.is_buffer and len(tensor.spec.shape) > 1 and tensor.spec.dtype.is_floating_point
        is_of_torch = type(tree.modules[owner]).__module__.partition(".")[0] == "torch"
        has_reason = owner in plan.kept or owner in asked or name in asked
        if is_matrix and not has_reason and not is_of_torch:
            left[name] = prod(tensor.spec.shape)
    quantized = _quantized_numel(plan)
    if sum(left.values()) <= max(quantized, MANY):
        return
    largest = sorted(left, key=lambda name: -left[name])
    more = f" and {len(largest) - SHOWN} more" if len(largest) > SHOWN else ""
    warnings.warn(
        f"{sum(left.values()):,} numbers of {len(left)} weights stay as they are, and {quantized:,} are quantized: by "
        f"default these are the weights of linears and of transformers' experts. Name others in also_quantize, or in "
        f"skip_modules to keep them without this warning: {', '.join(largest[:SHOWN])}{more}",
        stacklevel=2,
    )


def _quantized_numel(plan: Plan) -> int:
    return sum(prod(weight.description.shape) for weight in plan.weights)
