"""shard_rows: a load for tensor or expert parallelism in which no process holds the whole model."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bigq.formats import state_name
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["gather_rows", "shard_rows"]

_HAS_ROWS = "_bigq_has_rows"  # set on a module by `shard_rows`


def shard_rows(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Leave each process some rows of each quantized weight, until `parallelize_module` cuts it as the plan says.

    For `load_and_quantize_model(..., mesh=mesh, shard=lambda model: shard_rows(model, mesh))`: each process reads and
    quantizes its part of a checkpoint. bigq's `parallelize_module` has to follow, with the same mesh; it gathers one
    weight at a time, also what its plan leaves out.

    Args:
        model: changed, on the meta device.
        mesh: of one dimension.

    Returns:
        `model`.
    """
    shards: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            for leaf, description in module.descriptions.items():
                for part in description.state_spec:
                    whole = module._parameters[state_name(leaf, part)]
                    if whole is None or whole.dim() < len(description.shape):
                        continue  # the second level of scales, which is that of all rows
                    rows = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
                    shards.setdefault(id(whole), nn.Parameter(rows, requires_grad=False))
                    module._parameters[state_name(leaf, part)] = shards[id(whole)]
            vars(module)[_HAS_ROWS] = True
    return model


def gather_rows(module: nn.Module) -> None:
    """Undo `shard_rows` for a module: every process gets its whole weights. Does nothing for other modules."""
    if vars(module).pop(_HAS_ROWS, False):
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                module._parameters[name] = nn.Parameter(parameter.full_tensor(), requires_grad=False)
