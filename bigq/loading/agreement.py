"""Agreement: a step of several processes succeeds in all of them or in none, and none waits for one that has failed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from bigq import errors
from bigq.errors import BigqError, CheckpointError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Agreement"]


class Agreement:
    """The processes of `mesh`, which all do the same steps in the same order.

    Attributes:
        device: what this process loads onto.
    """

    def __init__(self, mesh: "DeviceMesh", device: torch.device) -> None:
        self._mesh, self.device = mesh, device

    @classmethod
    def of(cls, mesh: object) -> "Agreement":
        """Check a mesh that a user passes.

        Raises:
            ConfigError: it is no DeviceMesh of one or two dimensions, or this process is not in it.
            UnsupportedError: it is a mesh of other devices than GPUs of CUDA or CPUs.
        """
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh) or mesh.ndim not in (1, 2):
            raise ConfigError(f"mesh is {mesh!r}; expected a DeviceMesh of one dimension, or of two (replicas, shards)")
        if mesh.ndim == 2 and not mesh.mesh_dim_names:  # fully_shard takes no other
            raise ConfigError(f"{mesh} has no names for its dimensions: pass mesh_dim_names=('replicas', 'shards')")
        if mesh.get_coordinate() is None:
            raise ConfigError(f"this process is not in {mesh}: only those of the mesh load into it")
        if mesh.device_type not in ("cpu", "cuda"):
            raise UnsupportedError(f"mesh is one of {mesh.device_type} devices; bigq runs on CUDA devices and the CPU")
        device = torch.device("cpu")
        if mesh.device_type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        return cls(mesh, device)

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of the mesh."""
        return not any(self._mesh.get_coordinate() or ())

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Run the block, which waits for no other process, in all processes.

        If it raises in one, it raises in all: that error where it came from, and one of its class elsewhere, which
        says what went wrong and where.
        """
        try:
            yield
        except BaseException as error:
            self._tell(_Failure.of(error))
            raise
        failures = [found for found in self._tell(None) if isinstance(found, _Failure)]
        if failures:
            raise failures[0].as_error()

    def same(self, what: str, own: str) -> None:
        """Raise a CheckpointError in all processes unless `own` is one text in all of them; `what` names it."""
        found = [text for text in self._tell(own) if isinstance(text, str)]
        if len(set(found)) > 1:
            raise CheckpointError(
                f"the processes of the mesh have {len(set(found))} different {what}; "
                "give all of them the same checkpoint, model, config and shard"
            )

    def _tell(self, own: object) -> list[object]:
        """What all processes have said; `own` is what this one says."""
        import torch.distributed as dist

        said: list[object] = [own]
        for dim in range(self._mesh.ndim):  # along each dimension in turn, which reaches all
            group = self._mesh.get_group(dim)
            lists: list[list[object]] = [[] for _ in range(self._mesh.size(dim))]
            dist.all_gather_object(lists, said, group=group)
            said = [item for items in lists for item in items]
        return said


class _Failure:
    """An error of a process, in words that another one can read."""

    def __init__(self, rank: int, kind: str, text: str) -> None:
        self.rank, self.kind, self.text = rank, kind, text

    @classmethod
    def of(cls, error: BaseException) -> "_Failure":
        import torch.distributed as dist

        return cls(dist.get_rank(), type(error).__name__, str(error))

    def as_error(self) -> BigqError:
        kind = getattr(errors, self.kind, None)
        words = f"process {self.rank} failed, so no process has loaded anything: "
        if isinstance(kind, type) and issubclass(kind, BigqError):
            return kind(words + self.text)
        return BigqError(f"{words}{self.kind}: {self.text}")
