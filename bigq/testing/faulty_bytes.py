"""Sources of bytes that fail, end early, return a wrong byte or take long, to test how a load reacts."""

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
    """The bytes of another ByteSource, with faults. Several threads may read it.

    Its `path` is None, so that no code maps the file and bypasses the faults.

    Args:
        source: where the bytes come from.
        fail_at: offset of a byte. A read that includes it raises `error` and fills nothing.
        error: the exception that `fail_at` raises, the same object each time. None: a ReadError for that byte, as if
            the disk reported a fault.
        short_after: number of bytes after which the source ends, as if the file was cut short. A read beyond it gets
            the bytes before it and raises a ReadError.
        flip_at: offset of a byte of which all bits are flipped.
        delay_s: seconds by which a read is delayed.
        delay_at: offset of a byte. Only reads that include it are delayed. None: all reads.

    Attributes:
        reads: the range of bytes of each read, in the order in which the reads began.
        closes: how often `close` was called.

    Raises:
        ValueError: an offset is beyond the bytes of `source`, or an argument has no effect without another.

    Example:
        >>> import tempfile
        >>> import safetensors.torch, torch
        >>> from bigq import CheckpointError
        >>> from bigq.checkpoint import Checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file({"x": torch.zeros(8)}, f"{folder}/model.safetensors")
        ...     source = with_bytes(Checkpoint.open(folder), lambda file: FaultyBytes(file, fail_at=80))
        ...     try:
        ...         list(source.read(["x"]))
        ...     except CheckpointError as error:
        ...         print(str(error).replace(folder, "folder"))
        cannot read tensor 'x' of folder/model.safetensors: a fault that a test asked for
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
        """Fill `buffer` with the bytes from `offset` on, with the faults of this source."""
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
    """Return the tensors of `source`, read through wrapped ByteSources.

    Tensors without spans are read as `source` reads them.

    Args:
        source: a checkpoint, or any other Source. It is not changed.
        wrap: called once with each ByteSource of the spans; returns what replaces it.
    """
    return _WithBytes(source, wrap)


class _WithBytes(Adapter):
    def __init__(self, source: Source, wrap: Callable[[ByteSource], ByteSource]) -> None:
        super().__init__(source)
        self._wrapped: dict[int, ByteSource] = {}  # by the identity of the ByteSource that it replaces
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
