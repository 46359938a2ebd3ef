"""timed_loads: seconds of one load after the other, with the memory of each given back before the next."""

from collections.abc import Callable

import torch
from torch import nn

from bigq.benchmarks.scratch import free
from bigq.measuring.reading import Reading, read_call

__all__ = ["timed_loads"]


def timed_loads(load: Callable[[], nn.Module], device: torch.device, repeats: int) -> Reading:
    """Seconds that `load` takes on `device`; its models are dropped, which the seconds do not include."""
    seconds = []
    for _ in range(repeats):
        free(device)
        seconds.append(read_call(load, device, repeats=1, warm_ups=0).value)
    free(device)
    return Reading.of(seconds)
