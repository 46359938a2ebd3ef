"""RowWindows: a source of which only some rows of each tensor are seen, and read."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from bigq.checkpoint.adapters import Adapter
from bigq.checkpoint.source import Source, StoredTensor, refuse_unknown
from bigq.checkpoint.spans import cut_out
from bigq.errors import CheckpointError

__all__ = ["RowWindows", "Rows"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The entries of the first dimension of a tensor from `start` on, up to `stop`."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of `tensor`, as a view."""
        return tensor[self.start : self.stop]


class RowWindows(Adapter):
    """`source` with `rows` of the tensors that it names in place of the whole ones; others stay as they are.

    The bytes of rows lie side by side, so the spans of a tensor are cut, and no other byte is read. Raises
    CheckpointError where `source` does not hold a name, or a tensor does not have these rows.
    """

    def __init__(self, source: Source, rows: Mapping[str, Rows]) -> None:
        super().__init__(source)
        refuse_unknown(rows, source.tensors, "the source to take rows of")
        self._rows = {name: window for name, window in rows.items() if len(window) < source.tensors[name].shape[0]}
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(
            {
                name: _cut(stored, self._rows[name]) if name in self._rows else stored
                for name, stored in source.tensors.items()
            }
        )

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, rows) as `source` reads the tensors; first those of which there are no rows, without reading."""
        refuse_unknown(names, self.tensors, "the source of rows")
        empty = [name for name in names if name in self._rows and not len(self._rows[name])]
        for name in empty:
            yield name, torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype)
        for name, tensor in self._source.read([name for name in names if name not in empty]):
            yield name, self._rows[name].of(tensor) if name in self._rows else tensor


def _cut(stored: StoredTensor, rows: Rows) -> StoredTensor:
    if not 0 <= rows.start <= rows.stop <= stored.shape[0]:
        raise CheckpointError(
            f"tensor {stored.name!r} of {stored.where} has {stored.shape[0]} rows; expected rows {rows.start} to "
            f"{rows.stop} of it"
        )
    row_nbytes = stored.nbytes // stored.shape[0]
    spans = cut_out(stored.spans, rows.start * row_nbytes, len(rows) * row_nbytes)
    coding = None if stored.coding is None else stored.coding.window(rows.start, rows.stop)
    return replace(stored, shape=torch.Size([len(rows), *stored.shape[1:]]), spans=spans, coding=coding)
