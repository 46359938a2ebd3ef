"""to_the_end: run a cleaning step to its end, though an interrupt may come at any bytecode of it."""

from collections.abc import Callable

__all__ = ["to_the_end"]

_ATTEMPTS = 3


def to_the_end(step: Callable[[], None]) -> None:
    """Run `step`, and run it again if an exception ended it early; raises the first exception afterwards.

    Ctrl-C, an alarm or a timeout of a test raises wherever Python is, also in a `finally`.

    Args:
        step: has to be safe to repeat, from the start, wherever it ended.
    """
    first: BaseException | None = None
    for _ in range(_ATTEMPTS):
        try:
            step()
        except BaseException as error:
            first = first or error
        else:
            break
    if first is not None:
        raise first
