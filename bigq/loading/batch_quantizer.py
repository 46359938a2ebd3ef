"""BatchQuantizer: quantize weights as they arrive, those of one description in one launch, a huge one in several."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from bigq.formats import Description, State, encode_quant_state
from bigq.loading.runs import Piece
from bigq.planning.plan import PlannedWeight

__all__ = ["BatchQuantizer"]

_Item = tuple[PlannedWeight, Piece]
# Copies of a quant_state at a time: each call of torch's queues for Python's lock behind the reading threads.
_COPIES = 256


class BatchQuantizer:
    """Turns pieces of float weights into the state of quantized ones, without waiting for the GPU."""

    def __init__(self) -> None:
        self._incomplete: dict[str, dict[str, Tensor]] = {}
        self._largest: list[tuple[list[str], Tensor]] = []  # scale of the weights of a launch
        self._copies: dict[tuple[int, torch.device], list[Tensor]] = {}
        self._encoded: dict[tuple[int, torch.device], tuple[Mapping[str, Description], Tensor]] = {}

    def quantize(self, items: Iterable[_Item]) -> Iterator[tuple[PlannedWeight, dict[str, Tensor]]]:
        """Yield (weight, state by part) for each weight of which all pieces have come; each tensor owns its storage.

        Args:
            items: weights and pieces of them on the device that quantizes. Those that were read lie in one memory in
                the order of their addresses, and those that were decoded each in its own. Those of one Description,
                the same object, are quantized in one launch where their format allows it.
        """
        alike: dict[tuple[int, str, torch.dtype], list[_Item]] = {}
        for item in items:
            weight, piece = item  # by identity: to hash a Description takes a microsecond
            # Those of one description may be stored in different dtypes, where a config says what they stand for.
            alike.setdefault((id(weight.description), weight.method, piece.tensor.dtype), []).append(item)
        for group in alike.values():
            weight, weight_format = group[0][0], group[0][0].description.format
            # Searched weights have inputs of their own, of which a launch knows one kind.
            whole = weight_format.takes_whole(weight.method) or weight.importance is not None
            apart = whole or any(_count(item) % weight_format.row_group for item in group)
            for launch in [[item] for item in group] if apart else [group]:
                yield from self._quantize_alike(launch)

    def quant_state(self, described: Mapping[str, Description], device: torch.device) -> Tensor:
        """The quant_state of a module on `device`, in memory of its own."""
        key = id(described), device
        if key not in self._encoded:  # uploaded once
            self._encoded[key] = described, encode_quant_state(described).to(device)
        stock = self._copies.setdefault(key, [])
        if not stock:
            _, encoded = self._encoded[key]
            stock += _cut(encoded.repeat(_COPIES), [len(encoded)] * _COPIES)
        return stock.pop()

    def non_finite(self, state_of: Callable[[str], tuple[Description, State]]) -> list[str]:
        """The source names of the weights that held NaN or Inf; waits for each GPU once.

        `state_of` gives the description and the state that a weight got.
        """
        by_device: dict[torch.device, list[tuple[list[str], Tensor]]] = {}
        for names, largest in self._largest:
            by_device.setdefault(largest.device, []).append((names, largest))
        suspects: list[str] = []
        for launches in by_device.values():
            finite = torch.stack([largest for _, largest in launches]).isfinite().tolist()
            suspects += [name for (names, _), flag in zip(launches, finite, strict=True) if not flag for name in names]
        return [name for name in dict.fromkeys(suspects) if not _is_finite(*state_of(name))]

    def _quantize_alike(self, group: list[_Item]) -> Iterator[tuple[PlannedWeight, dict[str, Tensor]]]:
        weight = group[0][0]
        description, weight_format = weight.description, weight.description.format
        rows = [_rows(item) for item in group]
        counts = [len(matrix) for matrix in rows]
        stacked = _stacked(rows, sum(counts))
        measured = weight_format.measure(stacked) if weight_format.measures else None
        given = {} if weight.importance is None else {"importance": weight.importance.to(stacked.device)}
        tensors, largest = weight_format.quantize_rows(stacked, method=weight.method, measured=measured, **given)
        self._largest.append(([piece.info.name for _, piece in group], largest))
        total = prod(description.shape[:-1])
        for (planned, piece), count, own in zip(group, counts, _split(tensors, counts), strict=True):
            whole = own if count == total else self._collect(piece, count, own, total)
            if whole is not None:
                yield planned, weight_format.finish(whole, description.shape)

    def _collect(self, piece: Piece, count: int, rows: dict[str, Tensor], total: int) -> dict[str, Tensor] | None:
        """The rows of all pieces of a weight of `total` rows, if these `count` ones are its last; else None."""
        name = piece.info.name
        start = piece.start * (total // piece.info.shape[0])  # a stack of matrices comes in pieces of whole ones
        whole = self._incomplete.setdefault(
            name, {part: tensor.new_empty(total, *tensor.shape[1:]) for part, tensor in rows.items()}
        )
        for part, tensor in rows.items():
            whole[part][start : start + count] = tensor
        return self._incomplete.pop(name) if start + count == total else None


def _count(item: _Item) -> int:
    weight, piece = item
    return piece.tensor.numel() // max(1, weight.description.shape[-1])


def _rows(item: _Item) -> Tensor:
    """A piece of a weight as the matrix [R, K] of its rows."""
    weight, piece = item
    tensor = piece.tensor.mT if weight.description.transposed else piece.tensor
    return tensor if tensor.dim() == 2 else tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])


def _stacked(weights: list[Tensor], count: int) -> Tensor:
    """The rows of all weights as one matrix [count, K]; without a copy where they lie side by side in one memory."""
    first, last = weights[0], weights[-1]
    columns = first.shape[1]
    from_first_to_last = last.data_ptr() - first.data_ptr() + last.nbytes
    # Tensors of their own may be neighbours by chance: an allocator cuts them out of one range of addresses.
    in_one_memory = first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    if len(weights) == 1:
        rows = first
    elif in_one_memory and first.is_contiguous() and from_first_to_last == count * columns * first.itemsize:
        rows = first.as_strided((count, columns), (columns, 1))
    else:  # on a GPU a copy takes a hundredth of the time that the link took, and less than another launch
        rows = torch.cat(weights)
    # No format has scales as fine as float64, and kernels do not read float8.
    return rows if rows.dtype in (torch.float32, torch.float16, torch.bfloat16) else rows.float()


def _split(stacked: dict[str, Tensor], counts: list[int]) -> Iterator[dict[str, Tensor]]:
    """`stacked`, cut into `counts` rows each; every tensor owns its storage."""
    if len(counts) == 1:
        yield stacked
        return
    for tensors in zip(*(_cut(rows, counts) for rows in stacked.values()), strict=True):
        yield dict(zip(stacked, tensors, strict=True))


def _cut(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """`rows`, cut into `counts` each, every tensor in memory of its own: 5 us each; `clone` takes 14 (H100)."""
    cuts = [rows.new_empty(count, *rows.shape[1:]) for count in counts]
    torch.split_with_sizes_copy(rows, counts, out=cuts)
    return cuts


def _is_finite(description: Description, state: State) -> bool:
    """Whether every scale is finite."""
    return bool(description.format.scales(state).isfinite().all())
