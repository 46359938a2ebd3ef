"""JSON lines, deadlines and times."""

import json
import signal
import sys
import time
import traceback
from contextlib import contextmanager

import torch

START = time.time()


def short(value):
    return (
        f"{value:.4g}" if isinstance(value, float) else str(value).replace("transformers ", "").replace("'", "")[:400]
    )


class Report:
    def __init__(self, path, seconds):
        self.file, self.until = open(path, "a") if path else None, START + seconds

    def __call__(self, **what):
        line = json.dumps(what | {"at_s": round(time.time() - START, 1)})
        if not self.file:
            print(line, flush=True)
            return
        self.file.write(line + "\n")
        self.file.flush()
        if "part_s" not in what and what.get("row") != "machine":
            print(*(short(value) for key, value in what.items() if key not in ("unit", "n", "traceback")), flush=True)

    def left(self):
        return self.until - time.time()

    @contextmanager
    def part(self, needs, limit=None, **what):
        """Skip where fewer than `needs` seconds are left, stop after `limit`, report an error and go on."""
        if self.left() < needs:
            self(**what, skipped=f"{self.left():.0f} s left, needs {needs}")
            yield False
            return

        def stop(*_):
            raise TimeoutError(f"more than {limit} s")

        begin = time.time()
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(int(max(1, min(limit or 600, self.left() + 5))))
        try:
            yield True
        except Exception as error:
            signal.alarm(0)
            self(**what, error=f"{type(error).__name__}: {error}"[:300], traceback=traceback.format_exc()[-3000:])
            if torch.cuda.is_available():
                try:
                    torch.cuda.synchronize()
                except Exception as sticky:
                    self(**what, fatal=str(sticky)[:200])
                    sys.exit(3)
        finally:
            signal.alarm(0)
            self(**what, part_s=round(time.time() - begin, 1))


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def times(call, n, warm):
    """Milliseconds on the clock of n calls, each waited for, after `warm` ones; sorted."""
    for _ in range(warm):
        call()
    found = []
    for _ in range(n):
        sync()
        begin = time.perf_counter()
        call()
        sync()
        found.append((time.perf_counter() - begin) * 1e3)
    return sorted(found)


def replays(call, n, warm=2):
    """Milliseconds of n replays of a CUDA graph of one call; sorted."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    found = []
    for i in range(n + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if i >= 3:
            found.append(start.elapsed_time(stop))
    return sorted(found)


def spread(found):
    return {"min": round(found[0], 4), "median": round(found[len(found) // 2], 4), "n": len(found)}
