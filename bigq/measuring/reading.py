"""Reading: how long a call takes on a device, and how far its repetitions lie apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

__all__ = ["Reading", "read_call", "synchronize"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The median of repeated measurements.

    Args:
        value: the median, in the unit of the measurements.
        spread: half the distance of the quartiles, as a part of the median; None for a single measurement.
    """

    value: float
    spread: float | None = None

    @staticmethod
    def of(values: Sequence[float], factor: float = 1.0) -> "Reading":
        """The reading of one or several measurements, each multiplied by `factor`."""
        ordered = sorted(values)
        last = len(ordered) - 1
        median = (ordered[last // 2] + ordered[-(-last // 2)]) / 2
        if not last:
            return Reading(value=median * factor)
        low, high = ordered[round(last / 4)], ordered[round(3 * last / 4)]
        return Reading(value=median * factor, spread=(high - low) / 2 / median if median else 0.0)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given; the CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_call(
    call: Callable[[], object], device: torch.device, *, repeats: int, warm_ups: int = 1, factor: float = 1.0
) -> Reading:
    """Seconds that `call` takes on `device` until its work is done, times `factor`.

    Args:
        call: what is measured; its result is dropped.
        device: is waited for before and after each call.
        repeats: how often it is measured.
        warm_ups: calls before that, which are not measured.
        factor: 1e6 for microseconds.
    """
    times = []
    for number in range(warm_ups + repeats):
        synchronize(device)
        start = perf_counter()
        call()
        synchronize(device)
        if number >= warm_ups:
            times.append(perf_counter() - start)
    return Reading.of(times, factor)
