"""Jobs: what a load does with each tensor of a source, from where it is to arrive to its place in the model."""

from collections.abc import Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from bigq.checkpoint import StoredTensor
from bigq.formats import State, TensorSpec
from bigq.loading.batch_quantizer import BatchQuantizer
from bigq.loading.commit import commit_tensor, commit_weight
from bigq.loading.destinations import Destinations
from bigq.loading.runs import Piece, Target
from bigq.model.tree import held_tensor, is_dense
from bigq.planning.device_map import is_gpu
from bigq.planning.plan import PlannedTensor, PlannedWeight

__all__ = ["Batch", "Job", "TensorJob", "WeightJob"]

_OWN_NBYTES = 1 << 20  # a smaller tensor is read with its neighbours and copied, which takes less than a run of its own
_SMALL_NBYTES = 1 << 20  # torch keeps smaller tensors in segments of their own, which larger ones cannot use


class Job(Protocol):
    """What becomes of one tensor of a source. Nothing changes a model before `commit`."""

    @property
    def planned(self) -> PlannedTensor | PlannedWeight:
        """What is planned for it."""

    def target(self, stored: StoredTensor) -> Target:
        """How the tensor is to arrive."""

    def take(self, piece: Piece) -> None:
        """Take a piece of it that has arrived."""

    def commit(self, modules: Mapping[str, nn.Module]) -> None:
        """Put what it became into the model of these modules, by name; the job then holds nothing."""

    def take_placed(self) -> dict[str, Tensor]:
        """What it became, by first name in the model, for a caller that commits it; the job then holds nothing."""


class TensorJob:
    """A tensor that is kept as it is, or cast."""

    def __init__(self, planned: PlannedTensor, destinations: Destinations) -> None:
        self.planned, self.destinations = planned, destinations
        self._placed: Tensor | None = destinations.in_checkpoint.get(planned.names[0])

    @property
    def is_done(self) -> bool:
        """Whether it needs no reading: it stays in the checkpoint's file."""
        return self._placed is not None

    def target(self, stored: StoredTensor) -> Target:
        own = TensorSpec(shape=tuple(stored.shape), dtype=stored.dtype)
        stays = stored.coding is None and self.planned.spec == own
        allocate = None
        if stays and stored.nbytes >= _OWN_NBYTES:
            allocate = partial(self.destinations.receive, self.planned, stored.dtype)
        return Target(device=self.destinations.work_device(self.planned.names[0]), allocate=allocate)

    def take(self, piece: Piece) -> None:
        """Copy rows to where they stay, unless they were read there."""
        if not piece.is_temporary:
            placed = self.destinations.put(self.planned, piece.tensor)
            self._placed = self.destinations.moved(self.planned.names[0], placed)
            return
        if self._placed is None:
            self._placed = self.destinations.put(
                self.planned, self.destinations.receive(self.planned, self.planned.spec.dtype)
            )
        memory = self._placed
        if piece.tensor.shape != memory.shape:
            memory = memory[piece.start : piece.start + len(piece.tensor)]
        memory.copy_(piece.tensor.to(memory.device))  # cast at the end of the link: it is shorter there

    def take_own(self, modules: Mapping[str, nn.Module]) -> None:
        """Take the tensor that the model holds already."""
        own = held_tensor(modules, self.planned.names[0])
        self._placed = self.destinations.put(self.planned, own.detach() if is_dense(own) else own)

    def commit(self, modules: Mapping[str, nn.Module]) -> None:
        frozen = any(self.destinations.is_offloaded(name) for name in self.planned.names)
        (tensor,) = self.take_placed().values()
        commit_tensor(modules, self.planned, tensor, frozen=frozen)

    def take_placed(self) -> dict[str, Tensor]:
        """The tensor, by its first name in the model; the job then holds nothing."""
        assert self._placed is not None
        placed, self._placed = self._placed, None
        return {self.planned.names[0]: placed}


class WeightJob:
    """A float weight that is quantized; with others, in the `batch` that it is given to."""

    def __init__(self, planned: PlannedWeight, destinations: Destinations, batch: "Batch") -> None:
        self.planned, self.destinations, self.batch = planned, destinations, batch
        name, place = planned.names[0], destinations.places.get(planned.names[0], "")
        self.device = destinations.runs_on  # where it is quantized
        if place:
            self.device = destinations.work_device(name, runs=True)
        self._stays_on_gpu = bool(place) and is_gpu(place)
        self._placed: dict[str, Tensor] = {}  # by first name in the model

    def lent_nbytes(self, run_nbytes: int) -> int:
        """Bytes of GPU memory that the quantized weight will take, and that runs of `run_nbytes` may use until then.

        Only a weight that torch's allocator puts into what a run has left: it does not join the memory of two runs for
        a stack of experts, and reserved 1.5 times the peak of a load of Qwen3-30B-A3B.
        """
        fits = _SMALL_NBYTES < self.planned.description.state_spec["packed"].nbytes <= run_nbytes
        return self.planned.nbytes if fits and self._stays_on_gpu else 0

    def target(self, stored: StoredTensor) -> Target:
        return self.batch.target(self.device, self.planned)

    def take(self, piece: Piece) -> None:
        self.batch.add(self, piece)

    def finish(self, state: dict[str, Tensor], quantizer: BatchQuantizer) -> None:
        """Put the quantized weight where it is stored."""
        tensors = {self.planned.tensor_name(part): tensor for part, tensor in state.items()}
        for ref in self.planned.refs:
            if ref.described:
                tensors[ref.quant_states[0]] = quantizer.quant_state(ref.described, self.device)
        self._placed = self.destinations.put_state(self.planned, tensors)

    def state(self) -> State:
        """The quantized weight, by part."""
        return {part: self._placed[self.planned.tensor_name(part)] for part in self.planned.description.state_spec}

    def take_placed(self) -> dict[str, Tensor]:
        """The tensors of the quantized weight, by their first names in the model; the job then holds nothing."""
        placed, self._placed = self._placed, {}
        return placed

    def commit(self, modules: Mapping[str, nn.Module]) -> None:
        commit_weight(modules, self.planned, self.take_placed())


class Batch:
    """Weights that have arrived together, quantized together."""

    def __init__(self) -> None:
        self.quantizer = BatchQuantizer()
        self._items: list[tuple[WeightJob, Piece]] = []
        self._targets: dict[tuple[torch.device, bool, int], Target] = {}

    def target(self, device: torch.device, planned: PlannedWeight) -> Target:
        """How weights such as `planned` are to arrive; one Target for all that are alike."""
        description, weight_format = planned.description, planned.description.format
        is_stack = len(description.shape) > 2
        in_groups = not is_stack or description.shape[-2] % weight_format.row_group == 0
        takes_whole = weight_format.takes_whole(planned.method)
        splits = in_groups and not takes_whole and (is_stack or not description.transposed)
        key = device, splits, 1 if is_stack else weight_format.row_group
        if key not in self._targets:
            self._targets[key] = Target(device=device, may_split=splits, row_group=key[2])
        return self._targets[key]

    def add(self, job: WeightJob, piece: Piece) -> None:
        self._items.append((job, piece))

    @property
    def is_empty(self) -> bool:
        return not self._items

    def quantize(self) -> list[WeightJob]:
        """Quantize what was added; the jobs that are finished by it."""
        items, self._items = self._items, []
        if not items:
            return []
        jobs = {id(job.planned): job for job, _ in items}
        device = items[0][0].device
        pieces = [(job.planned, piece) for job, piece in items]
        if pieces[0][1].tensor.device != device:  # views of a file, or of a model
            pieces = [(planned, piece._replace(tensor=piece.tensor.to(device))) for planned, piece in pieces]
        del items
        finished = []
        for planned, state in self.quantizer.quantize(pieces):
            jobs[id(planned)].finish(state, self.quantizer)
            finished.append(jobs[id(planned)])
        return finished
