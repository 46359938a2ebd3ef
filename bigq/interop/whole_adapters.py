"""whole_adapters: while an adapter is merged into a sharded weight, each process has the adapter whole."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from bigq.ops.sharding import sharded_parameters

__all__ = ["whole_adapters"]


@contextmanager
def whole_adapters(layer: nn.Module, base: nn.Module) -> Iterator[None]:
    """Let `layer`, a tuner layer over the sharded module `base`, compute its change as in one process.

    A product of shards may be a sum in another order, which would give other codes. Of the sum of weight and change
    each process computes its rows. Every process that holds a part of the layer has to enter.
    """
    of_base = set(base.modules())
    shards = sharded_parameters(module for module in layer.modules() if module not in of_base)
    if not shards:
        yield
        return
    from torch.distributed.tensor.experimental import implicit_replication

    try:
        for module, name, parameter in shards:
            whole = parameter.detach().full_tensor()  # type: ignore[attr-defined]
            module._parameters[name] = nn.Parameter(whole, requires_grad=False)
        with implicit_replication():
            yield
    finally:
        for module, name, parameter in shards:
            module._parameters[name] = parameter
