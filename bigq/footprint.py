"""memory_footprint and num_parameters: the bytes of a model by device and kind, and how many parameters it has."""

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from bigq.formats import state_name
from bigq.model.tree import ModelTree, find_owner, nbytes_of
from bigq.offload.space import is_file_backed
from bigq.ops.sharding import local_part
from bigq.system.text import format_table
from bigq.weight.experts import QuantizedExperts
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["MemoryFootprint", "memory_footprint", "num_parameters"]

KINDS = ("packed", "scales", "kept")


@dataclass(frozen=True, kw_only=True)
class MemoryFootprint:
    """Bytes of the parameters and buffers of a model: what `memory_footprint` returns.

    Args:
        nbytes: {device: {kind: bytes}}. A device is "cuda:0", "cpu", "disk" or "meta". A kind is "packed" (codes of
            quantized weights), "scales" (all other tensors of quantized weights) or "kept" (tensors that are not
            quantized).
    """

    nbytes: dict[str, dict[str, int]]

    @property
    def total_nbytes(self) -> int:
        """Bytes on all devices, of all kinds."""
        return sum(sum(kinds.values()) for kinds in self.nbytes.values())

    def table(self) -> str:
        """A table as text: one line for each device, in MB (1e6 bytes), and a total."""
        rows = [(device, [kinds[kind] for kind in KINDS]) for device, kinds in self.nbytes.items()]
        rows.append(("total", [sum(column) for column in zip(*(values for _, values in rows), strict=True)]))
        cells = [(device, *(f"{value / 1e6:.3f}" for value in (*values, sum(values)))) for device, values in rows]
        return format_table([("MB", *KINDS, "all"), *cells])


def memory_footprint(model: nn.Module) -> MemoryFootprint:
    """Count the bytes of a model's parameters and buffers, by device and kind. Tied tensors count once.

    Of a sharded model, such as one of FSDP2, only what this process holds counts. Experts in a cache (`cache_experts`)
    count beside those in host memory.

    Args:
        model: any PyTorch model. It is not changed.

    Example:
        >>> import bigq, torch
        >>> print(bigq.memory_footprint(torch.nn.Linear(1000, 1000)).table())
        MB     packed  scales   kept    all
        cpu     0.000   0.000  4.004  4.004
        total   0.000   0.000  4.004  4.004
    """
    nbytes: dict[str, dict[str, int]] = {}
    tree = ModelTree(model)
    for group in tree.tensors:
        owner, leaf = find_owner(tree.modules, group.names[0])
        of_device = nbytes.setdefault(_where(group.tensor), dict.fromkeys(KINDS, 0))
        of_device[_kind(owner, leaf)] += nbytes_of(local_part(group.tensor))
    for module in dict.fromkeys(tree.modules.values()):
        cache = module.expert_cache if isinstance(module, QuantizedExperts) else None
        if cache is not None:
            for leaf, tensor in cache.tensors.items():
                of_device = nbytes.setdefault(str(tensor.device), dict.fromkeys(KINDS, 0))
                of_device[_kind(module, leaf)] += tensor.nbytes
    return MemoryFootprint(nbytes=nbytes)


def num_parameters(model: nn.Module, *, only_trainable: bool = False) -> int:
    """Count the parameters of a model, each quantized weight as its original number of elements. Tied ones count once.

    Functions that count the tensors of a model, such as PEFT's `print_trainable_parameters`, count the packed bytes,
    scales and descriptions of quantized weights instead.

    Args:
        model: any PyTorch model. It is not changed.
        only_trainable: count only parameters that require a gradient, which quantized weights never do.

    Example:
        >>> import bigq, torch
        >>> bigq.num_parameters(torch.nn.Linear(4, 3))
        15
    """
    total, tree = 0, ModelTree(model)
    for group in tree.tensors:
        owner, leaf = find_owner(tree.modules, group.names[0])
        if group.is_buffer or (only_trainable and not group.tensor.requires_grad):
            continue
        if isinstance(owner, QuantizedModule) and leaf in owner.state_spec():
            sizes = {state_name(name, "packed"): d.shape for name, d in owner.descriptions.items()}
            total += prod(sizes.get(leaf, (0,)))
        else:
            total += group.tensor.numel()
    return total


def _kind(owner: nn.Module, leaf: str) -> str:
    if not isinstance(owner, QuantizedModule) or leaf not in owner.state_spec():
        return "kept"
    return "packed" if leaf.endswith("_packed") else "scales"


def _where(tensor: Tensor) -> str:
    return "disk" if is_file_backed(local_part(tensor)) else str(tensor.device)
