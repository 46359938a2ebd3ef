"""Time a function over rotating inputs in one CUDA graph: no launch overhead, no weight left in the 50 MB of L2."""

from collections.abc import Callable
from time import perf_counter, sleep

import torch

ROTATION_BYTES = 200e6
REST_S = 0.25


def copies(nbytes: float) -> int:
    """How many different inputs of this size flush the L2 cache between two uses of one."""
    return max(3, int(ROTATION_BYTES // nbytes) + 1)


def is_hot(m: int, n: int, k: int) -> bool:
    """Whether readings in a row of such a product meet an H100's 700 W: 612, 655 and 687 us at 4096 x 14336 x 4096."""
    return m * n * k > 2**34


def microseconds(calls: list[Callable[[], object]], repeats: int = 20, graph: bool = True, rest: bool = False) -> float:
    """Median of `readings`."""
    return readings(calls, repeats, graph, rest)[repeats // 2]


def readings(
    calls: list[Callable[[], object]], repeats: int = 20, graph: bool = True, rest: bool = False
) -> list[float]:
    """Microseconds of one call, sorted: the calls are captured in a graph in their order, or launched one by one.

    With `rest` the GPU idles for REST_S before them.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be writing the inputs
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
    sleep(REST_S if rest else 0)
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
    return sorted(times[3:])


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
