"""memory_footprint: the exact bytes of a model, by device and by kind."""

from dataclasses import dataclass

from torch import Tensor, nn

from bigq.linear import QuantizedLinear
from bigq.model_tensors import ModelTree, find_owner
from bigq.offload import is_file_backed
from bigq.table import format_table

__all__ = ["MemoryFootprint", "memory_footprint"]

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
        quantized = owner.state_spec() if isinstance(owner, QuantizedLinear) else {}
        kind = "kept" if leaf not in quantized else "packed" if leaf == "weight" else "scales"
        of_device = nbytes.setdefault(_where(group.tensor), dict.fromkeys(KINDS, 0))
        of_device[kind] += group.tensor.numel() * group.tensor.element_size()
    return MemoryFootprint(nbytes=nbytes)


def _where(tensor: Tensor) -> str:
    return "disk" if is_file_backed(tensor) else str(tensor.device)
