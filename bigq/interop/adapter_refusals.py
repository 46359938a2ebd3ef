"""adapter_refusals: what PEFT would do to quantized weights without a word, or would refuse in words that do not help.

`target_parameters` names Parameters, and a quantized weight is none. PEFT is shown those that can be adapted as if they
were. It does not find any other and adapts the rest. It adds such names by itself to a config for experts, also for
"all-linear".
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import ref

from torch import nn

from bigq.errors import UnsupportedError
from bigq.formats import state_name
from bigq.interop.expert_adapters import named_as_parameters, takes_adapters
from bigq.model.tree import tensor_name
from bigq.system.text import shortlist
from bigq.system.user_warnings import warn
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.slices import is_sliced

__all__ = ["refuse_loftq", "refuse_slices_below", "watch_targets"]

_STEP = "_inject_parameters"  # what a tuner of PEFT does for the names in target_parameters


class _Targets:
    """Replaces the step of a tuner of PEFT that adapts parameters. It is a class, so that the model pickles."""

    def __init__(self, tuner: nn.Module) -> None:
        self._tuner = ref(tuner)

    def __call__(self, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Refuse or warn, and go on with the step of the tuner's class, which finds the weights of experts."""
        tuner = self._tuner()
        assert tuner is not None
        _check_targets(peft_config, model)
        with named_as_parameters(model):
            return getattr(type(tuner), _STEP)(tuner, peft_config, model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Targets":
        return _Targets(memo[id(self._tuner())])

    def __reduce__(self) -> tuple[Any, ...]:
        return _Targets, (self._tuner(),)


def watch_targets(tuner: nn.Module, model: nn.Module) -> None:
    """If `tuner` is one of PEFT that adapts parameters, and `model` is quantized, look at the names of parameters."""
    if hasattr(type(tuner), _STEP) and any(isinstance(module, QuantizedModule) for module in model.modules()):
        vars(tuner)[_STEP] = _Targets(tuner)


def refuse_loftq(layer: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Raise an UnsupportedError, in place of `method` of a LoRA layer over a quantized module.

    What is lost in NF4 is exactly zero for the numbers of an NF4 weight, so both factors of the adapter would be zero,
    and so would their gradients.
    """
    raise UnsupportedError(
        "init_lora_weights='loftq' starts from what quantizing a weight loses, and a quantized model does not hold "
        "that: an adapter of zeros would start, which does not train. Leave init_lora_weights out, or use 'olora', "
        "'pissa' or 'eva'; or run LoftQ on the float model, and quantize the model that it leaves"
    )


def refuse_slices_below(layer: nn.Module, base: nn.Module) -> None:
    """Raise an UnsupportedError if `base`, which the tuner layer `layer` adapts, holds slices of its weights.

    Each process would draw and train an adapter of its own, and none would be added to the sum of a row-wise layer.
    """
    if is_sliced(base):
        raise UnsupportedError(
            f"an adapter ({type(layer).__name__}) is added to a linear of which this process holds a slice, and each "
            "process would train another one: add the adapter before parallelize_module"
        )


def _check_targets(peft_config: Any, model: nn.Module) -> None:
    """Refuse or warn if `target_parameters` names parts of quantized weights, or weights that get no adapter.

    Raises:
        UnsupportedError: it names parts, or nothing would be adapted besides.
    """
    targets = set(peft_config.target_parameters)
    found = [weight for weight in _quantized(model) if _is_named(weight.name, targets)]
    parts = [part for weight in _quantized(model) for part in weight.parts if _is_named(part, targets)]
    if parts:
        raise UnsupportedError(
            f"target_parameters names {shortlist(parts, limit=3)}, which hold codes and scales of quantized weights, "
            "and an adapter cannot be added to these: leave them out"
        )
    weights = [weight.name for weight in found if not weight.is_adapted]
    if not weights:
        return
    said = (
        f"target_parameters names {len(weights)} quantized weights that PEFT cannot adapt, because the forward of "
        f"their module does not read them, as that of a linear does not: {shortlist(weights, limit=3)}"
    )
    leaves = sorted({weight.rpartition(".")[0].rpartition(".")[2] for weight in weights})
    remedy = f"keep them as floats with QuantizationConfig(..., skip_modules={leaves}) when you load the model"
    if not peft_config.target_modules and len(weights) == len(found):
        raise UnsupportedError(f"{said}; {remedy}, or name linears in target_modules")
    warn(f"{said}. They get no adapter, and the rest does. To train them, {remedy}")


class _Named(NamedTuple):
    """A quantized weight: its name and those of its parts, and whether the forward of its module takes adapters."""

    name: str
    parts: list[str]
    is_adapted: bool


def _quantized(model: nn.Module) -> Iterator[_Named]:
    """Each quantized weight, by its name without the wrappers of adapters that are there already."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            own = ".".join(part for part in name.split(".") if part != "base_layer")
            for leaf, description in module.descriptions.items():
                parts = [tensor_name(own, state_name(leaf, part)) for part in description.state_spec]
                yield _Named(tensor_name(own, leaf), parts, takes_adapters(module, leaf))


def _is_named(name: str, targets: set[str]) -> bool:
    """Whether PEFT takes one of `targets` for the parameter `name`: all of it, or its end from a dot on."""
    return any(name == target or name.endswith(f".{target}") for target in targets)
