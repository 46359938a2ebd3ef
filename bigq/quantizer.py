"""Quantizer: quantize weights as they arrive, those that look alike in one launch, a huge one in several."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from bigq.formats import Description, State
from bigq.plan import PlannedLinear
from bigq.runs import Piece

__all__ = ["Quantizer"]

_Item = tuple[PlannedLinear, Piece]
# Constants at a time, or those of a launch: each call of torch's queues for Python's lock behind the reading threads.
_COPIES = 32


class Quantizer:
    """Turns pieces of float weights into the state of QuantizedLinears, without waiting for the GPU."""

    def __init__(self) -> None:
        self._incomplete: dict[str, dict[str, Tensor]] = {}
        self._largest: list[tuple[list[str], Tensor]] = []  # scale of the weights of a launch
        self._constants: dict[tuple[Description, torch.device], dict[str, Tensor]] = {}
        self._copies: dict[tuple[Description, torch.device], list[dict[str, Tensor]]] = {}

    def quantize(self, items: Iterable[_Item]) -> Iterator[tuple[PlannedLinear, dict[str, Tensor]]]:
        """Yield (linear, state) for each weight of which all pieces have come; each tensor owns its storage.

        Args:
            items: linears and pieces of their weights, in one memory in the order of their addresses, on the device
                that quantizes. Those of one Description, the same object, are quantized in one launch.
        """
        alike: dict[tuple[int, bool], list[_Item]] = {}
        for item in items:
            linear, _ = item  # by identity: to hash a Description takes a microsecond
            alike.setdefault((id(linear.description), linear.transposed), []).append(item)
        for group in alike.values():
            yield from self._quantize_alike(group)

    def non_finite(self, states: Mapping[str, State]) -> list[str]:
        """The names of the weights that held NaN or Inf, among `states` by source name; waits for each GPU once."""
        by_device: dict[torch.device, list[tuple[list[str], Tensor]]] = {}
        for names, largest in self._largest:
            by_device.setdefault(largest.device, []).append((names, largest))
        suspects: list[str] = []
        for launches in by_device.values():
            finite = torch.stack([largest for _, largest in launches]).isfinite().tolist()
            suspects += [name for (names, _), flag in zip(launches, finite, strict=True) if not flag for name in names]
        return [name for name in suspects if not _is_finite(states[name])]

    def _quantize_alike(self, group: list[_Item]) -> Iterator[tuple[PlannedLinear, dict[str, Tensor]]]:
        description, transposed = group[0][0].description, group[0][0].transposed
        weight_format, shape = description.format, description.shape
        weights = [piece.tensor.T if transposed else piece.tensor for _, piece in group]
        counts = [weight.shape[0] for weight in weights]
        stacked = weight_format.quantize_rows(_stacked(weights, sum(counts)))
        names = [piece.info.name for _, piece in group]
        scales = (rows for rows in stacked.values() if rows.is_floating_point() and rows.numel())
        self._largest += ((names, rows.amax()) for rows in scales)  # NaN or Inf if a weight held either
        constants = self._copies_of(description, weights[0].device, len(group))
        for (linear, piece), count, rows in zip(group, counts, _split(stacked, counts), strict=True):
            whole = rows if count == shape[0] else self._collect(piece, count, rows, shape[0])
            if whole is not None:
                yield linear, {**weight_format.finish(whole, shape), **constants.pop()}

    def _collect(self, piece: Piece, count: int, rows: dict[str, Tensor], total: int) -> dict[str, Tensor] | None:
        """The rows of all pieces of a weight of `total` rows, if these `count` ones are its last; else None."""
        name, stop = piece.info.name, piece.start + count
        whole = self._incomplete.setdefault(
            name, {leaf: tensor.new_empty(total, *tensor.shape[1:]) for leaf, tensor in rows.items()}
        )
        for leaf, tensor in rows.items():
            whole[leaf][piece.start : stop] = tensor
        return self._incomplete.pop(name) if stop == total else None

    def _copies_of(self, description: Description, device: torch.device, count: int) -> list[dict[str, Tensor]]:
        """A stock of what is the same for all weights of `description`, each in memory of its own, `count` or more."""
        key = description, device
        if key not in self._constants:  # uploaded once
            state = description.encode().to(device)
            self._constants[key] = {**description.format.constants(device), "quant_state": state}
        constants, stock = self._constants[key], self._copies.setdefault(key, [])
        if len(stock) < count:
            more = max(count, _COPIES)
            copies = [_cut(tensor.repeat(more), [len(tensor)] * more) for tensor in constants.values()]
            stock += (dict(zip(constants, tensors, strict=True)) for tensors in zip(*copies, strict=True))
        return stock


def _stacked(weights: list[Tensor], count: int) -> Tensor:
    """The rows of all weights as one matrix [count, K]; without a copy where they lie side by side in memory."""
    first, last = weights[0], weights[-1]
    columns = first.shape[1]
    from_first_to_last = last.data_ptr() - first.data_ptr() + last.nbytes
    if len(weights) == 1:
        rows = first
    elif first.is_contiguous() and from_first_to_last == count * columns * first.itemsize:
        rows = first.as_strided((count, columns), (columns, 1))
    else:  # on a GPU a copy takes a hundredth of the time that the link took, and less than another launch
        rows = torch.cat(weights)
    return rows.float() if rows.dtype == torch.float64 else rows  # no format has scales that fine


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


def _is_finite(state: State) -> Tensor:
    """Whether every scale is finite: a 0-d bool on its device."""
    flags = [tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point()]
    return torch.stack(flags).all() if len(flags) > 1 else flags[0]
