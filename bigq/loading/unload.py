"""unloaded: a model that was loaded before, as the skeleton that it was, so that it is loaded again."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from bigq.model.transaction import restored_on_error
from bigq.model.tree import ModelTree
from bigq.offload.attach import allow_moves, detach, hooks_of
from bigq.offload.hooks import Float32Hook, PlacementHook
from bigq.weight.convert import revert
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["is_loaded", "unloaded"]

_OWN_HOOKS = (PlacementHook, Float32Hook)


def is_loaded(tree: ModelTree) -> bool:
    """Whether the model of `tree` holds quantized weights."""
    return any(isinstance(module, QuantizedModule) for module in tree.modules.values())


@contextmanager
def unloaded(tree: ModelTree) -> Iterator[None]:
    """Take the quantized weights and the hooks of a load from a model, and give them back if the block raises.

    Its quantized weights are Parameters on meta meanwhile; everything else stays, so what was offloaded stays frozen.
    The old tensors are kept until the block ends, so both take memory.
    """
    with restored_on_error(tree.modules):
        allow_moves(tree.model)
        weights: dict[int, nn.Parameter] = {}
        for module in tree.aliases:
            if any(isinstance(hook, _OWN_HOOKS) for hook in hooks_of(module)):
                detach(module, _OWN_HOOKS)
            if isinstance(module, QuantizedModule):
                revert(module, weights)
        yield
