"""RemoteFile: the bytes of a file on the Hub, read by ranges, so that a header is read without the weights."""

from bisect import bisect_right
from threading import Lock
from typing import IO

from bigq.checkpoint.choose import SAFETENSORS_SUFFIX, has_suffix
from bigq.checkpoint.hub import Repository, open_file
from bigq.checkpoint.safetensors_file import MAX_HEADER_NBYTES, describe_header
from bigq.checkpoint.source import ReadError, StoredTensor
from bigq.errors import CheckpointError

__all__ = ["RemoteFile"]

_AHEAD_NBYTES = 64 << 10  # the small tensors that describe weights of bitsandbytes lie side by side


class RemoteFile:
    """The bytes of the file `file` of a Hub repository; a ByteSource. Reads are requests, one at a time."""

    path = None
    identity = None

    def __init__(self, repository: Repository, file: str) -> None:
        if not has_suffix(file, SAFETENSORS_SUFFIX):
            raise CheckpointError(
                f"{file} of {repository} is no safetensors file, so what it holds cannot be read without all of it: "
                "download it, and pass its path"
            )
        self._repository, self._file = repository, file
        self.name = f"{file} of {repository}"
        self._lock = Lock()
        self._handle: IO[bytes] = open_file(repository, file)
        self.nbytes: int = self._handle.size  # type: ignore[attr-defined]
        self._starts: list[int] = []  # of what was read, in order
        self._read: list[bytes] = []

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            ReadError: the Hub does not give them.
        """
        with self._lock:
            place = bisect_right(self._starts, offset) - 1
            start, data = (self._starts[place], self._read[place]) if place >= 0 else (0, b"")
            if offset + len(buffer) > start + len(data):
                start, data = offset, self._request(offset, max(len(buffer), _AHEAD_NBYTES))
                if len(data) <= _AHEAD_NBYTES:  # a plan may ask again; a header it does not
                    self._starts.insert(place + 1, start)
                    self._read.insert(place + 1, data)
        found = data[offset - start : offset - start + len(buffer)]
        if len(found) < len(buffer):
            raise ReadError(self.name, offset + len(found))
        buffer[:] = found

    def close(self) -> None:
        """Nothing stays open between requests."""

    def describe(self) -> list[StoredTensor]:
        """Describe the tensors of the file in the order of their bytes, as SafetensorsFile does of a local one.

        Raises:
            CheckpointError: the header is damaged, or does not describe as many bytes as the file has.
        """
        length = bytearray(8)
        if self.nbytes >= len(length):
            self.read_into(memoryview(length), 0)
        size = int.from_bytes(length, "little")
        if not 2 <= size <= min(MAX_HEADER_NBYTES, self.nbytes - 8):
            raise CheckpointError(f"{self.name} has {self.nbytes} bytes, and no header of safetensors: it is damaged")
        header = bytearray(size)
        self.read_into(memoryview(header), 8)
        try:
            return describe_header(bytes(header), self, 8 + size)
        except ValueError as error:  # a CheckpointError is one
            raise CheckpointError(f"cannot open {self.name}: {error}") from error

    def _request(self, offset: int, nbytes: int) -> bytes:
        try:
            self._handle.seek(offset)
            return self._handle.read(min(nbytes, self.nbytes - offset))
        except Exception as error:  # by version, those of huggingface_hub's HTTP client
            raise ReadError(self.name, offset, f"{type(error).__name__}: {error}") from error
