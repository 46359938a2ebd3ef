"""bench_model: loading a model of Llama's shape, calling it with 1, 16 and 512 tokens, and its memory, by format."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bigq.benchmarks.float_model import load_float
from bigq.benchmarks.formats import BENCH_FORMATS
from bigq.benchmarks.llama import SHAPES, LlamaShape, skeleton, write_checkpoint
from bigq.benchmarks.result import BenchResult, Row
from bigq.benchmarks.scratch import free, require_space, scratch_folder
from bigq.benchmarks.timed_loads import timed_loads
from bigq.config import QuantizationConfig
from bigq.footprint import memory_footprint
from bigq.formats import dtype_name
from bigq.load import load_and_quantize_model
from bigq.measuring.environment import Environment
from bigq.measuring.gpu_memory import peak_nbytes, reset_peak
from bigq.measuring.reading import Reading, read_call

__all__ = ["bench_model"]

_LOADS = 3
_REPEATS = 5


def bench_model(
    device: torch.device,
    *,
    size: str | LlamaShape | None = None,
    formats: Sequence[str] | None = None,
    tokens: Sequence[int] = (1, 16, 512),
    folder: Path | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> BenchResult:
    """Measure a whole model with random numbers, in float and in every format.

    A checkpoint is written first, and removed at the end. Its files are in the page cache when they are loaded.

    Args:
        device: that the model is loaded to and runs on.
        size: a key of SHAPES, or a shape. None: "1b" on a GPU, "tiny" on a CPU.
        formats: keys of BENCH_FORMATS. None: all.
        tokens: of one sequence, by call.
        folder: for the checkpoint. None: that of temporary files.
        progress: takes a line for each format.

    Returns:
        rows by format with "load s", "<M> tokens ms" (eager), "MB" of the tensors, and on a GPU "graph 1 token ms" (in
        a CUDA graph) and "peak load MB" (with what is being read).

    Raises:
        PlacementError: the drive of `folder` has too little room.
        CheckpointError: the checkpoint cannot be written.
    """
    on_gpu = device.type == "cuda"
    shape = size if isinstance(size, LlamaShape) else SHAPES[size or ("1b" if on_gpu else "tiny")]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = []
    with scratch_folder(folder) as place, torch.no_grad():
        require_space(place, shape.nbytes(dtype))
        progress(f"writing a checkpoint of {shape.nbytes(dtype) / 1e9:.2f} GB to {place}")
        nbytes = write_checkpoint(shape, place, dtype, device)
        for name in (None, *(BENCH_FORMATS if formats is None else formats)):
            progress(dtype_name(dtype) if name is None else name)
            rows.append(_row(name, shape, place, device, dtype, tokens))
            free(device)
    return BenchResult(
        benchmark="model",
        settings={
            "dtype": dtype_name(dtype),
            "checkpoint_nbytes": nbytes,
            "layers": shape.layers,
            "hidden": shape.hidden,
            "intermediate": shape.intermediate,
        },
        rows=tuple(rows),
        environment=Environment.of(device),
    )


def _row(
    name: str | None, shape: LlamaShape, folder: Path, device: torch.device, dtype: torch.dtype, tokens: Sequence[int]
) -> Row:
    load = partial(_load, name, shape, folder, device, dtype)
    timed_loads(load, device, repeats=1)  # the first one compiles kernels
    readings = {"load s": timed_loads(load, device, repeats=_LOADS)}
    reset_peak(device)
    model = load()
    peak = peak_nbytes(device)
    for count in tokens:
        ids = torch.zeros(1, count, dtype=torch.int64, device=device)
        readings[f"{count} tokens ms"] = read_call(
            partial(model, ids), device, repeats=_REPEATS, warm_ups=3, factor=1e3
        )
    if peak is not None:
        from bigq_kernels.timing import readings as in_graph

        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        readings["graph 1 token ms"] = Reading.of(in_graph([partial(model, ids)]), 1e-3)
        readings["peak load MB"] = Reading(value=peak / 1e6)
    readings["MB"] = Reading(value=memory_footprint(model).total_nbytes / 1e6)
    return Row(what={"format": name or dtype_name(dtype)}, readings=readings)


def _load(name: str | None, shape: LlamaShape, folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    if name is None:
        return load_float(skeleton(shape, dtype), folder, device)
    config = QuantizationConfig(BENCH_FORMATS[name])
    return load_and_quantize_model(skeleton(shape, dtype), folder, config, device, progress=False)
