"""Placeholders in the state of a model: one for each quantized weight, under the name that the weight has.

Every way to save the model saves them then: `save_pretrained`, `Accelerator.save_model`, `torch.save`. A weight that is
sharded has none, because what shards and gathers models (FSDP2, accelerate) takes every tensor of a state for a shard.
A slice of a weight has none either, because it is not in the state.
"""

from typing import Any

from torch import Tensor, nn

from bigq.model.tree import tensor_name
from bigq.ops.sharding import is_sharded
from bigq.system.internals import state_hooks
from bigq.weight.placeholder import placeholder
from bigq.weight.quantized_module import QuantizedModule
from bigq.weight.slices import is_sliced

__all__ = ["drop_placeholders", "hold_placeholders"]


def hold_placeholders(model: nn.Module) -> None:
    """Make `model.state_dict()` end with placeholders. However often it is called, there is one hook."""
    _, after = state_hooks(model)
    if _add not in after.values():
        model.register_state_dict_post_hook(_add)  # type: ignore[no-untyped-call]


def drop_placeholders(model: nn.Module) -> None:
    """Undo `hold_placeholders`."""
    _, after = state_hooks(model)
    for key in [key for key, hook in after.items() if hook is _add]:
        del after[key]


def _add(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """A hook, at the top of the file so that models pickle. `prefix` begins all names of `model` in `state_dict`."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            for leaf in module.descriptions:
                if not (is_sliced(module) or is_sharded(module.stored_weight(leaf).state["packed"])):
                    state_dict[prefix + tensor_name(name, leaf)] = placeholder()
