"""Testing: sources of bytes that fail, lie or take long, to test what a load does then.

    from bigq.checkpoint import Checkpoint
from bigq.system.files import FileIdentity
    from bigq.testing import FaultyBytes, with_bytes

    source = with_bytes(Checkpoint.open(path), lambda file: FaultyBytes(file, fail_at=4096))

`source` holds the tensors of the checkpoint, and whoever reads byte 4096 of one of its files gets an error.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from bigq.checkpoint import Adapter, ByteSource, ReadError, Source, StoredTensor, read_tensor, refuse_unknown
from bigq.system.files import FileIdentity

__all__ = ["FaultyBytes", "with_bytes"]


class FaultyBytes:
    """The bytes of `source` with faults; a ByteSource for any number of threads.

    It has no `path`, so nothing maps the file and reads around it. `reads` lists the bytes that each read asked for, in
    the order in which the reads began; `closes` counts the calls of `close`.

    Args:
        source: where the bytes come from.
        fail_at: a read that includes this byte raises `error` and fills nothing.
        error: what `fail_at` raises, this very object each time; by default a ReadError of that byte, as where a disk
            reports a fault.
        short_after: the bytes end after so many, as those of a file that was cut short: a read beyond gets what there
            is, and a ReadError.
        flip_at: all bits of this byte are flipped.
        delay_s: seconds that a read takes longer.
        delay_at: only reads that include this byte are delayed; by default all are.

    Raises:
        ValueError: an offset is not one of a byte of `source`, or an argument has no effect without another.
    """

    def __init__(
        self,
        source: ByteSource,
        *,
        fail_at: int | None = None,
        error: BaseException | None = None,
        short_after: int | None = None,
        flip_at: int | None = None,
        delay_s: float = 0.0,
        delay_at: int | None = None,
    ) -> None:
        offsets = {"fail_at": fail_at, "short_after": short_after, "flip_at": flip_at, "delay_at": delay_at}
        for name, offset in offsets.items():
            if offset is not None and not 0 <= offset < source.nbytes:
                raise ValueError(f"{name} is {offset}, but {source.name} has {source.nbytes} bytes")
        if error is not None and fail_at is None:
            raise ValueError("error is given without fail_at, the byte at which to raise it")
        if delay_at is not None and not delay_s:
            raise ValueError("delay_at is given without delay_s, for how long")
        self.source, self.name, self.nbytes = source, source.name, source.nbytes
        self.path: Path | None = None
        self.identity: FileIdentity | None = None
        self.fail_at, self.error, self.short_after, self.flip_at = fail_at, error, short_after, flip_at
        self.delay_s, self.delay_at = delay_s, delay_at
        self.reads: list[range] = []
        self.closes = 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on, with the faults that were asked for."""
        asked = range(offset, offset + len(buffer))
        self.reads.append(asked)
        if self.delay_s and (self.delay_at is None or self.delay_at in asked):
            time.sleep(self.delay_s)
        if self.fail_at is not None and self.fail_at in asked:
            raise self.error or ReadError(self.name, self.fail_at, "a fault that a test asked for")
        if self.short_after is not None and asked.stop > self.short_after:
            got = max(0, self.short_after - offset)
            self.source.read_into(buffer[:got], offset)
            raise ReadError(self.name, offset + got)
        self.source.read_into(buffer, offset)
        if self.flip_at is not None and self.flip_at in asked:
            buffer[self.flip_at - offset] ^= 0xFF

    def close(self) -> None:
        """Close `source`; a later read opens it again."""
        self.closes += 1
        self.source.close()


def with_bytes(source: Source, wrap: Callable[[ByteSource], ByteSource]) -> Source:
    """`source` with other bytes: `wrap` is called once for each ByteSource that a span lies in, and replaces it.

    Tensors that have spans are read through them, also by `read`; the others as `source` reads them. `source` itself is
    left as it is.
    """
    return _WithBytes(source, wrap)


class _WithBytes(Adapter):
    def __init__(self, source: Source, wrap: Callable[[ByteSource], ByteSource]) -> None:
        super().__init__(source)
        self._wrapped: dict[int, ByteSource] = {}  # by the identity of what it stands for
        tensors: dict[str, StoredTensor] = {}
        for name, stored in source.tensors.items():
            for span in stored.spans:
                if id(span.source) not in self._wrapped:
                    self._wrapped[id(span.source)] = wrap(span.source)
            spans = tuple(span._replace(source=self._wrapped[id(span.source)]) for span in stored.spans)
            tensors[name] = replace(stored, spans=spans)
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        refuse_unknown(names, self.tensors, "the source with other bytes")
        wanted = set(names)
        return self._read([stored for name, stored in self.tensors.items() if name in wanted])

    def _read(self, wanted: list[StoredTensor]) -> Iterator[tuple[str, Tensor]]:
        try:
            for has_spans, group in groupby(wanted, key=lambda stored: bool(stored.spans)):
                if has_spans:
                    for stored in group:
                        yield stored.name, read_tensor(stored)
                else:
                    yield from self._source.read([stored.name for stored in group])
        finally:
            for wrapped in self._wrapped.values():
                wrapped.close()
