"""Files: open one that is still what it was, and read its bytes into memory."""

import os
from pathlib import Path

from bigq.errors import CheckpointError

__all__ = ["open_unchanged", "read_into"]


def open_unchanged(path: Path, expected_nbytes: int) -> int:
    """A descriptor of the file at `path`, to be closed; raises CheckpointError unless it has `expected_nbytes`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot open {path}: {error}") from error
    found = os.fstat(descriptor).st_size
    if found != expected_nbytes:
        os.close(descriptor)
        raise CheckpointError(
            f"{path} changed after it was opened: it had {expected_nbytes} bytes and now has {found}; load again"
        )
    return descriptor


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
