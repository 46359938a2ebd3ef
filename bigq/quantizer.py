"""Quantizer: quantize weights as they arrive, neighbours that look alike in one launch, a huge one in several."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

import torch
from torch import Tensor

from bigq.formats import Description, State
from bigq.plan import PlannedLinear
from bigq.stream import Piece

__all__ = ["Quantizer"]

_Item = tuple[PlannedLinear, Piece]
_COPIES = 32  # of constants at a time: a block's linears that look alike are about as many as there are blocks


class Quantizer:
    """Turns pieces of float weights into the state of QuantizedLinears, without waiting for the GPU."""

    def __init__(self) -> None:
        self._incomplete: dict[str, dict[str, Tensor]] = {}
        self._finite: list[tuple[list[str], Tensor]] = []
        self._constants: dict[tuple[Description, torch.device], dict[str, Tensor]] = {}
        self._copies: dict[tuple[Description, torch.device], list[dict[str, Tensor]]] = {}

    def quantize(self, items: Iterable[_Item]) -> Iterator[tuple[PlannedLinear, dict[str, Tensor]]]:
        """Yield (linear, state) for each weight of which all pieces have come; each tensor owns its storage.

        Args:
            items: linears and pieces of their weights, on the device that quantizes; those that follow each other and
                look alike lie side by side in memory.
        """
        for _, group in groupby(items, key=_looks):
            yield from self._quantize_alike(list(group))

    def non_finite(self, states: Mapping[str, State]) -> list[str]:
        """The names of the weights that held NaN or Inf, among `states` by source name; waits for the GPU once."""
        suspects = [name for names, flag in self._finite if not flag for name in names]
        return [name for name in suspects if not _is_finite(states[name])]

    def _quantize_alike(self, group: list[_Item]) -> Iterator[tuple[PlannedLinear, dict[str, Tensor]]]:
        linear, piece = group[0]
        stacked = linear.description.format.quantize_rows(_stacked(group))
        self._finite.append(([piece.info.name for _, piece in group], _is_finite(stacked)))
        parts: Iterable[dict[str, Tensor]] = [stacked]
        if len(group) > 1:
            counts = [piece.tensor.shape[0] for _, piece in group]
            split = {
                leaf: torch.split_with_sizes_copy(rows, counts)  # type: ignore[func-returns-value]
                for leaf, rows in stacked.items()
            }
            parts = (dict(zip(split, tensors, strict=True)) for tensors in zip(*split.values(), strict=True))
        for (linear, piece), rows in zip(group, parts, strict=True):
            whole = self._collect(linear, piece, rows)
            if whole is not None:
                description = linear.description
                own = description.format.finish(whole, description.shape)
                yield linear, {**own, **self._constants_of(description, piece.tensor.device)}

    def _collect(self, linear: PlannedLinear, piece: Piece, rows: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """`rows`, or those of all pieces so far where they are the last ones, or None."""
        total = linear.description.shape[0]
        count = next(iter(rows.values())).shape[0]
        if count == total:
            return rows
        name, stop = piece.info.name, piece.start + count
        whole = self._incomplete.setdefault(
            name, {leaf: tensor.new_empty(total, *tensor.shape[1:]) for leaf, tensor in rows.items()}
        )
        for leaf, tensor in rows.items():
            whole[leaf][piece.start : stop] = tensor
        return self._incomplete.pop(name) if stop == total else None

    def _constants_of(self, description: Description, device: torch.device) -> dict[str, Tensor]:
        """A linear's own copies of what is the same for all that look alike: one upload, and a few calls for many."""
        key = description, device
        if key not in self._constants:
            state = description.encode().to(device)
            self._constants[key] = {**description.format.constants(device), "quant_state": state}
        copies = self._copies.setdefault(key, [])
        if not copies:
            split = {
                leaf: torch.split_with_sizes_copy(tensor.repeat(_COPIES), [len(tensor)] * _COPIES)  # type: ignore[func-returns-value]
                for leaf, tensor in self._constants[key].items()
            }
            copies += (dict(zip(split, tensors, strict=True)) for tensors in zip(*split.values(), strict=True))
        return copies.pop()


def _looks(item: _Item) -> object:
    linear, piece = item
    if linear.transposed:
        return piece.info.name  # on its own
    return linear.description.format, piece.tensor.shape[1], piece.tensor.dtype


def _stacked(group: list[_Item]) -> Tensor:
    """The rows of all pieces as one matrix [R, K], without a copy."""
    linear, piece = group[0]
    rows = piece.tensor.T if linear.transposed else piece.tensor
    if len(group) > 1:
        count, columns = sum(piece.tensor.shape[0] for _, piece in group), rows.shape[1]
        rows = rows.as_strided((count, columns), (columns, 1))
    return rows.float() if rows.dtype == torch.float64 else rows  # no format has scales that fine


def _is_finite(state: State) -> Tensor:
    """Whether every scale is finite: a 0-d bool on its device."""
    flags = [tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point()]
    return torch.stack(flags).all() if len(flags) > 1 else flags[0]
