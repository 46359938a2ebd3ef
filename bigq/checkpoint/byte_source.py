"""ByteSource: bytes at any offset, for several threads: a file, or what stands for one."""

from pathlib import Path
from typing import Protocol

from bigq.system.files import FileIdentity

__all__ = ["ByteSource"]


class ByteSource(Protocol):
    """Bytes that several threads may read at once, at any offset: a file, or what stands for one."""

    @property
    def name(self) -> str:
        """What errors call it."""

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""

    @property
    def path(self) -> Path | None:
        """The local file that holds exactly these bytes and may be memory-mapped instead; None if there is none."""

    @property
    def identity(self) -> FileIdentity | None:
        """What tells the file at `path` from one that has replaced it; None if that is not known."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill all of `buffer` with the bytes from `offset` on; opens what it needs.

        Raises:
            ReadError: bytes cannot be read, or it ends before the buffer is full.
            CheckpointError: it cannot be opened, or is not what it was.
        """

    def close(self) -> None:
        """Let go of what is open. Reads that are under way end well, and a later one opens it again."""
