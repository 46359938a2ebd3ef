"""with_bitsandbytes: a checkpoint that bitsandbytes has quantized, under the names and in the shapes of bigq.

Codes and scales have the same bytes in both, so they stay where they are and are described anew. What bigq stores
beside them (the descriptions, and the means of double quantization) is made of the JSON of each weight.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from bigq.checkpoint.adapters import Adapter, Converted
from bigq.checkpoint.bitsandbytes_settings import BitsandbytesSettings
from bigq.checkpoint.bitsandbytes_weights import HeldWeights
from bigq.checkpoint.memory_bytes import MemoryBytes
from bigq.checkpoint.source import Source, StoredTensor, read_tensor, refuse_unknown
from bigq.checkpoint.spans import Span
from bigq.errors import CheckpointError
from bigq.formats import QUANT_STATE
from bigq.formats.bitsandbytes import is_bitsandbytes
from bigq.system.text import shortlist
from bigq.system.user_warnings import warn

__all__ = ["with_bitsandbytes"]


def with_bitsandbytes(
    source: Source,
    folder: Path,
    *,
    is_transposed: Callable[[str], bool] = lambda name: False,
    threshold: float | None = None,
) -> Source:
    """`source` with the weights that bitsandbytes has quantized as bigq stores them; itself where it holds none.

    A weight with blocks that run on into the next row cannot be stored so. It becomes a float weight of the same
    numbers, and a warning names it.

    Args:
        source: a checkpoint.
        folder: that holds it; its config.json says how products are computed.
        is_transposed: whether the model holds the weight of this name as [..., K, N].
        threshold: of outlier columns, for int8. None: what config.json says.

    Raises:
        CheckpointError: what is stored for a weight is not complete, does not fit together, or has other tables.
    """
    if not is_bitsandbytes(source.tensors):
        return source
    settings = BitsandbytesSettings.read(folder)
    held = HeldWeights(source, settings, threshold, is_transposed)
    held.refuse()
    if not held.straddling:
        return BitsandbytesWeights(source, held)
    names = shortlist(list(held.straddling), limit=3)
    warn(
        f"{len(held.straddling)} weights of {folder} are dequantized, because their rows are no multiple of their "
        f"block size: {names}",
    )
    return BitsandbytesWeights(Converted(source, list(held.straddling.values())), held)


class BitsandbytesWeights(Adapter):
    """`source` with the weights `held` as bigq stores them. What is made for them comes last."""

    is_of_bitsandbytes = True

    def __init__(self, source: Source, held: HeldWeights) -> None:
        super().__init__(source)
        self._views = held.views
        self._made = _stored(held.made())
        tensors = [
            self._views[name].stored(stored) if name in self._views else stored
            for name, stored in source.tensors.items()
            if name not in held.consumed
        ]
        tensors += self._made.values()
        by_name = {stored.name: stored for stored in tensors}
        if len(by_name) < len(tensors):
            twice = [name for name, count in Counter(stored.name for stored in tensors).items() if count > 1]
            raise CheckpointError(f"the checkpoint holds tensors of both bitsandbytes and bigq: {shortlist(twice)}")
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(by_name)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as `source` reads them, then what is made for them."""
        refuse_unknown(names, self.tensors, "the checkpoint of bitsandbytes")
        return self._read(names)

    def _read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        old_names = {view.new: old for old, view in self._views.items()}
        wanted = [old_names.get(name, name) for name in names if name not in self._made]
        for name, tensor in self._source.read(wanted):
            view = self._views.get(name)
            yield (name, tensor) if view is None else (view.new, view.of(tensor))
        made = set(names)
        yield from ((name, read_tensor(stored)) for name, stored in self._made.items() if name in made)


def _stored(made: Mapping[str, tuple[str, bytes]]) -> dict[str, StoredTensor]:
    """Descriptions of the tensors that are `made`: {name: (what errors call its place, bytes)}."""
    data = MemoryBytes("descriptions of bitsandbytes", b"".join(bits for _, bits in made.values()))
    tensors: dict[str, StoredTensor] = {}
    at = 0
    for name, (where, bits) in made.items():
        dtype = torch.uint8 if name.rpartition(".")[2] == QUANT_STATE else torch.int32
        shape, spans = torch.Size([len(bits) // dtype.itemsize]), (Span(data, at, len(bits)),)
        tensors[name] = StoredTensor(name=name, shape=shape, dtype=dtype, where=where, spans=spans)
        at += len(bits)
    return tensors
