"""memory_footprint and num_parameters: the exact bytes of a model by device and kind, and how many weights it has."""

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from bigq.formats import state_name
from bigq.model.tree import ModelTree, find_owner
from bigq.offload.space import is_file_backed
from bigq.system.text import format_table
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["MemoryFootprint", "memory_footprint", "num_parameters"]

KINDS = ("packed", "scales", "kept")


@dataclass(frozen=True, kw_only=True)
class MemoryFootprint:
    """Bytes of every parameter and buffer, each counted once.

    `nbytes[device][kind]`: device is "cuda:0", "cpu", "disk" or "meta"; kind is "packed" (codes of quantized weights),
    "scales" (absmax and what else a format stores) or "kept" (everything that is not quantized).
    """

    nbytes: dict[str, dict[str, int]]

    @property
    def total_nbytes(self) -> int:
        return sum(sum(kinds.values()) for kinds in self.nbytes.values())

    def table(self) -> str:
        """One line a device, in MB (1e6 bytes), with a total."""
        rows = [(device, [kinds[kind] for kind in KINDS]) for device, kinds in self.nbytes.items()]
        rows.append(("total", [sum(column) for column in zip(*(values for _, values in rows), strict=True)]))
        cells = [(device, *(f"{value / 1e6:.3f}" for value in (*values, sum(values)))) for device, values in rows]
        return format_table([("MB", *KINDS, "all"), *cells])


def memory_footprint(model: nn.Module) -> MemoryFootprint:
    """Count the bytes of `model`'s parameters and buffers by device and kind; tied tensors once."""
    nbytes: dict[str, dict[str, int]] = {}
    tree = ModelTree(model)
    for group in tree.tensors:
        owner, leaf = find_owner(tree.modules, group.names[0])
        quantized = owner.state_spec() if isinstance(owner, QuantizedModule) else {}
        kind = "kept" if leaf not in quantized else "packed" if leaf.endswith("_packed") else "scales"
        of_device = nbytes.setdefault(_where(group.tensor), dict.fromkeys(KINDS, 0))
        of_device[kind] += group.tensor.numel() * group.tensor.element_size()
    return MemoryFootprint(nbytes=nbytes)


def num_parameters(model: nn.Module, *, only_trainable: bool = False) -> int:
    """Count the parameters of `model`, quantized weights as the numbers they stand for; tied ones once.

    What counts the tensors that a model enumerates, such as PEFT's `print_trainable_parameters`, counts packed bytes,
    scales and descriptions instead.

    Args:
        model: any PyTorch model.
        only_trainable: leave out frozen parameters, which all quantized weights are.

    Example:
        >>> num_parameters(nn.Linear(4, 3))
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


def _where(tensor: Tensor) -> str:
    return "disk" if is_file_backed(tensor) else str(tensor.device)
