"""fill: read, quantize and place every tensor of a plan, then change the model."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from bigq.checkpoint import Source, StoredTensor
from bigq.commit import commit, restored_on_error
from bigq.device_map import is_gpu
from bigq.errors import CheckpointError
from bigq.formats import TensorSpec
from bigq.model_tensors import find_owner
from bigq.plan import Job, Plan, PlannedLinear, PlannedTensor
from bigq.quantizer import Quantizer
from bigq.runs import Piece, Target
from bigq.stages import Stages
from bigq.store import Store
from bigq.stream import Budget, stream
from bigq.warm_up import WarmUp

__all__ = ["fill"]

_OWN_NBYTES = 1 << 20  # a smaller tensor is read with its neighbours and copied, which takes less than a run of its own
_SMALL_NBYTES = 1 << 20  # torch keeps smaller tensors in segments of their own: they take no memory that was lent


def fill(
    modules: Mapping[str, nn.Module],
    plan: Plan,
    source: Source,
    store: Store,
    *,
    budget: Budget,
    stages: Stages,
    warm_up: WarmUp,
    progress: bool | None = None,
) -> None:
    """Fill the model of these `modules`, by name, from `source` as `plan` and `store` say.

    From a checkpoint, the model changes after the last tensor has arrived and none was found wrong. A model that held
    its own weights changes layer by layer, after all of them were checked, so that each old weight is freed before the
    next is quantized.

    Raises:
        CheckpointError: a tensor cannot be read, or a weight to quantize holds NaN or Inf.
    """
    jobs = plan.jobs()
    done: list[tuple[Job, dict[str, Tensor]]] = []
    for name, job in list(jobs.items()):
        if job.names[0] in store.in_checkpoint:  # it stays there, unread
            done.append((job, {job.names[0].rpartition(".")[2]: store.in_checkpoint[job.names[0]]}))
            del jobs[name]
    hidden = None if progress is None else not progress  # None: hidden unless stderr is a terminal
    total = sum(source.tensors[name].nbytes for name in jobs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=hidden) as bar:  # type: ignore[no-untyped-call]
        if source.in_place:
            warm_up.wait()
            _convert(modules, jobs, source, store, stages, bar.update)
        else:
            done += _Arrivals(jobs, source, store, warm_up).read(budget, stages, bar.update)
    with stages.timed("commit"):
        for job in plan.tensors:  # what the checkpoint does not hold, such as non-persistent buffers
            if job.source is None:
                own: Tensor = getattr(*find_owner(modules, job.names[0]))
                done.append((job, _place(job, own.detach(), store)))
        done += [(job, {}) for job in plan.linears if job.source is None]
        done.sort(key=lambda entry: isinstance(entry[0], PlannedTensor))  # modules before the tensors that go into them
        with restored_on_error(modules):
            for planned, tensors in done:
                _commit(modules, planned, tensors, store)


def _convert(
    modules: Mapping[str, nn.Module],
    jobs: Mapping[str, Job],
    source: Source,
    store: Store,
    stages: Stages,
    progressed: Callable[[int], object],
) -> None:
    """Check the weights of a model that holds them, then carry out the jobs one by one."""
    weights = [name for name, job in jobs.items() if isinstance(job, PlannedLinear)]
    finite = {name: tensor.isfinite().all() for name, tensor in source.read(weights)}
    _refuse_non_finite(source, [name for name, flag in finite.items() if not flag])
    quantizer = Quantizer()
    for name, tensor in source.read(jobs):
        job, nbytes = jobs[name], tensor.nbytes
        with stages.timed("quantize", nbytes):
            if isinstance(job, PlannedLinear):
                piece = Piece(source.tensors[name], 0, tensor.to(store.work_device(job)))
                ((_, state),) = quantizer.quantize([(job, piece)])
                del piece
                placed = store.put_state(job, state)
            else:
                placed = _place(job, tensor, store)
        del tensor  # or it would outlive its replacement by one turn
        _commit(modules, job, placed, store)
        progressed(nbytes)


class _Arrivals:
    """What has arrived of a checkpoint, finished and in its place, beside the model."""

    def __init__(self, jobs: Mapping[str, Job], checkpoint: Source, store: Store, warm_up: WarmUp) -> None:
        self.jobs, self.checkpoint, self.store, self.warm_up = jobs, checkpoint, store, warm_up
        self.quantizer = Quantizer()
        self.states: dict[str, dict[str, Tensor]] = {}  # by source name
        self.targets: dict[str, Target] = {}
        self.to_take: dict[str, int] = {}  # bytes on a GPU of each quantized weight
        self.to_come: Counter[torch.device] = Counter()  # bytes of quantized weights that GPUs do not hold yet
        lent = cache(lambda device, splits: Target(device=device, splits=splits))  # one for all linears on a device
        for name, job in jobs.items():
            if isinstance(job, PlannedLinear):
                self.targets[name] = lent(store.work_device(job), not job.transposed)
                self.to_take[name] = self._nbytes_on_gpu(job)
                self.to_come[self.targets[name].device] += self.to_take[name]
            else:
                self.targets[name] = self._target(checkpoint.tensors[name], job)

    def read(
        self, budget: Budget, stages: Stages, progressed: Callable[[int], object]
    ) -> list[tuple[Job, dict[str, Tensor]]]:
        """Read everything; `progressed` is told bytes."""
        for pieces in stream(self.checkpoint, self.targets, budget, stages, self.to_come.__getitem__):
            nbytes = sum(piece.tensor.nbytes for piece in pieces)
            if any(isinstance(self.jobs[piece.info.name], PlannedLinear) for piece in pieces):
                with stages.timed("wait"):
                    self.warm_up.wait()
            with stages.timed("quantize", nbytes):
                self._take(pieces)
            del pieces  # or they would outlive their replacements by one turn
            progressed(nbytes)
        with stages.timed("quantize"):
            _refuse_non_finite(self.checkpoint, self.quantizer.non_finite(self.states))
        return [(self.jobs[name], state) for name, state in self.states.items()]

    def _target(self, info: StoredTensor, job: PlannedTensor) -> Target:
        stays = job.spec == TensorSpec(shape=tuple(info.shape), dtype=info.dtype)
        own = partial(self.store.receive, job, info.dtype) if stays and info.nbytes >= _OWN_NBYTES else None
        return Target(device=self.store.work_device(job), own=own)

    def _take(self, pieces: list[Piece]) -> None:
        weights: list[tuple[PlannedLinear, Piece]] = []
        for piece in pieces:
            job = self.jobs[piece.info.name]
            if isinstance(job, PlannedLinear):
                weights.append((job, piece))
            else:
                self._keep(job, piece)
        if weights:
            self._quantize(weights)

    def _quantize(self, weights: list[tuple[PlannedLinear, Piece]]) -> None:
        device = self.targets[weights[0][1].info.name].device
        if weights[0][1].tensor.device != device:  # a view of a file
            weights = [(job, piece._replace(tensor=piece.tensor.to(device))) for job, piece in weights]
        for job, state in self.quantizer.quantize(weights):
            assert job.source is not None
            self.states[job.source] = self.store.put_state(job, state)
            self.to_come[device] -= self.to_take[job.source]

    def _nbytes_on_gpu(self, linear: PlannedLinear) -> int:
        """Bytes of lent memory that a quantized weight will take over on a GPU; until then, others may have them."""
        description = linear.description
        is_large = description.state_spec["weight"].nbytes > _SMALL_NBYTES
        return description.nbytes if is_large and is_gpu(self.store.resting[linear.names[0]]) else 0

    def _keep(self, job: PlannedTensor, piece: Piece) -> None:
        """Copy rows of a tensor that is not quantized to where it stays, unless they were read there."""
        name, tensor = piece.info.name, piece.tensor
        if not piece.is_lent:
            self.states[name] = _place(job, tensor, self.store)
            return
        if name not in self.states:
            self.states[name] = _place(job, self.store.receive(job, job.spec.dtype), self.store)
        (memory,) = self.states[name].values()
        if tensor.shape != memory.shape:
            memory = memory[piece.start : piece.start + len(tensor)]
        memory.copy_(tensor.to(memory.device))  # cast at the end of the link: it is shorter there


def _place(job: PlannedTensor, tensor: Tensor, store: Store) -> dict[str, Tensor]:
    return {job.names[0].rpartition(".")[2]: store.put(job, tensor)}


def _commit(modules: Mapping[str, nn.Module], job: Job, tensors: Mapping[str, Tensor], store: Store) -> None:
    frozen = isinstance(job, PlannedTensor) and any(store.is_offloaded(name) for name in job.names)
    commit(modules, job, tensors, frozen=frozen)


def _refuse_non_finite(source: Source, bad: list[str]) -> None:
    if bad:
        listed = "\n".join(f"  {name} in {source.tensors[name].where}" for name in bad)
        raise CheckpointError(f"{len(bad)} weights hold NaN or Inf and cannot be quantized:\n{listed}")
