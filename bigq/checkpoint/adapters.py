"""Adapters: a source whose tensors have other names, or are stacked. The bytes stay where they are."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from bigq.checkpoint.source import Source, Span, StoredTensor, refuse_unknown
from bigq.errors import CheckpointError
from bigq.system.text import shortlist

__all__ = ["Adapter", "Renamed", "Stacked"]


class Adapter:
    """What adapters of `source` share: its tensors are where those of `source` are."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def in_place(self) -> bool:
        return self._source.in_place

    def check(self) -> None:
        """Raise what `source` raises."""
        self._source.check()


class Renamed(Adapter):
    """`source` with other names: `names` says {name in the source: new name}, and what it leaves out keeps its name.

    Names may be exchanged. Raises CheckpointError where `source` does not hold a name, or two tensors get the same.
    """

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        super().__init__(source)
        refuse_unknown(names, source.tensors, "the source to rename tensors of")
        self._new_names = dict(names)
        self._old_names: dict[str, str] = {}
        tensors: dict[str, StoredTensor] = {}
        clashes: list[str] = []
        for old, stored in source.tensors.items():
            new = self._new_names.get(old, old)
            if new in tensors:
                clashes.append(f"{new!r} for {self._old_names[new]!r} and {old!r}")
                continue
            tensors[new] = stored if new == old else replace(stored, name=new)
            self._old_names[new] = old
        if clashes:
            raise CheckpointError(f"two tensors would get one name: {shortlist(clashes)}")
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (new name, tensor) as `source` reads them."""
        refuse_unknown(names, self.tensors, "the renamed source")
        arriving = self._source.read([self._old_names[name] for name in names])
        return ((self._new_names.get(old, old), tensor) for old, tensor in arriving)


class Stacked(Adapter):
    """`source` with tensors put together: `stacks` says {new name: names of E tensors that look alike}.

    A stack has the shape [E, ...] and its members in the order of the list; they are no tensors of their own any more.
    It stands where the last of them stood, so that one pass over `source` completes one stack after the other. Raises
    CheckpointError where `source` does not hold a member, members differ in shape or dtype, one is in two stacks, or
    the new name is taken.
    """

    def __init__(self, source: Source, stacks: Mapping[str, Sequence[str]]) -> None:
        super().__init__(source)
        self._members = {name: tuple(members) for name, members in stacks.items()}
        self._places: dict[str, tuple[str, int]] = {}  # {member: (stack, position)}
        for name, members in self._members.items():
            refuse_unknown(members, source.tensors, f"the source of the stack {name!r}")
            for position, member in enumerate(members):
                if member in self._places:
                    raise CheckpointError(f"{member!r} is twice in stacks: in {self._places[member][0]!r} and {name!r}")
                self._places[member] = name, position
        made = {name: _stack(name, [source.tensors[m] for m in members]) for name, members in self._members.items()}
        taken = [name for name in made if name in source.tensors and name not in self._places]
        if taken:
            raise CheckpointError(f"the source holds tensors with names of stacks: {shortlist(taken)}")
        missing = {name: len(members) for name, members in self._members.items()}
        tensors: dict[str, StoredTensor] = {}
        for name, stored in source.tensors.items():
            if name not in self._places:
                tensors[name] = stored
                continue
            stack, _ = self._places[name]
            missing[stack] -= 1
            if not missing[stack]:
                tensors[stack] = made[stack]
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) in order, in one pass over `source`; a stack is a copy of its members."""
        refuse_unknown(names, self.tensors, "the stacked source")
        wanted = [member for name in dict.fromkeys(names) for member in self._members.get(name, (name,))]
        return self._put_together(self._source.read(wanted))

    def _put_together(self, arriving: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        stacks: dict[str, Tensor] = {}
        missing: dict[str, int] = {}
        for name, tensor in arriving:
            if name not in self._places:
                yield name, tensor
                continue
            stack, position = self._places[name]
            if stack not in stacks:
                stored = self.tensors[stack]
                stacks[stack] = torch.empty(stored.shape, dtype=stored.dtype, device=tensor.device)
                missing[stack] = stored.shape[0]
            stacks[stack][position] = tensor  # at once: it may be a view of a file, good until the next step
            missing[stack] -= 1
            if not missing[stack]:
                yield stack, stacks.pop(stack)


def _stack(name: str, members: Sequence[StoredTensor]) -> StoredTensor:
    """The description of `members` as one tensor; without spans if one of them has none."""
    if not members:
        raise CheckpointError(f"the stack {name!r} has no members")
    first = members[0]
    unlike = [member for member in members if (member.shape, member.dtype) != (first.shape, first.dtype)]
    if unlike:
        raise CheckpointError(
            f"the stack {name!r} needs tensors that look alike: {first.name!r} is {first.dtype} {list(first.shape)}, "
            f"{unlike[0].name!r} in {unlike[0].where} is {unlike[0].dtype} {list(unlike[0].shape)}"
        )
    return StoredTensor(
        name=name,
        shape=torch.Size([len(members), *first.shape]),
        dtype=first.dtype,
        where=shortlist(list(dict.fromkeys(member.where for member in members)), limit=2),
        spans=_joined(members) if all(member.spans for member in members) else (),
    )


def _joined(members: Sequence[StoredTensor]) -> tuple[Span, ...]:
    """The spans of all members; those that adjoin are one, so that a stack that lies in one piece is read as one."""
    joined: list[Span] = []
    for span in (span for member in members for span in member.spans):
        last = joined[-1] if joined else None
        if last is not None and last.source is span.source and last.offset + last.nbytes == span.offset:
            joined[-1] = last._replace(nbytes=last.nbytes + span.nbytes)
        elif last is None or span.nbytes:
            joined.append(span)
    return tuple(joined)
