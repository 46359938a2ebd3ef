"""Readers: a few threads that read parts of files."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from weakref import finalize

from bigq.system.interrupts import Latch, Worker
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
    """Threads that start with the first read and end with this object; a forked process starts its own.

    No executor of the standard library: its semaphore is Python code, which an interrupt can leave locked for good.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process, self._threads, self._most = os.getpid(), 0, 0
        self._queue: SimpleQueue[Read | None] = SimpleQueue()
        finalize(self, self._queue.put, None).atexit = False

    def start(self, reads: Sequence[Read]) -> None:
        """Have threads run `reads`, in their order. Where this raises, some of them may be under way.

        Raises:
            RuntimeError: the system has no thread left, and none runs yet.
        """
        if not reads:
            return
        if self._process != os.getpid():  # threads do not survive a fork
            self._begin()
        self._most = self._most or min(8, usable_cores())  # asked once: it reads files for 300 us (host of an H200)
        while self._threads < self._most:
            try:
                Worker(partial(_work, self._queue)).start()
            except RuntimeError:
                if not self._threads:
                    raise
                break  # those that run do all of it
            self._threads += 1
        for read in reads:
            self._queue.put(read)


def _work(queue: "SimpleQueue[Read | None]") -> None:
    while (read := queue.get()) is not None:
        read.run()
        del read  # an idle thread would keep its file open
    queue.put(None)  # for the next thread
