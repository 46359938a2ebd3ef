"""bench_loading: seconds that a checkpoint takes to load, from the drive and from memory, by format."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bigq.benchmarks.float_model import load_float
from bigq.benchmarks.formats import BENCH_FORMATS
from bigq.benchmarks.llama import SHAPES, LlamaShape, skeleton, write_checkpoint
from bigq.benchmarks.result import BenchResult, Row
from bigq.benchmarks.scratch import require_space, scratch_folder
from bigq.benchmarks.timed_loads import timed_loads
from bigq.config import QuantizationConfig
from bigq.formats import dtype_name
from bigq.load import load_and_quantize_model
from bigq.measuring.environment import Environment
from bigq.measuring.page_cache import drop_cached, file_system
from bigq.measuring.rates import disk_rate

__all__ = ["bench_loading"]

_DTYPE = torch.bfloat16
_WARM_REPEATS = 3


def bench_loading(
    device: torch.device,
    *,
    nbytes: int | None = None,
    formats: Sequence[str] | None = None,
    folder: Path | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> BenchResult:
    """Load a checkpoint with random numbers in every format, and in float with safetensors alone.

    The checkpoint has Llama's shape in bfloat16. It is written first, and removed at the end. "cold" loads come from
    the drive, because the files' pages are dropped from memory before them; "warm" ones from the page cache. Triton has
    been started before both.

    Args:
        device: that models are loaded to.
        nbytes: of the checkpoint, roughly: it has as many layers as come closest. None: 2 GB on a GPU, 20 MB on a CPU.
        formats: keys of BENCH_FORMATS. None: all.
        folder: for the checkpoint. None: that of temporary files.
        progress: takes a line for each format.

    Returns:
        rows by format and cache, with "s", and derived: "GB/s" of the checkpoint.

    Raises:
        PlacementError: the drive of `folder` has too little room.
        CheckpointError: the checkpoint cannot be written.
    """
    on_gpu = device.type == "cuda"
    wanted = nbytes or (2_000_000_000 if on_gpu else 20_000_000)
    dtype = _DTYPE
    shape = _shape(wanted, dtype)
    rows: list[Row] = []
    with scratch_folder(folder) as place:
        require_space(place, shape.nbytes(dtype))
        progress(f"writing {shape.nbytes(dtype) / 1e9:.2f} GB to {place}")
        written = write_checkpoint(shape, place, dtype, device)
        rate = disk_rate(place, min(1 << 28, written))
        for name in (None, *(BENCH_FORMATS if formats is None else formats)):
            progress(dtype_name(dtype) if name is None else name)
            if on_gpu and name is not None:
                _start_triton(name, device)
            load = partial(_load, name, shape, place, device)
            for cache, repeats in (("cold", 1), ("warm", _WARM_REPEATS)):
                if cache == "cold":
                    _drop(place)
                found = timed_loads(load, device, repeats)
                what: dict[str, str | int] = {"format": name or dtype_name(dtype), "cache": cache}
                rows.append(Row(what=what, readings={"s": found}, derived={"GB/s": written / found.value / 1e9}))
        kind = file_system(place)
    return BenchResult(
        benchmark="loading",
        settings={
            "checkpoint_nbytes": written,
            "layers": shape.layers,
            "hidden": shape.hidden,
            "file_system": kind,
            "drive_bytes_per_s": rate.value,
        },
        rows=tuple(rows),
        environment=Environment.of(device),
    )


def _shape(nbytes: int, dtype: torch.dtype) -> LlamaShape:
    """The widest shape of which the embedding and the head are less than half of `nbytes`, with layers to match."""
    shapes = [replace(own, vocabulary=min(own.vocabulary, 32768)) for own in SHAPES.values()]
    fitting = [own for own in shapes if 4 * own.vocabulary * own.hidden * dtype.itemsize < nbytes]
    return (fitting or shapes)[-1 if fitting else 0].of_nbytes(nbytes, dtype)


def _load(name: str | None, shape: LlamaShape, folder: Path, device: torch.device) -> nn.Module:
    made = skeleton(shape, _DTYPE)
    if name is None:
        return load_float(made, folder, device)
    return load_and_quantize_model(made, folder, QuantizationConfig(BENCH_FORMATS[name]), device, progress=False)


def _drop(folder: Path) -> None:
    """Drop the pages of all files in `folder` from memory."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            drop_cached(descriptor)
        finally:
            os.close(descriptor)


def _start_triton(name: str, device: torch.device) -> None:
    """Compile and load the kernels of a format, so that the first load is not the only one that does."""
    BENCH_FORMATS[name].quantize(torch.zeros(16, 4096, dtype=torch.bfloat16, device=device))
    torch.cuda.synchronize(device)
