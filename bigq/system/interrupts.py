"""Waiting and cleaning up where an interrupt may come at any bytecode.

Ctrl-C, an alarm or a timeout of a test raises wherever Python is, also in a `finally`. Events, conditions and threads
of the standard library keep locks in Python code, which an interrupt can leave locked for good. Here every wait is one
`with` of a lock, which CPython enters and leaves without a point where an interrupt is raised.

CPython raises an interrupt as a Python function is entered, after a call, and where a loop jumps back. So no function
can catch the one that is raised as it is entered, not even `to_the_end`. What has to be done at the end is called once
in the caller's own `try`, and `to_the_end` does it again where that was cut short:

    try:
        step()
    except BaseException:
        to_the_end(step)
        raise
"""

import _thread
from collections.abc import Callable
from threading import Lock

__all__ = ["Latch", "Worker", "to_the_end"]

_ATTEMPTS = 3


def to_the_end(step: Callable[[], None]) -> None:
    """Run `step`, and run it again if an exception ended it early; raises the first exception afterwards.

    An interrupt may come before the first of its own steps: see the head of this file for what its callers do.

    Args:
        step: has to be safe to repeat, from its start, wherever it ended.
    """
    first: BaseException | None = None
    for _ in range(_ATTEMPTS):
        try:
            step()
        except BaseException as error:
            first = first or error
        else:
            break
    try:
        if first is not None:
            raise first
    finally:
        del first  # an exception that its own frame refers to would keep all frames until they are collected


class Latch:
    """Something that happens once: `open` says that it has, `wait` returns when it has."""

    def __init__(self) -> None:
        self._closed = Lock()
        self._closed.acquire()

    @property
    def is_open(self) -> bool:
        return not self._closed.locked()

    def open(self) -> None:
        self._closed.release()

    def wait(self) -> None:
        with self._closed:
            pass


class Worker:
    """A thread that runs `work`, which has to handle its own errors."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._ended = Latch()
        self._is_started = False

    def start(self) -> None:
        """Raises RuntimeError where the system has no thread left."""
        self._is_started = True  # before it is, because an interrupt is raised as the call returns, and not before it
        try:
            _thread.start_new_thread(self._run, ())
        except RuntimeError:
            self._is_started = False
            raise

    def join(self) -> None:
        """Return when the thread has ended; at once if it was not started."""
        if self._is_started:
            self._ended.wait()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._ended.open()
