"""Time a function over rotating inputs in one CUDA graph: no launch overhead, no weight left in the 50 MB of L2."""

from collections.abc import Callable

import torch

ROTATION_BYTES = 200e6


def copies(nbytes: float) -> int:
    """How many different inputs of this size flush the L2 cache between two uses of one."""
    return max(3, int(ROTATION_BYTES // nbytes) + 1)


def microseconds(calls: list[Callable[[], object]], repeats: int = 20) -> float:
    """Median time of one call, the calls captured in a graph in their order."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return sorted(times[3:])[repeats // 2]
