"""gathered: a sharded model with whole tensors in host memory, on the one process that writes it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from bigq.ops.sharding import gather_shards, sharded_parameters

__all__ = ["gathered"]


@contextmanager
def gathered(model: nn.Module) -> Iterator[bool]:
    """Whether this process is to write `model`. Meanwhile it holds the sharded tensors of the model whole.

    Every process that holds a part of the model has to enter and leave. A tensor at a time is gathered, on the device.
    All leave together, also where the host memory of the writing process does not hold the model: that raises there. A
    model without shards is written by every process that asks.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()  # a call leaves the root whole, and torch makes it shards again for a state dict
    shards = sharded_parameters(model.modules())
    if not shards:
        yield True
        return
    from torch.distributed import barrier

    mesh = shards[0][2].device_mesh  # type: ignore[attr-defined]
    writes = not any(mesh.get_coordinate())
    whole: dict[int, nn.Parameter] = {}
    failure: Exception | None = None
    try:
        for module, name, parameter in shards:
            if id(parameter) not in whole:  # tied ones stay tied
                tensor, whole[id(parameter)] = gather_shards(parameter), parameter
                if writes and failure is None:
                    try:
                        whole[id(parameter)] = nn.Parameter(tensor.cpu(), requires_grad=False)
                    except Exception as error:  # raised when all is gathered: the other processes wait for this one
                        failure = error
            module._parameters[name] = whole[id(parameter)]
        if failure is not None:
            raise failure
        yield writes
    finally:
        for module, name, parameter in shards:
            module._parameters[name] = parameter
        for group in mesh.get_all_groups():
            barrier(group)
