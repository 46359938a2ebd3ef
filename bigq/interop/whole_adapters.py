"""whole_adapters, on_devices_of_mesh: what a merge into a sharded weight computes with, and where."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bigq.ops.sharding import gather_shards, local_part, on_mesh, sharded_parameters

__all__ = ["on_devices_of_mesh", "whole_adapters"]


@contextmanager
def on_devices_of_mesh(base: nn.Module) -> Iterator[None]:
    """Let the shards of `base` itself that FSDP2 keeps on the CPU be on the GPUs, and write back what they are then."""
    shards = [
        (module, name, shard)
        for module, name, shard in sharded_parameters([base])
        if shard.device.type != shard.device_mesh.device_type  # type: ignore[attr-defined]
    ]
    try:
        for module, name, shard in shards:
            module._parameters[name] = nn.Parameter(on_mesh(shard.detach()), requires_grad=False)
        yield
    finally:
        with torch.no_grad():
            for module, name, shard in shards:
                now = module._parameters[name]
                module._parameters[name] = shard
                if now is not None and now is not shard:
                    local_part(shard).copy_(local_part(now))


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
            module._parameters[name] = nn.Parameter(gather_shards(parameter), requires_grad=False)
        with implicit_replication():
            yield
    finally:
        for module, name, parameter in shards:
            module._parameters[name] = parameter
