"""MemoryBytes: bytes that no file holds, as a ByteSource."""

from pathlib import Path

from bigq.checkpoint.source import ReadError
from bigq.system.files import FileIdentity

__all__ = ["MemoryBytes"]


class MemoryBytes:
    """`data`, which errors call `name`; a ByteSource without a file."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.nbytes, self._data = name, len(data), data
        self.path: Path | None = None
        self.identity: FileIdentity | None = None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on. Raises ReadError if there are fewer."""
        found = self._data[offset : offset + len(buffer)]
        if len(found) < len(buffer):
            raise ReadError(self.name, offset + len(found))
        buffer[:] = found

    def close(self) -> None:
        """There is nothing to close."""
