"""Timings: seconds and bytes of each stage of a load, added up by all of its threads."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

__all__ = ["Timings"]


class Timings:
    """`totals` maps a stage to its (seconds, bytes), in the order in which they were first seen."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, int]] = {}
        self._lock = Lock()

    def add(self, stage: str, seconds: float, nbytes: int = 0) -> None:
        with self._lock:
            before_s, before_nbytes = self.totals.get(stage, (0.0, 0))
            self.totals[stage] = before_s + seconds, before_nbytes + nbytes

    @contextmanager
    def timed(self, stage: str, nbytes: int = 0) -> Iterator[None]:
        """Add the seconds that the block takes, and `nbytes`."""
        start = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - start, nbytes)
