"""Rates: bytes a second of the link from host memory to a GPU, and of reads from the drive below a folder."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import torch

from bigq.measuring.page_cache import drop_cached
from bigq.measuring.reading import Reading, read_call
from bigq.system.files import read_into
from bigq.system.machine import usable_cores

__all__ = ["copy_rate", "disk_rate", "link_rate", "product_rate"]

_CHUNK_NBYTES = 16 << 20  # as loads read
_CACHED_REPEATS = 5
_THREADS = 12  # as loads read


def link_rate(device: torch.device, nbytes: int = 1 << 28, repeats: int = 9) -> Reading:
    """Bytes a second of copies from pinned host memory to a GPU, `nbytes` at once."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return _per_second(read_call(lambda: target.copy_(source, non_blocking=True), device, repeats=repeats), nbytes)


def disk_rate(folder: Path, nbytes: int = 1 << 28, *, cached: bool = False) -> Reading:
    """Bytes a second that threads read from a file of `nbytes` in `folder`, once, and not from the page cache.

    With `cached` they come from there, and the rate is the median of five. The file has no name, and is gone
    afterwards. Raises OSError if it cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        block = os.urandom(_CHUNK_NBYTES)  # a drive may compress zeros
        for start in range(0, nbytes, _CHUNK_NBYTES):
            file.write(block[: nbytes - start])
        file.flush()
        if not cached:
            drop_cached(file.fileno())
        buffers = [memoryview(bytearray(min(_CHUNK_NBYTES, nbytes - at))) for at in range(0, nbytes, _CHUNK_NBYTES)]
        with ThreadPoolExecutor(min(_THREADS, usable_cores())) as threads:
            rates = []
            for _ in range(_CACHED_REPEATS if cached else 1):
                start_s = perf_counter()
                jobs = [
                    threads.submit(read_into, buffer, file.fileno(), number * _CHUNK_NBYTES)
                    for number, buffer in enumerate(buffers)
                ]
                got = sum(job.result() for job in jobs)
                rates.append(nbytes / (perf_counter() - start_s))
                if got != nbytes:
                    raise OSError(f"a file of {nbytes} bytes in {folder} gave {got} back")
    return Reading.of(rates)


def copy_rate(device: torch.device, nbytes: int, repeats: int = 9) -> Reading:
    """Bytes a second, read plus written, of a copy of `nbytes` in the memory of `device`."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _per_second(read_call(lambda: target.copy_(source), device, repeats=repeats), 2 * nbytes)


def product_rate(device: torch.device, size: int, dtype: torch.dtype, repeats: int = 9) -> Reading:
    """Operations a second of the product of two matrices [size, size]: a multiplication and an addition are two."""
    square = torch.randn(size, size, device=device).to(dtype)
    return _per_second(read_call(lambda: square @ square, device, repeats=repeats), 2 * size**3)


def _per_second(seconds: Reading, amount: int) -> Reading:
    return Reading(value=amount / seconds.value, spread=seconds.spread)
