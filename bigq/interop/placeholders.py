"""Placeholders: empty tensors under the names of quantized weights, in what `save_pretrained` saves.

A transformers without bigq takes no notice of a `quantization_config` that it does not know but a warning, and
initializes weights that it does not find at random. A weight of a wrong shape makes it raise.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bigq.model.tree import tensor_name
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["is_placeholder", "with_placeholders"]

_SHAPE, _DTYPE = (0,), torch.uint8


def with_placeholders(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` with a placeholder for each quantized weight of `model`."""
    found = dict(state_dict)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            found |= {tensor_name(name, leaf): torch.empty(_SHAPE, dtype=_DTYPE) for leaf in module.descriptions}
    return found


def is_placeholder(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a tensor of this shape and dtype stands for a quantized weight, in a checkpoint that holds some."""
    return tuple(shape) == _SHAPE and dtype == _DTYPE
