"""coverage: which share of a model's weights a plan quantizes, and a warning where it leaves most of them."""

from math import prod

from torch import nn

from bigq.config import QuantizationConfig
from bigq.model.patterns import matches
from bigq.model.tree import ModelTree
from bigq.planning.plan import Plan
from bigq.system.text import shortlist
from bigq.system.user_warnings import warn

__all__ = ["quantized_share", "warn_of_weights_left"]

SHOWN = 10
CONTAINERS = (nn.Module, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


def quantized_share(plan: Plan) -> float:
    """How many of all numbers in the parameters of a model are quantized, from 0 to 1. Tied ones count once."""
    quantized, state = _quantized_numel(plan), plan.weights_of_state()
    kept = sum(prod(t.spec.shape) for t in plan.tensors if not t.is_buffer and t.names[0] not in state)
    return quantized / max(quantized + kept, 1)


def warn_of_weights_left(tree: ModelTree, plan: Plan, config: QuantizationConfig | None) -> None:
    """Warn if more numbers are in matrices that nothing asks to keep than are quantized.

    Such matrices belong to modules that bigq does not know, such as experts of one's own, or a checkpoint of
    bitsandbytes holds them as floats. Those of torch's modules and of subclasses are not counted, such as convolutions
    and embeddings, and neither is what has a reason to be kept.
    """
    left: dict[str, int] = {}
    for tensor in plan.tensors:
        name = tensor.names[0]
        owner = name.rpartition(".")[0]
        is_matrix = not tensor.is_buffer and len(tensor.spec.shape) > 1 and tensor.spec.dtype.is_floating_point
        if is_matrix and owner not in plan.kept and not _is_of_torch(tree.modules[owner]):
            left[name] = prod(tensor.spec.shape)
    quantized = _quantized_numel(plan)
    if sum(left.values()) <= quantized:
        return
    asked = _patterns_of_what_is_kept(config)
    left = {name: numel for name, numel in left.items() if not any(matches(pattern, name) for pattern in asked)}
    if sum(left.values()) <= quantized:
        return
    why = (
        "by default these are the weights of linears and of transformers' experts. Name others in also_quantize, or in "
        "skip_modules to keep them without this warning"
        if plan.rules
        else "the checkpoint holds them so. To quantize them, load the original weights, with a quantization_config"
    )
    largest = sorted(left, key=lambda name: -left[name])
    warn(
        f"{sum(left.values()):,} numbers of {len(left)} weights stay as they are, and {quantized:,} are quantized: "
        f"{why}: {shortlist(largest, limit=SHOWN)}",
    )


def _patterns_of_what_is_kept(config: QuantizationConfig | None) -> list[str]:
    if config is None:
        return []
    rules = [pattern for pattern, weight_format in config.ordered_rules() if weight_format is None]
    return [*config.skip_modules, *config.keep_in_fp32_modules, *rules]


def _is_of_torch(module: nn.Module) -> bool:
    """Whether the class of `module`, or one that it is made of, is a module of torch that computes something."""
    return any(kind.__module__.startswith("torch.") and kind not in CONTAINERS for kind in type(module).__mro__)


def _quantized_numel(plan: Plan) -> int:
    return sum(prod(weight.description.shape) for weight in plan.weights)
