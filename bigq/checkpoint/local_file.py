"""LocalFile: the bytes of a file on this machine."""

from io import FileIO
from pathlib import Path
from threading import Lock

from bigq.checkpoint.source import ReadError
from bigq.system.files import FileIdentity, open_unchanged, read_into

__all__ = ["LocalFile"]


class LocalFile:
    """The bytes of the file at `path`, which has `nbytes` and is the one of `identity`, if that is given; a ByteSource.

    The first read opens it and checks its size; `close` closes it, and the next read opens it again. It is closed by
    whoever leaves it last: the system gives its number to the next file that is opened, and a read under way
    would return bytes of that one.
    """

    def __init__(self, path: Path, nbytes: int, identity: FileIdentity | None = None) -> None:
        self.path, self.nbytes, self.identity, self.name = path, nbytes, identity, str(path)
        self._lock = Lock()
        self._file: FileIO | None = None
        self._readers = 0
        self._is_closing = False

    def __repr__(self) -> str:
        return f"LocalFile({self.name!r}, {self.nbytes})"

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            ReadError: the system cannot read them, or the file was cut short.
            CheckpointError: the file is gone, or is not what it was.
        """
        file = self._enter()
        try:
            got = read_into(buffer, file.fileno(), offset)
        except OSError as error:
            raise ReadError(self.name, offset, str(error)) from error
        finally:
            self._leave()
        if got < len(buffer):
            raise ReadError(self.name, offset + got)

    def close(self) -> None:
        """Close the file, at once or when the reads under way have ended."""
        with self._lock:
            self._is_closing = True
            self._close_if_unused()

    def __del__(self) -> None:
        self.close()

    def _enter(self) -> FileIO:
        with self._lock:
            if self._file is None:
                self._file, self._is_closing = open_unchanged(self.path, self.nbytes, self.identity), False
            self._readers += 1
            return self._file

    def _leave(self) -> None:
        with self._lock:
            self._readers -= 1
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._is_closing and not self._readers and self._file is not None:
            self._file.close()
            self._file = None
