"""Packed units: in one piece of memory, the rows that a process has of the weights of a unit; in another, the whole.

The whole lies at the same place in each step, and what autograd has saved is right again once it is gathered again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from bigq.errors import UnsupportedError
from bigq.integrations.unit_tags import TAG_NBYTES, tag_of
from bigq.ops.sharding import chunk_of_rank, from_shard, is_sharded
from bigq.system.distributed.internals import sharded_as
from bigq.system.internals import SEES_EDITS, version_of
from bigq.weight.quantized_module import QuantizedModule

__all__ = ["Alike", "CutWeight", "Memory", "Packed", "Place"]

_ALIGNMENT = TAG_NBYTES  # bytes at which each weight begins
Place = tuple[nn.Module, str]


Alike = dict[tuple[torch.Size, torch.dtype], DTensor]


@dataclass(frozen=True)
class CutWeight:
    """A tensor of some modules, of which each process of a mesh of one dimension has some rows.

    Args:
        places: all modules and names where it stands.
        like: a DTensor of its shape and dtype, on meta.
    """

    places: tuple[Place, ...]
    like: DTensor

    @classmethod
    def of(cls, places: Sequence[Place], mesh: DeviceMesh, alike: Alike) -> "CutWeight":
        """Leave the rows of this process in `places`, where the whole tensor, or a DTensor of rows, stands.

        `alike` has what `like` is of weights that were cut before: the blocks of a model have the same few shapes.
        """
        own = _held(places[0])
        key = own.shape, own.dtype
        if key not in alike:
            alike[key] = _like(own, mesh)
        cut = cls(tuple(places), alike[key])
        if not is_sharded(own):
            start, stop = chunk_of_rank(len(own), mesh.get_local_rank(), mesh.size())
            cut.put(cut.shard_of(own.data[start:stop].clone()))
        return cut

    @property
    def shape(self) -> torch.Size:
        """That of the whole."""
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def held(self) -> nn.Parameter:
        """What stands in the modules now."""
        return _held(self.places[0])

    @property
    def chunk(self) -> int:
        """Bytes that each process sends. The last ones may have fewer rows, and send a filling."""
        shape = self.shape
        return -(-shape[0] // self.like.device_mesh.size()) * prod(shape[1:]) * self.dtype.itemsize

    def put(self, tensor: nn.Parameter) -> None:
        """Let `tensor` stand in the modules."""
        for module, name in self.places:
            module._parameters[name] = tensor

    def allow_writes(self) -> None:
        """Let the modules take writes, as shards stand in them."""
        for module, _ in self.places:
            if isinstance(module, QuantizedModule):
                vars(module)["_is_gathered"] = False

    def shard_of(self, rows: Tensor) -> nn.Parameter:
        """The tensor whose `rows` this process has."""
        return nn.Parameter(sharded_as(rows, self.like), requires_grad=False)


def _like(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """A DTensor of the shape and dtype of `whole`, without numbers: 0.1 ms, and one that is made like it 5 us."""
    rows = torch.empty(-(-len(whole) // mesh.size()), *whole.shape[1:], dtype=whole.dtype, device="meta")
    return from_shard(rows, mesh, [Shard(0)], whole.shape)


class Memory:
    """Memory in which units with weights of the same `sizes` in bytes are whole in turn."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device) -> None:
        self.sizes = sizes
        self.bytes = torch.empty(sum(map(_aligned, sizes)), dtype=torch.uint8, device=device)
        self.owner: Packed | None = None


class Packed:
    """The rows that this process has of the weights of a unit in one piece of memory, and its whole weights.

    Args:
        index: of the unit, which is sent with the rows.
        weights: of the unit. Their shards become views of that memory.
        memory: where they are whole.
    """

    def __init__(self, index: int, weights: Sequence[CutWeight], memory: Memory) -> None:
        self.index, self.weights, self.memory = index, weights, memory
        device, processes = memory.bytes.device, weights[0].like.device_mesh.size()
        nbytes = sum(_aligned(weight.chunk) for weight in weights)
        self.rows = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.tags = torch.empty(processes, TAG_NBYTES, dtype=torch.uint8, device=device)  # what the processes have sent
        self.shards: list[nn.Parameter] = []
        self._own: list[Tensor] = []  # their memory
        self.whole: list[nn.Parameter] = []
        self.versions: list[int] = []  # of whole weights that nobody has written to
        self.sent: list[Tensor] = []
        self.received: list[Tensor] = []  # from all processes: their rows, in their order, are the whole weight
        self.is_whole = False
        # Attributes of modules, which nn.Module's own lookup finds ten times slower, for all weights of a block.
        self._places = [(vars(module), name, i) for i, own in enumerate(weights) for module, name in own.places]
        modules = dict.fromkeys(module for weight in weights for module, _ in weight.places)
        self._guarded = [vars(module) for module in modules if isinstance(module, QuantizedModule)]
        self.arrived = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        from_start = in_memory = 0
        for weight in weights:
            shard = cast(DTensor, weight.held).to_local().detach()
            # A tensor that begins where its storage does: torch 2.13 cannot copy.deepcopy a DTensor of another.
            nbytes = shard.numel() * shard.itemsize
            own = torch.from_dlpack(self.rows[from_start : from_start + nbytes])  # type: ignore[attr-defined]
            self._own.append(own)
            self.shards.append(weight.shard_of(own.view(weight.dtype).view(shard.shape).copy_(shard)))
            weight.put(self.shards[-1])
            piece = memory.bytes[in_memory : in_memory + processes * weight.chunk]
            self.sent.append(self.rows[from_start : from_start + weight.chunk])
            self.received.append(piece)
            numbers = piece.view(weight.dtype)[: prod(weight.shape)].view(weight.shape)
            # `.data`: it gets other numbers without a new version, so that autograd takes what it saved as unchanged.
            self.whole.append(nn.Parameter(numbers.data, requires_grad=False))
            self.versions.append(version_of(self.whole[-1]))
            from_start += _aligned(weight.chunk)
            in_memory += _aligned(processes * weight.chunk)
        self.sent.append(tag_of(index).to(device))
        self.received.append(self.tags.view(-1))

    @property
    def is_current(self) -> bool:
        """Whether the modules hold these tensors, and no others that were assigned since."""
        own = self.whole if self.is_whole else self.shards
        return all(attributes["_parameters"][name] is own[i] for attributes, name, i in self._places)

    @property
    def edits(self) -> list[int]:
        """How often each shard was written to."""
        # torch counts an op on a DTensor, and one on the memory of its rows, apart.
        return [version_of(tensor) for tensor in (*self.shards, *self._own)]

    def put(self, *, is_gathered: bool, is_whole: bool) -> None:
        """Let the whole weights, or the shards, stand where either stands now. Writes to gathered ones are refused."""
        before = self.whole if self.is_whole else self.shards
        after = self.whole if is_whole else self.shards
        self.is_whole = is_whole
        for attributes, name, i in self._places:
            parameters = attributes["_parameters"]
            if parameters[name] is before[i]:  # and no tensor that was assigned since
                parameters[name] = after[i]
        for attributes in self._guarded:
            attributes["_is_gathered"] = is_gathered

    def drop(self) -> None:
        """Let the shards stand in the modules, which may be written to then, and forget what was gathered."""
        if self.memory.owner is self:
            self.memory.owner = None
            self.put(is_gathered=False, is_whole=False)
            self._refuse_lost_write()

    def _refuse_lost_write(self) -> None:
        if not SEES_EDITS:
            return
        counted = [i for i, own in enumerate(self.whole) if version_of(own) != self.versions[i]]
        # torch counts `set_` of the same numbers too, with which a parametrization begins, as that of PEFT for experts.
        written = [i for i in counted if not self._holds_own_rows(i)]
        for i in counted:
            self.whole[i] = nn.Parameter(self.whole[i].data, requires_grad=False)
            self.versions[i] = version_of(self.whole[i])
        if written:
            module, name = self.weights[written[0]].places[0]
            raise UnsupportedError(
                f"{name} of {type(module).__name__} was written to while it was gathered for a call, and the write is "
                "lost: call reshard_frozen(model) before the write, and repeat it"
            )

    def _holds_own_rows(self, index: int) -> bool:
        """Whether a whole weight still holds the bytes that this process has sent. A process looks at its own alone."""
        if self.arrived is not None:
            torch.cuda.current_stream(self.rows.device).wait_event(self.arrived)
        own, mesh = cast(DTensor, self.shards[index]).to_local(), self.weights[index].like.device_mesh
        start, stop = chunk_of_rank(len(self.whole[index]), mesh.get_local_rank(), mesh.size())
        sent, held = (rows.detach().reshape(-1).view(torch.uint8) for rows in (own, self.whole[index][start:stop]))
        return torch.equal(sent, held)


def _held(place: Place) -> nn.Parameter:
    module, name = place
    return cast(nn.Parameter, module._parameters[name])


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
