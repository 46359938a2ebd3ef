"""Files: open one that is still what it was, and read its bytes into memory; write bytes to a place in one."""

import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from bigq.errors import CheckpointError

__all__ = ["FileIdentity", "open_unchanged", "read_into", "synchronize", "write_all"]


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """What tells a file from another of its name and size: where it lies, and when it was last written."""

    device: int
    inode: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "FileIdentity":
        return cls(device=found.st_dev, inode=found.st_ino, mtime_ns=found.st_mtime_ns)


def open_unchanged(path: Path, expected_nbytes: int, expected: FileIdentity | None = None) -> FileIO:
    """Open the file at `path`, which the caller closes. An object, so that no interrupt can lose the descriptor.

    Raises:
        CheckpointError: there is none, or it has not `expected_nbytes`, or it is another file than the `expected`.
    """
    try:
        file = FileIO(path)
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error}") from error
    found = os.fstat(file.fileno())
    if found.st_size != expected_nbytes:
        change = f"it had {expected_nbytes} bytes and now has {found.st_size}"
    elif expected not in (None, FileIdentity.of(found)):
        change = "it was written to, or replaced by another file of the same size"
    else:
        return file
    file.close()
    raise CheckpointError(f"{path} changed after it was opened: {change}; load again")


def read_into(buffer: memoryview, descriptor: int, offset: int) -> int:
    """Fill `buffer` from byte `offset` of a file on; returns how many bytes came, fewer only where the file ends.

    By descriptor and not through a map, where a file that is cut short meanwhile kills the process. Raises OSError.
    """
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not got:
            break
        done += got
    return done


def write_all(path: Path, descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` from byte `offset` of the file at `path` on; it grows as it must.

    Raises:
        OSError: with `path` in it, such as on a full disk.
    """
    done = 0
    try:
        while done < len(data):  # Linux writes 2 GiB at once at most
            done += os.pwrite(descriptor, data[done:], offset + done)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def synchronize(path: Path) -> None:
    """Return when the disk has the bytes of the file at `path`, so that a loss of power leaves it whole."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
