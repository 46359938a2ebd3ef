"""write_shard: read what goes into one file, quantize it, and write it, in bounded memory."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bigq.checkpoint import Source, StoredTensor
from bigq.converting.outline import Entry
from bigq.errors import CheckpointError
from bigq.formats import TensorSpec
from bigq.loading.destinations import Destinations
from bigq.loading.jobs import Batch, WeightJob
from bigq.loading.runs import Piece, Target
from bigq.loading.stream import Budget, stream
from bigq.loading.timings import Timings
from bigq.loading.warm_up import WarmUp
from bigq.planning.plan import PlannedWeight
from bigq.saving.shard_file import ShardFile
from bigq.system.text import shortlist

__all__ = ["write_shard"]

_CPU = torch.device("cpu")


class _KeptTensor:
    """A tensor that is written as it is, or cast, piece by piece."""

    def __init__(self, entry: Entry, file: ShardFile) -> None:
        ((self._name, self._spec),) = entry.specs.items()
        self._file = file

    def target(self, stored: StoredTensor) -> Target:
        return Target(device=_CPU)

    def take(self, piece: Piece) -> None:
        self._file.write(self._name, piece.tensor.to(self._spec.dtype), start=piece.start)


def write_shard(
    path: Path,
    entries: Sequence[Entry],
    *,
    source: Source,
    device: torch.device,
    budget: Budget,
    timings: Timings,
    warm_up: WarmUp,
    metadata: Mapping[str, str],
    advance: Callable[[int], object],
) -> int:
    """Write the safetensors file at `path` with all of `entries`, quantized on `device`. Returns the bytes of tensors.

    At most about `budget.nbytes` of float weights are in memory, and what they became is dropped once it is written.

    Args:
        source: the checkpoint, under the names of the model.
        metadata: of the file's header.
        advance: is told how many bytes of the source were done, at each step.

    Raises:
        CheckpointError: a tensor cannot be read, or a weight to quantize holds NaN or Inf.
        OSError: the file cannot be written.
    """
    batch = Batch()
    weights = [entry.planned for entry in entries if isinstance(entry.planned, PlannedWeight)]
    places = {weight.names[0]: str(device) for weight in weights}
    destinations = Destinations(places=places, runs_on=device, spaces={}, in_checkpoint={})
    specs: dict[str, TensorSpec] = {name: spec for entry in entries for name, spec in entry.specs.items()}
    late = {name for entry in entries for name in entry.late}
    with ShardFile(path, specs, late=late, metadata=metadata) as file:
        jobs: dict[str, WeightJob | _KeptTensor] = {}
        entry_of: dict[str, Entry] = {}
        for entry in entries:
            if entry.planned.source is None:  # what the checkpoint lacks and the model has
                for name, tensor in entry.constants.items():
                    file.write(name, tensor)
                continue
            entry_of[entry.planned.source] = entry
            if isinstance(entry.planned, PlannedWeight):
                jobs[entry.planned.source] = WeightJob(entry.planned, destinations, batch)
            else:
                jobs[entry.planned.source] = _KeptTensor(entry, file)
        targets = {name: job.target(source.tensors[name]) for name, job in jobs.items()}
        for pieces in stream(source, targets, budget, timings):
            nbytes = sum(piece.tensor.nbytes for piece in pieces)
            with timings.timed("write"):
                for piece in pieces:
                    jobs[piece.info.name].take(piece)
                del piece, pieces  # or they would outlive their replacements by one turn
            if not batch.is_empty:
                with timings.timed("wait"):
                    warm_up.wait()
            with timings.timed("quantize"):
                finished = batch.quantize()
                _refuse_non_finite(source, finished)
            with timings.timed("write"):
                _write(file, entry_of, finished)
                del finished
            advance(nbytes)
        with timings.timed("write"):
            written = file.finish()
    return written


def _write(file: ShardFile, entry_of: Mapping[str, Entry], jobs: Sequence[WeightJob]) -> None:
    """Write what weights became, and drop it. A function, so that no variable keeps the last of them."""
    for job in jobs:
        assert job.planned.source is not None
        for name, tensor in entry_of[job.planned.source].tensors(job.take_placed()).items():
            file.write(name, tensor)


def _refuse_non_finite(source: Source, jobs: Sequence[WeightJob]) -> None:
    """Raise a CheckpointError if weights that were quantized held NaN or Inf, which the scales then show."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for job in jobs:
        scales = job.planned.description.format.scales(job.state())
        assert job.planned.source is not None
        by_device.setdefault(scales.device, []).append((job.planned.source, scales.isfinite().all()))
    bad = [
        name
        for flags in by_device.values()
        for (name, _), flag in zip(flags, torch.stack([flag for _, flag in flags]).tolist(), strict=True)
        if not flag
    ]
    if bad:
        listed = shortlist([f"{name} in {source.tensors[name].where}" for name in bad])
        raise CheckpointError(f"{len(bad)} weights hold NaN or Inf and cannot be quantized: {listed}")
