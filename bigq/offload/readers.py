"""Readers: a few threads that read parts of files."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from bigq.system.interrupts import Latch
from bigq.system.machine import usable_cores

__all__ = ["Read", "Readers"]


class Read:
    """A part of a file that some thread reads: `run` does it, `wait` returns once that has ended."""

    def __init__(self, read: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._read = read
        self._ended = Latch()

    def run(self) -> None:
        """Read; an error is kept for whoever waits."""
        try:
            self._read()
        except BaseException as error:
            self.error = error
        finally:
            self._read = _nothing  # what was read into is no longer held
            self._ended.open()

    def raise_error(self) -> None:
        """Raise what went wrong, if anything did; once, so that the exception does not keep what it passed through."""
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error

    def wait(self) -> None:
        """Return when the read has ended, well or not."""
        self._ended.wait()


def _nothing() -> None:
    """Stands in for a read that has ended."""


class Readers:
    """Threads that start with the first read and end with this object; a forked process starts its own."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._pool: ThreadPoolExecutor | None = None

    def start(self, reads: Iterable[Read]) -> None:
        """Have threads run `reads`, in their order. Where this raises, some of them may be under way."""
        if self._pool is None or self._process != os.getpid():  # threads do not survive a fork
            self._process = os.getpid()
            self._pool = ThreadPoolExecutor(min(8, usable_cores()), thread_name_prefix="bigq-read")
        for read in reads:
            self._pool.submit(read.run)
