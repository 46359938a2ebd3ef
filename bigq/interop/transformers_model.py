"""introduce: the attributes by which transformers knows that one of its models is quantized."""

import sys
from copy import copy
from typing import Any

from torch import nn

from bigq.model.placeholders import hold_placeholders

__all__ = ["introduce", "is_transformers_model"]

_SINCE = (5, 17)  # the first release of transformers whose quantizers are known here


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is one of transformers, which is not imported for it."""
    return isinstance(model, _base_classes())


def introduce(model: nn.Module, config: Any) -> None:
    """Tell transformers that `model`, if it is one of its models, is quantized as `config`, a QuantizationConfig, says.

    `save_pretrained` then writes `quantization_config` into config.json, Trainer refuses to train the model without
    adapters, and `model.dequantize()` works. Saved tensors have the names of the model, because transformers converts
    none that it does not know. The state of each transformers model in `model` holds placeholders.
    """
    bases = _base_classes()
    for module in model.modules() if bases else ():
        if isinstance(module, bases):
            hold_placeholders(module)
    if not is_transformers_model(model) or _release() < _SINCE:
        return
    from bigq.interop.hf_quantizer import HfQuantizer

    known: Any = model
    known.quantization_method = config.quant_method  # to ask for it registers bigq with transformers
    known.hf_quantizer = HfQuantizer(config, pre_quantized=True)
    known.is_quantized = True
    known.add_model_tags(["bigq"])  # of the page on the Hub
    known._weight_conversions = []
    own = known.config
    described = copy(own)  # its owner may build other models with it
    described.quantization_config = config
    described._is_quantized = True  # as from_pretrained leaves it: Jamba then calls a linear that it would read
    if getattr(described, "dtype", None) is None:  # flash attention takes it where it would read that of a linear
        described.dtype = known.dtype
    for module in model.modules():  # they share it, so that a change of it holds for all
        if vars(module).get("config") is own:
            vars(module)["config"] = described


def _base_classes() -> tuple[type[nn.Module], ...]:
    """PreTrainedModel, or nothing where transformers is not imported."""
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    return () if kind is None else (kind,)


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in sys.modules["transformers"].__version__.split(".")[:2])
