"""quantize_checkpoint: quantize a checkpoint into a folder, in bounded memory, from where an earlier run ended."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import nn

from bigq.checkpoint import Source
from bigq.checkpoint.choose import INDEX_SUFFIX
from bigq.config import QuantizationConfig
from bigq.converting.prepare import Request, prepare, refuse_too_little_space
from bigq.converting.shards import Shard, size_of
from bigq.converting.staging import Staging
from bigq.converting.write_shard import write_shard
from bigq.errors import ConfigError, UnsupportedError
from bigq.integrations.skeleton import build_skeleton
from bigq.interop.bitsandbytes_configs import as_config
from bigq.loading.report import StageReport, stage_reports
from bigq.loading.stream import Budget
from bigq.loading.timings import Timings
from bigq.loading.warm_up import WarmUp
from bigq.model.tree import ModelTree
from bigq.open_source import open_source
from bigq.planning.make_plan import quant_states
from bigq.planning.places import expected_device, plan_and_place
from bigq.planning.plan import PlannedWeight
from bigq.saving.files import index_text
from bigq.saving.layouts import OWN, check_layout
from bigq.saving.shard_file import data_nbytes

__all__ = ["QuantizedCheckpoint", "quantize_checkpoint"]

_BUDGET_NBYTES = 256 << 20  # of weights on their way


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    """What `quantize_checkpoint` wrote.

    `files` are the files of weights in `folder`, in their order, and `resumed` of them are from a run that was
    interrupted. `quantized` and `kept` count tensors. `source_nbytes` and `nbytes` are bytes of tensors before and
    after. `stages` are as in a QuantizationReport; "write" includes the copies from a GPU.
    """

    folder: Path
    layout: str
    files: tuple[str, ...]
    resumed: int
    quantized: int
    kept: int
    source_nbytes: int
    nbytes: int
    seconds: float
    stages: tuple[StageReport, ...]

    def to_dict(self) -> dict[str, object]:
        """The result as JSON can hold it."""
        return {**asdict(self), "folder": str(self.folder)}


def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    quantization_config: QuantizationConfig | object,
    *,
    model: nn.Module | None = None,
    layout: str = OWN,
    max_shard_size: int | str = "5GB",
    device: str | int | torch.device | None = None,
    overwrite: bool = False,
    strict: bool = True,
    trust_remote_code: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: bool | None = None,
    read_threads: int | None = None,
    read_budget: int | None = None,
) -> QuantizedCheckpoint:
    """Quantize a checkpoint into a folder, file by file, without a model in memory.

    The tensors are those that `load_and_quantize_model` and `save_quantized` would write. For a model of transformers
    or diffusers the folder is complete: config.json, the tokenizer and other files beside the weights, and a model
    card. Everything is written to a hidden folder in `destination` first, and config.json is the last that leaves it.

    A call that is interrupted keeps the files that it has finished. The same call again goes on from there.

    Args:
        source: a folder, file or Hub repo with float weights, as `weights_location` of `load_and_quantize_model`.
        destination: folder to write; is created. It has to be empty, or hold what an interrupted call left.
        quantization_config: a QuantizationConfig, the name of a format, or what else `load_and_quantize_model` takes.
        model: a skeleton, such as one on the meta device; it is left as it is. None: the model that the config.json of
            `source` describes, which needs transformers or diffusers.
        layout: of the tensors, as in `save_quantized`: "bigq", "bitsandbytes" or "compressed-tensors".
        max_shard_size: bytes of a file, or a string such as "5GB". A weight larger than that gets a file of its own.
        device: where weights are quantized. None: the current GPU, or the CPU if there is none.
        overwrite: drop what an interrupted call left, and replace files in `destination`.
        strict: refuse tensors that are missing from the checkpoint, and unexpected ones. False: ignore unexpected
            tensors, and write the model's own tensor in place of a missing one if it has numbers.
        trust_remote_code: whether code that comes with the model may run.
        metadata: further entries of the metadata of each safetensors file.
        progress: show a progress bar on stderr. None: only on a terminal.
        read_threads: threads that read files. None: 12, or the cores that this process may use if they are fewer.
        read_budget: bytes of host memory, and of GPU memory, for weights that are being read. None: 256 MiB. A single
            tensor that has to be quantized as a whole may take more.

    Returns:
        What was written.

    Raises:
        CheckpointError: a file is missing or damaged, its tensors do not fit the model, or a weight holds NaN or Inf.
        ConfigError: the config contradicts the model; or `destination` holds other files, or a part of another run.
        PlacementError: the disk has too little space, or the device is absent.
        UnsupportedError: the layout cannot hold a weight; the source is quantized already; or nothing is to quantize.
        OSError: a file cannot be written.

    Example:
        >>> import tempfile
        >>> import bigq, safetensors.torch, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.torch.save_file(model.state_dict(), f"{folder}/model.safetensors")
        ...     made = bigq.quantize_checkpoint(folder, f"{folder}/nf4", "nf4", model=model, device="cpu")
        >>> made.files, made.quantized, made.kept, made.source_nbytes, made.nbytes
        (('model.safetensors',), 1, 3, 18720, 4896)
    """
    began = time.perf_counter()
    check_layout(layout)
    max_nbytes = size_of(max_shard_size)
    if quantization_config is None:
        raise ConfigError("quantization_config is None: pass a QuantizationConfig, or the name of a format")
    to = Path(destination)
    budget = Budget.of_machine(read_threads, read_budget)
    if read_budget is None:
        budget = replace(budget, nbytes=min(budget.nbytes, _BUDGET_NBYTES))
    timings = Timings()
    runs_on = expected_device(device)
    with timings.timed("plan"):
        skeleton = build_skeleton(source, trust_remote_code=trust_remote_code) if model is None else model
        config = as_config(quantization_config, skeleton)
        tree = ModelTree(skeleton)
        opened, extra_states = open_source(tree, source, strict=strict, config=config)
        if to.resolve() in {file.parent.resolve() for file in extra_states.files}:
            raise ConfigError(f"source and destination are both {to}: choose another folder to write to")
        if quant_states(opened.tensors):
            raise UnsupportedError(
                f"{source} is quantized already: quantize the original weights; to change its layout, load it and save "
                "it with save_quantized"
            )
        if extra_states.is_needed:
            raise UnsupportedError(
                f"{source} holds extra states of modules, which only a loaded model can save: use "
                "load_and_quantize_model and save_quantized"
            )
    request = Request(
        source=source,
        destination=to,
        config=config,
        layout=layout,
        max_nbytes=max_nbytes,
        metadata=metadata or {},
        overwrite=overwrite,
    )
    with WarmUp(config, opened, runs_on) as warm_up:
        with timings.timed("plan"):
            plan, _ = plan_and_place(tree, opened, config, runs_on, strict=strict)
            shards, staging = prepare(tree, plan, request, extra_states.files)
            resumed = [*staging.done]
        if not staging.is_complete:
            refuse_too_little_space(shards, staging)
            write = partial(
                write_shard,
                source=opened,
                device=runs_on,
                budget=budget,
                timings=timings,
                warm_up=warm_up,
                metadata=request.metadata,
            )
            _write_shards(shards, staging, write, opened, progress)
            _write_index(staging, shards, request.metadata)
    staging.publish()
    entries = [entry for shard in shards.values() for entry in shard]
    quantized = sum(isinstance(entry.planned, PlannedWeight) for entry in entries)
    return QuantizedCheckpoint(
        folder=to,
        layout=layout,
        files=tuple(shards),
        resumed=len(resumed),
        quantized=quantized,
        kept=len(entries) - quantized,
        source_nbytes=_source_nbytes(opened, shards),
        nbytes=sum(data_nbytes(to / name) for name in shards),
        seconds=time.perf_counter() - began,
        stages=stage_reports(timings),
    )


def _write_shards(
    shards: Mapping[str, Shard], staging: Staging, write: Callable[..., int], source: Source, progress: bool | None
) -> None:
    """Write the files that are not done yet, with a progress bar over the bytes of `source`."""
    left = {name: shard for name, shard in shards.items() if name not in staging.done}
    last = [*shards][-1]
    hidden = None if progress is None else not progress  # None: hidden unless stderr is a terminal
    total = _source_nbytes(source, left)
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="Quantizing", disable=hidden) as bar:  # type: ignore[no-untyped-call]
            for name, shard in left.items():
                write(staging.folder / name, shard, advance=bar.update)
                if name != last:  # nothing is left to resume after it
                    staging.mark_done(name)
    finally:
        staging.wait()


def _source_nbytes(source: Source, shards: Mapping[str, Shard]) -> int:
    sources = [entry.planned.source for shard in shards.values() for entry in shard]
    return sum(source.tensors[name].nbytes for name in sources if name is not None)


def _write_index(staging: Staging, shards: Mapping[str, Shard], metadata: Mapping[str, str]) -> None:
    """Write the index of several files."""
    if len(shards) == 1:
        return
    weight_map = {name: file for file, shard in shards.items() for entry in shard for name in entry.specs}
    total = sum(data_nbytes(staging.folder / file) for file in shards)
    stem = next(iter(shards)).partition("-")[0]
    text = index_text(weight_map, {"total_size": total, **metadata})
    (staging.folder / f"{stem}.safetensors{INDEX_SUFFIX}").write_text(text)
