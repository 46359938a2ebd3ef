"""cuts: which rows of a tensor each process of a mesh has, found in its DTensor."""

from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor

from bigq.checkpoint import Rows
from bigq.errors import UnsupportedError
from bigq.ops.sharding import chunk_of_rank, is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Cut", "cut_rows", "cuts_of", "rows_of"]


class Cut(NamedTuple):
    """How rows are cut among the processes along one dimension of a mesh: this one gets `rows` of `before`."""

    dim: int
    before: int
    rows: Rows


def cut_rows(dim: int, before: int, processes: int, coordinate: int) -> Cut:
    """Each process gets ceil(before / processes) rows; the last ones may get fewer, or none."""
    start, stop = chunk_of_rank(before, coordinate, processes)
    return Cut(dim, before, Rows(start=start, stop=stop))


def cuts_of(sharded: "DTensor", name: str) -> list[Cut]:
    """How the tensor `name` of a model is cut, from the first dimension of its mesh to the last.

    Raises:
        UnsupportedError: it is cut by another dimension than the first.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh = sharded.device_mesh
    coordinates = mesh.get_coordinate() or ()
    cuts: list[Cut] = []
    rows = len(sharded) if sharded.dim() else 1
    for dim, (coordinate, placement) in enumerate(zip(coordinates, sharded.placements, strict=True)):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not Shard or placement.dim != 0:
            raise UnsupportedError(
                f"{name} is sharded as {placement}; a load reads whole rows, so expected Shard(0) or Replicate()"
            )
        cuts.append(cut_rows(dim, rows, mesh.size(dim), coordinate))
        rows = len(cuts[-1].rows)
    return cuts


def rows_of(name: str, tensor: Tensor) -> Rows | None:
    """The rows that this process keeps of the tensor `name` of a model; None for one that every process has whole.

    Raises:
        UnsupportedError: it is cut otherwise than a load can follow.
    """
    cuts = cuts_of(cast("DTensor", tensor), name) if is_sharded(tensor) else []
    if not cuts:
        return None
    start = sum(cut.rows.start for cut in cuts)
    rows = Rows(start=start, stop=start + len(cuts[-1].rows))
    held = cast("DTensor", tensor).to_local()
    if len(held) != len(rows):
        raise UnsupportedError(
            f"{name}: this process holds {len(held)} rows of {len(tensor)}; expected {len(rows)}, as torch.chunk cuts"
        )
    return rows
