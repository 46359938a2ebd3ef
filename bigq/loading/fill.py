"""fill: read, quantize and place every tensor of a plan."""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import nn

from bigq.checkpoint import Source
from bigq.errors import CheckpointError
from bigq.formats import Description, State
from bigq.loading.destinations import Destinations
from bigq.loading.jobs import Batch, Job, TensorJob, WeightJob
from bigq.loading.stream import Budget, stream
from bigq.loading.timings import Timings
from bigq.loading.warm_up import WarmUp
from bigq.planning.plan import Plan

__all__ = ["fill"]


def fill(
    modules: Mapping[str, nn.Module],
    plan: Plan,
    source: Source,
    destinations: Destinations,
    *,
    budget: Budget,
    timings: Timings,
    warm_up: WarmUp,
    progress: bool | None = None,
    between: Callable[[], object] = lambda: None,
    lends: Callable[[], bool] = lambda: True,
) -> list[Job]:
    """Read everything that `plan` takes from `source`, quantize it, and put it where `destinations` says.

    A source that is the model itself changes it, tensor by tensor, after all weights were checked: each old weight is
    freed before the next is quantized. No other source does.

    Args:
        modules: those of the model, by name.
        between: called between the steps, and may raise to end the reading.
        lends: whether what is read may use the GPU memory that the results will need. Not if they leave the GPU.

    Returns:
        the jobs that are left to commit to the model, in their order.

    Raises:
        CheckpointError: a tensor cannot be read, or a weight to quantize holds NaN or Inf.
    """
    batch = Batch()
    tensors = {tensor.source: TensorJob(tensor, destinations) for tensor in plan.tensors if tensor.source is not None}
    weights = {
        weight.source: WeightJob(weight, destinations, batch) for weight in plan.weights if weight.source is not None
    }
    jobs: dict[str, Job] = {**{name: job for name, job in tensors.items() if not job.is_done}, **weights}
    if source.in_place:
        warm_up.wait()
        finite = {name: tensor.isfinite().all() for name, tensor in source.read(weights)}
        _refuse_non_finite(source, [name for name, flag in finite.items() if not flag])
    lent: Counter[torch.device] = Counter()  # bytes of GPUs that are lent to what is read
    for weight_job in weights.values():
        lent[weight_job.device] += weight_job.lent_nbytes(budget.run_nbytes)
    targets = {name: job.target(source.tensors[name]) for name, job in jobs.items()}
    hidden = None if progress is None else not progress  # None: hidden unless stderr is a terminal
    total = sum(source.tensors[name].nbytes for name in jobs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=hidden) as bar:  # type: ignore[no-untyped-call]
        for pieces in stream(source, targets, budget, timings, lambda device: lent[device] if lends() else 0):
            between()
            nbytes = sum(piece.tensor.nbytes for piece in pieces)
            names = [piece.info.name for piece in pieces]
            with timings.timed("quantize", nbytes):
                for piece in pieces:
                    jobs[piece.info.name].take(piece)
                del piece, pieces  # or they would outlive their replacements by one turn
            if not batch.is_empty and not source.in_place:
                with timings.timed("wait"):
                    warm_up.wait()
            with timings.timed("quantize"):
                for weight_job in batch.quantize():
                    lent[weight_job.device] -= weight_job.lent_nbytes(budget.run_nbytes)
            if source.in_place:
                for name in names:
                    jobs.pop(name).commit(modules)
            bar.update(nbytes)
    if not source.in_place:
        with timings.timed("quantize"):
            bad = batch.quantizer.non_finite(lambda name: _described(weights[name]))
            _refuse_non_finite(source, bad)
    rest = [TensorJob(tensor, destinations) for tensor in plan.tensors if tensor.source is None]
    for tensor_job in rest:  # what the checkpoint does not hold, such as non-persistent buffers
        tensor_job.take_own(modules)
    held = [WeightJob(weight, destinations, batch) for weight in plan.weights if weight.source is None]
    done = [job for name, job in tensors.items() if name in jobs or job.is_done]
    left = [job for name, job in weights.items() if name in jobs]
    return [*held, *left, *done, *rest]  # modules before the tensors that go into them


def _described(job: WeightJob) -> tuple[Description, State]:
    """A quantized weight, on the device that has quantized it: some parts of a shard may have left it."""
    return job.planned.description, {part: tensor.to(job.device) for part, tensor in job.state().items()}


def _refuse_non_finite(source: Source, bad: list[str]) -> None:
    if bad:
        listed = "\n".join(f"  {name} in {source.tensors[name].where}" for name in bad)
        raise CheckpointError(f"{len(bad)} weights hold NaN or Inf and cannot be quantized:\n{listed}")
