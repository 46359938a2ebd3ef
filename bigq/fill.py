"""fill: read, quantize and place every tensor of a plan, then change the model."""

from collections.abc import Mapping

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from bigq.checkpoint import TensorInfo
from bigq.commit import commit
from bigq.errors import CheckpointError
from bigq.formats import TensorSpec
from bigq.model_tensors import ModelTensors, find_owner, tensor_name
from bigq.plan import Plan, PlannedLinear, PlannedTensor
from bigq.store import Store
from bigq.stream import Source, stream

__all__ = ["fill"]

Job = PlannedLinear | PlannedTensor


def fill(model: nn.Module, plan: Plan, source: Source, store: Store, *, progress: bool | None) -> None:
    """Fill `model` from `source` as `plan` and `store` say.

    From a checkpoint, the model changes after the last tensor has arrived and none was found wrong. A model that held
    its own weights changes layer by layer, after all of them were checked, so that each old weight is freed before the
    next is quantized.

    Raises:
        CheckpointError: a tensor cannot be read, or a weight to quantize holds NaN or Inf.
    """
    jobs = plan.jobs()
    in_place = isinstance(source, ModelTensors)
    if in_place:
        weights = [name for name, job in jobs.items() if isinstance(job, PlannedLinear)]
        _refuse_non_finite(source, {name: _is_finite(tensor) for name, tensor in source.read(weights)})
    finite: dict[str, Tensor] = {}
    done: list[tuple[Job, dict[str, Tensor]]] = []
    for name, job in list(jobs.items()):
        if job.names[0] in store.in_checkpoint:  # it stays there, unread
            done.append((job, {job.names[0].rpartition(".")[2]: store.in_checkpoint[job.names[0]]}))
            del jobs[name]
    total = sum(source.tensors[name].nbytes for name in jobs)
    hidden = None if progress is None else not progress  # None: hidden unless stderr is a terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=hidden) as bar:  # type: ignore[no-untyped-call]
        for name, tensor, owned in stream(source, jobs, lambda info: _receive(info, jobs[info.name], store)):
            job = jobs[name]
            if isinstance(job, PlannedLinear):
                state = _quantize(job, tensor, store)
                finite[name] = _is_finite(*state.values())
                done.append((job, _place(job.names[0], state, store, owned=True)))
            else:
                done.append((job, _place_one(job, tensor, store, owned=owned or in_place)))
            del tensor  # or it would outlive its replacement by one turn
            if in_place:
                _commit_all(model, done, store)
            bar.update(source.tensors[name].nbytes)
    if not in_place:
        _refuse_non_finite(source, finite)
    for job in plan.tensors:  # what the checkpoint does not hold, such as non-persistent buffers
        if job.source is None:
            own: Tensor = getattr(*find_owner(model, job.names[0]))
            done.append((job, _place_one(job, own.detach(), store, owned=True)))
    done += [(job, {}) for job in plan.linears if job.source is None]
    done.sort(key=lambda entry: isinstance(entry[0], PlannedTensor))  # modules before the tensors that go into them
    _commit_all(model, done, store)


def _receive(info: TensorInfo, job: Job, store: Store) -> Tensor:
    """Memory for a tensor of the checkpoint: that of what it becomes, or scratch on the device that quantizes it."""
    spec = TensorSpec(shape=tuple(info.shape), dtype=info.dtype)
    if isinstance(job, PlannedTensor):
        return store.receive(job.names[0], spec)
    return torch.empty(spec.shape, dtype=spec.dtype, device=_quantizing_device(job, store))


def _quantizing_device(job: PlannedLinear, store: Store) -> torch.device:
    return store.work_device(tensor_name(job.names[0], "weight"), quantize=True)


def _quantize(job: PlannedLinear, tensor: Tensor, store: Store) -> dict[str, Tensor]:
    weight = tensor.to(_quantizing_device(job, store))
    if weight.dtype == torch.float64:  # no format has scales that fine
        weight = weight.float()
    return job.module.quantize(weight.T if job.transposed else weight)


def _place(path: str, tensors: Mapping[str, Tensor], store: Store, *, owned: bool) -> dict[str, Tensor]:
    return {leaf: store.put(tensor_name(path, leaf), tensor, owned=owned) for leaf, tensor in tensors.items()}


def _place_one(job: PlannedTensor, tensor: Tensor, store: Store, *, owned: bool) -> dict[str, Tensor]:
    path, _, leaf = job.names[0].rpartition(".")
    return _place(path, {leaf: tensor}, store, owned=owned)


def _commit_all(model: nn.Module, done: list[tuple[Job, dict[str, Tensor]]], store: Store) -> None:
    for job, tensors in done:
        commit(model, job, tensors, frozen=any(store.is_offloaded(name) for name in job.names))
    done.clear()


def _is_finite(*tensors: Tensor) -> Tensor:
    """Whether every float32 scale, or every element of one weight, is finite: a 0-d bool on its device."""
    flags = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return torch.stack(flags).all()


def _refuse_non_finite(source: Source, finite: Mapping[str, Tensor]) -> None:
    """One look at the flags of all weights, so that no weight has to wait for its own."""
    bad = [name for name, flag in finite.items() if not flag]
    if bad:
        listed = "\n".join(f"  {name} in {source.tensors[name].file}" for name in bad)
        raise CheckpointError(f"{len(bad)} weights hold NaN or Inf and cannot be quantized:\n{listed}")
