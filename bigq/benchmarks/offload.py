"""bench_offload: calls of a model whose blocks are on the CPU or the disk, beside what the link and the drive allow."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bigq.benchmarks.formats import BENCH_FORMATS
from bigq.benchmarks.llama import SHAPES, LlamaShape, skeleton, write_checkpoint
from bigq.benchmarks.result import BenchResult, Row
from bigq.benchmarks.scratch import free, require_space, scratch_folder
from bigq.config import QuantizationConfig
from bigq.formats import dtype_name
from bigq.load import load_and_quantize_model
from bigq.measuring.environment import Environment
from bigq.measuring.rates import disk_rate, link_rate
from bigq.measuring.reading import read_call
from bigq.model.tree import ModelTree, nbytes_of

__all__ = ["bench_offload"]

_REPEATS = 5


def bench_offload(
    device: torch.device,
    *,
    size: str | LlamaShape | None = None,
    format_name: str = "nf4",
    tokens: Sequence[int] = (1, 16, 512),
    folder: Path | None = None,
    progress: Callable[[str], object] = lambda line: None,
) -> BenchResult:
    """Call a model with random numbers whose blocks are offloaded, quantized or not, and one that is not offloaded.

    The floor of a call is the time that its blocks take to the device: over the link from "cpu"; from "disk" the slower
    of the link and reads of cached files, because the files were just written and are in the page cache. Without a GPU
    nothing is offloaded to "cpu", and a call from "disk" reads files alone.

    Args:
        device: that runs the model.
        size: a key of SHAPES, or a shape. None: "1b" on a GPU, "tiny" on a CPU.
        format_name: a key of BENCH_FORMATS.
        tokens: of one sequence, by call.
        folder: for the checkpoint and offloaded tensors. None: that of temporary files.
        progress: takes a line for each place.

    Returns:
        rows by place, how blocks are stored, and tokens, with "ms", and derived: "MB" of the blocks, "floor ms", and
        "of the floor".

    Raises:
        PlacementError: the drive of `folder` has too little room.
        CheckpointError: the checkpoint cannot be written.
    """
    on_gpu = device.type == "cuda"
    shape = size if isinstance(size, LlamaShape) else SHAPES[size or ("1b" if on_gpu else "tiny")]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows: list[Row] = []
    with scratch_folder(folder) as place, torch.no_grad():
        require_space(place, 2 * shape.nbytes(dtype))  # the checkpoint, and what is offloaded
        progress("measuring the link and the drive")
        rates = {"disk": disk_rate(place, 1 << 28 if on_gpu else 1 << 26, cached=True).value}
        if on_gpu:
            rates["cpu"] = link_rate(device).value
            rates["disk"] = min(rates.values())
        progress(f"writing {shape.nbytes(dtype) / 1e9:.2f} GB to {place}")
        write_checkpoint(shape, place, dtype, device)
        cases = [(where, stored) for where in ("cpu", "disk") if where in rates for stored in ("quantized", "preserve")]
        for where, stored in [("resident", "quantized"), *cases]:
            progress(f"{where}, {stored}")
            block_place: str | torch.device = device if where == "resident" else where
            device_map = {"embed": device, "norm": device, "head": device, "layers": block_place}
            model = load_and_quantize_model(
                skeleton(shape, dtype),
                place,
                QuantizationConfig(BENCH_FORMATS[format_name]),
                device_map,
                offload=stored,
                offload_folder=place,
                progress=False,
            )
            nbytes = _blocks_nbytes(model)
            for count in tokens:
                ids = torch.zeros(1, count, dtype=torch.int64, device=device)
                found = read_call(partial(model, ids), device, repeats=_REPEATS, warm_ups=2, factor=1e3)
                derived = {"MB": nbytes / 1e6}
                if where in rates:
                    floor_ms = 1e3 * nbytes / rates[where]
                    derived |= {"floor ms": floor_ms, "of the floor": floor_ms / found.value}
                what: dict[str, str | int] = {"blocks on": where, "stored": stored, "tokens": count}
                rows.append(Row(what=what, readings={"ms": found}, derived=derived))
            del model
            free(device)
    return BenchResult(
        benchmark="offload",
        settings={
            "format": format_name,
            "dtype": dtype_name(dtype),
            "layers": shape.layers,
            "hidden": shape.hidden,
            **{f"{where}_bytes_per_s": rate for where, rate in rates.items()},
        },
        rows=tuple(rows),
        environment=Environment.of(device),
    )


def _blocks_nbytes(model: nn.Module) -> int:
    """Bytes of the tensors of all blocks, as they are stored."""
    return sum(nbytes_of(group.tensor) for group in ModelTree(model).tensors if group.names[0].startswith("layers."))
