"""Gathers: all rows of tensors that are cut among processes, one tensor at a time, so that no process waits in vain."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bigq.formats import TensorSpec
from bigq.loading.cuts import Cut
from bigq.system.distributed.internals import all_gather

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Gathers"]


class _Step(NamedTuple):
    """The gather along one dimension of a mesh: each process sends a chunk of this shape; `before` rows are kept."""

    mesh: "DeviceMesh"
    cut: Cut
    chunk: tuple[int, ...]
    dtype: torch.dtype

    @property
    def processes(self) -> int:
        return self.mesh.size(self.cut.dim)

    @property
    def nbytes(self) -> int:
        return TensorSpec(shape=self.chunk, dtype=self.dtype).nbytes


class Gathers:
    """Gathers, in one order in all processes. All memory that they send and receive is taken when this is made.

    A process that fails between two of them still takes part in those that are left: see `taken_part_in`.

    Args:
        tensors: the mesh, the cuts and the whole shape and dtype of each, in the order of the calls.
        device: of the tensors.
    """

    def __init__(self, tensors: Iterable[tuple["DeviceMesh", list[Cut], TensorSpec]], device: torch.device) -> None:
        self.device = device
        self._left = [
            [
                _Step(mesh, cut, (-(-cut.before // mesh.size(cut.dim)), *spec.shape[1:]), spec.dtype)
                for cut in reversed(cuts)
            ]
            for mesh, cuts, spec in tensors
        ]
        steps = [step for each in self._left for step in each]
        self._sent = _memory(max((step.nbytes for step in steps), default=0), device)
        self._received = _memory(max((step.nbytes * step.processes for step in steps), default=0), device)

    def next(self, own: Tensor) -> Tensor:
        """All rows of the next tensor, of which this process has its `own`, in new memory."""
        steps = self._left[0]
        while steps:
            step = steps[0]
            sent = _view(self._sent, step.chunk, step.dtype)
            sent[: len(own)] = own
            sent[len(own) :] = 0  # only the last chunks are shorter
            own = self._gather(steps)[: step.cut.before]
        del self._left[0]
        return own.clone()

    @contextmanager
    def taken_part_in(self) -> Iterator[None]:
        """After an error in the block, take part in the gathers that are left, with any numbers, and raise it then."""
        try:
            yield
        except BaseException:
            for steps in self._left:
                while steps:
                    self._gather(steps)
            raise

    def _gather(self, steps: list[_Step]) -> Tensor:
        """Carry out the first of `steps`, and remove it: what has failed once is not left."""
        step = steps.pop(0)
        whole = _view(self._received, (step.processes * step.chunk[0], *step.chunk[1:]), step.dtype)
        all_gather(whole, _view(self._sent, step.chunk, step.dtype), step.mesh.get_group(step.cut.dim))
        return whole


def _memory(nbytes: int, device: torch.device) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _view(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[: TensorSpec(shape=shape, dtype=dtype).nbytes].view(dtype).view(shape)
