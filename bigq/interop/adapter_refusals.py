"""adapter_refusals: what PEFT would do to quantized weights without a word, or would refuse in words that do not help.

`target_parameters` names Parameters, and a quantized weight is none. PEFT does not find it and adapts the rest. It adds
such names by itself to a config for experts, also for "all-linear".
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

from torch import nn

from bigq.errors import UnsupportedError
from bigq.formats import state_name
from bigq.model.tree import tensor_name
from bigq.system.text import shortlist
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["refuse_loftq", "watch_targets"]

_STEP = "_inject_parameters"  # what a tuner of PEFT does for the names in target_parameters


class _Targets:
    """Replaces the step of a tuner of PEFT that adapts parameters. It is a class, so that the model pickles."""

    def __init__(self, tuner: nn.Module) -> None:
        self._tuner = ref(tuner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse or warn, and go on with the step of the tuner's class."""
        tuner = self._tuner()
        assert tuner is not None
        _check_targets(*args, **kwargs)
        return getattr(type(tuner), _STEP)(tuner, *args, **kwargs)

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


def _check_targets(peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Refuse or warn if `target_parameters` of `peft_config` names quantized weights of `model`, or parts of them.

    Raises:
        UnsupportedError: it names parts, or nothing would be adapted besides.
    """
    targets = set(peft_config.target_parameters)
    weights = [weight for weight, parts in _quantized(model) if _is_named(weight, targets)]
    parts = [part for _, parts in _quantized(model) for part in parts if _is_named(part, targets)]
    if parts:
        raise UnsupportedError(
            f"target_parameters names {shortlist(parts, limit=3)}, which hold codes and scales of quantized weights, "
            "and an adapter cannot be added to these: leave them out"
        )
    if not weights:
        return
    said = (
        f"target_parameters names {len(weights)} quantized weights, which PEFT cannot adapt, because they are no "
        f"Parameters: {shortlist(weights, limit=3)}"
    )
    leaves = sorted({weight.rpartition(".")[0].rpartition(".")[2] for weight in weights})
    remedy = f"keep them as floats with QuantizationConfig(..., skip_modules={leaves}) when you load the model"
    if not peft_config.target_modules:
        raise UnsupportedError(f"{said}; {remedy}, or name linears in target_modules")
    warnings.warn(f"{said}. They get no adapter, and the rest does. To train them, {remedy}", stacklevel=2)


def _quantized(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """The names of each quantized weight and of its parts, without the wrappers of adapters that are there already."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            own = ".".join(part for part in name.split(".") if part != "base_layer")
            for leaf, description in module.descriptions.items():
                yield (
                    tensor_name(own, leaf),
                    [tensor_name(own, state_name(leaf, part)) for part in description.state_spec],
                )


def _is_named(name: str, targets: set[str]) -> bool:
    """Whether PEFT takes one of `targets` for the parameter `name`: all of it, or its end from a dot on."""
    return any(name == target or name.endswith(f".{target}") for target in targets)
