"""Time a function over rotating inputs in one CUDA graph: no launch overhead, no weight left in the 50 MB of L2."""

from collections.abc import Callable
from time import perf_counter

import torch

ROTATION_BYTES = 200e6


def copies(nbytes: float) -> int:
    """How many different inputs of this size flush the L2 cache between two uses of one."""
    return max(3, int(ROTATION_BYTES // nbytes) + 1)


def microseconds(calls: list[Callable[[], object]], repeats: int = 20, graph: bool = True) -> float:
    """Median time of one call, the calls captured in a graph in their order, or launched one by one."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph() if graph else None
    if captured is not None:
        with torch.cuda.graph(captured):
            for call in calls:
                call()
    times: list[float] = []
    for _ in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        if captured is not None:
            captured.replay()
        else:
            for call in calls:
                call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return sorted(times[3:])[repeats // 2]


def host_microseconds(call: Callable[[], object], repeats: int = 1000) -> float:
    """Host time of one eager call, the GPU never waited for."""
    call()
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(repeats):
        call()
    stop = perf_counter()
    torch.cuda.synchronize()
    return (stop - start) * 1e6 / repeats
