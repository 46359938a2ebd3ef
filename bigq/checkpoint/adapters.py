"""Adapters: a source whose tensors have other names, or are made of others. Bytes stay where they are if they can."""

from bisect import bisect_right
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from bigq.checkpoint.scaled_rows import ScaledRows
from bigq.checkpoint.source import Source, StoredTensor, refuse_unknown
from bigq.checkpoint.spans import Span, cut_out, joined
from bigq.errors import CheckpointError
from bigq.system.internals import cut
from bigq.system.text import shortlist

__all__ = ["Adapter", "Completed", "Conversion", "Converted", "Renamed"]


class Adapter:
    """What adapters of `source` share: its tensors are where those of `source` are."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def in_place(self) -> bool:
        return self._source.in_place

    @property
    def is_of_bitsandbytes(self) -> bool:
        """Whether bitsandbytes has quantized weights of it."""
        return isinstance(self._source, Adapter) and self._source.is_of_bitsandbytes

    def check(self) -> None:
        """Raise what `source` raises."""
        self._source.check()


class Renamed(Adapter):
    """`source` with other names: `names` says {name in the source: new name}, and what it leaves out keeps its name.

    A tensor whose new name is None is left out. Names may be exchanged. Raises CheckpointError where `source` does not
    hold a name, or two tensors get the same.
    """

    def __init__(self, source: Source, names: Mapping[str, str | None]) -> None:
        super().__init__(source)
        refuse_unknown(names, source.tensors, "the source to rename tensors of")
        self._old_names: dict[str, str] = {}
        tensors: dict[str, StoredTensor] = {}
        clashes: list[str] = []
        for old, stored in source.tensors.items():
            new = names.get(old, old)
            if new is None:
                continue
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
        new_names = {self._old_names[name]: name for name in names}
        return ((new_names[old], tensor) for old, tensor in self._source.read(list(new_names)))


class Completed(Adapter):
    """`source`, and the tensors `names` of `other`, which `source` must not hold."""

    def __init__(self, source: Source, other: Source, names: Collection[str]) -> None:
        super().__init__(source)
        refuse_unknown(names, other.tensors, "the source to complete another from")
        self._other, self._own = other, frozenset(names)
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(
            {**source.tensors, **{name: other.tensors[name] for name in names}}
        )

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor): first those of `source`, then those of the other."""
        yield from self._source.read([name for name in names if name not in self._own])
        yield from self._other.read([name for name in names if name in self._own])


class Conversion(NamedTuple):
    """`convert` makes the tensors called `names` of those called `members`, both in these orders.

    `moves_rows` says that it does nothing but put whole rows (along the last dimension) in another order, as stacking,
    concatenating and splitting do. Those of one `kind` put the rows of members of the same shapes in the same order.
    """

    members: tuple[str, ...]
    names: tuple[str, ...]
    convert: Callable[[list[Tensor]], list[Tensor]]
    moves_rows: bool = False
    kind: Hashable = None


class Converted(Adapter):
    """`source` with tensors that are made of others: stacked, split, transposed.

    The members of a conversion are no tensors of their own any more. What is made of them stands where the last of them
    stood, so that one pass over `source` completes one conversion after the other. It has spans where its bytes are
    those of its members in at most as many pieces as there are members. Raises CheckpointError where `source` does not
    hold a member, one is in two conversions, a new name is taken, or `convert` raises for tensors on meta.
    """

    def __init__(self, source: Source, conversions: Sequence[Conversion]) -> None:
        super().__init__(source)
        self._of: dict[str, Conversion] = {}  # by each member
        self._maker: dict[str, Conversion] = {}  # by each new name
        for conversion in conversions:
            made = shortlist([repr(name) for name in conversion.names])
            refuse_unknown(conversion.members, source.tensors, f"the source to make {made} of")
            members = dict.fromkeys(conversion.members, conversion)
            if not members:
                raise CheckpointError(f"{made} would be made of no tensors")
            if len(members) < len(conversion.members) or not members.keys().isdisjoint(self._of):
                raise CheckpointError(f"to make {made}, a tensor is taken twice, of {shortlist(conversion.members)}")
            self._of |= members
            self._maker |= dict.fromkeys(conversion.names, conversion)
        taken = [name for name in self._maker if name in source.tensors and name not in self._of]
        if taken or len(self._maker) < sum(len(conversion.names) for conversion in conversions):
            raise CheckpointError(f"tensors to be made have names that are taken: {shortlist(taken or [*self._maker])}")
        moved: _Moved = {}
        missing = {id(conversion): len(conversion.members) for conversion in conversions}
        tensors: dict[str, StoredTensor] = {}
        for name, stored in source.tensors.items():
            member_of = self._of.get(name)
            if member_of is None:
                tensors[name] = stored
                continue
            missing[id(member_of)] -= 1
            if not missing[id(member_of)]:
                tensors |= _made(member_of, [source.tensors[member] for member in member_of.members], moved)
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) in order, in one pass over `source`; what is made of members is a copy of them."""
        refuse_unknown(names, self.tensors, "the converted source")
        wanted = {
            member: None for name in names for member in (self._maker[name].members if name in self._maker else (name,))
        }
        return self._convert(self._source.read(list(wanted)), set(names))

    def _convert(self, arriving: Iterator[tuple[str, Tensor]], wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
        waiting: dict[int, dict[str, Tensor]] = {}
        for name, tensor in arriving:
            conversion = self._of.get(name)
            if conversion is None:
                yield name, tensor
                continue
            members = waiting.setdefault(id(conversion), {})
            members[name] = tensor.clone()  # it may be a view of a file, good until the next step
            if len(members) == len(conversion.members):
                del waiting[id(conversion)]
                made = conversion.convert([members[member] for member in conversion.members])
                del members
                for new, result in zip(conversion.names, made, strict=True):
                    if new in wanted:
                        yield new, result


_Piece = tuple[int, int, int]  # a member, its first row that is taken, and how many are
_Moved = dict[Hashable, list[tuple[torch.Size, list[_Piece]]] | None]  # shapes and pieces, by kind and members


def _made(conversion: Conversion, members: Sequence[StoredTensor], moved: _Moved) -> dict[str, StoredTensor]:
    """The descriptions of what `conversion` makes of `members`, by name; `moved` is what is known of its kind."""
    where = shortlist(list(dict.fromkeys(member.where for member in members)), limit=2)
    results = None
    codings = {None if member.coding is None else member.coding.kind for member in members}
    coding = members[0].coding
    are_rows = len(codings) == 1 and (coding is None or not coding.transposed)
    if conversion.moves_rows and are_rows and all(member.spans for member in members):
        kind = id(conversion) if conversion.kind is None else conversion.kind
        key = kind, len(conversion.names), tuple((member.shape, member.dtype) for member in members), *codings
        if key not in moved:  # 5 ms for 128 experts, and a model has as many alike as layers
            moved[key] = _moved_rows(conversion, members)
        results = moved[key]
    found: list[tuple[torch.Size, torch.dtype, tuple[Span, ...], ScaledRows | None]]
    if results is None:
        found = [(tensor.shape, tensor.dtype, (), None) for tensor in _made_on_meta(conversion, members)]
    else:
        dtype = members[0].dtype
        found = [(shape, dtype, _spans(own, members), _coding(shape, own, members)) for shape, own in results]
    return {
        name: StoredTensor(name=name, shape=shape, dtype=dtype, where=where, spans=spans, coding=coding)
        for name, (shape, dtype, spans, coding) in zip(conversion.names, found, strict=True)
    }


def _made_on_meta(conversion: Conversion, members: Sequence[StoredTensor]) -> list[Tensor]:
    try:
        return conversion.convert([torch.empty(m.shape, dtype=m.dtype, device="meta") for m in members])
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        held = [f"{m.name!r} is {m.dtype} {list(m.shape)} in {m.where}" for m in members]
        names = shortlist([repr(name) for name in conversion.names])
        raise CheckpointError(f"cannot make {names}: {error}; {shortlist(held, limit=3)}") from error


def _moved_rows(
    conversion: Conversion, members: Sequence[StoredTensor]
) -> list[tuple[torch.Size, list[_Piece]]] | None:
    """The shapes that `conversion` makes of the members and the rows in them; None where it moves not whole rows alone.

    It is given the numbers of the rows, with a last dimension of 1 in place of the width of a row. Stacking numbers
    takes 1 ms for 128 experts, and stacking tensors on meta 8.
    """
    kinds = {(m.dtype, m.shape[-1:] if len(m.shape) > 1 else None) for m in members}
    if len(kinds) > 1:
        return None
    is_flat = len(members[0].shape) < 2  # then a row is a single number
    shapes = [tuple(member.shape) if is_flat else (*member.shape[:-1], 1) for member in members]
    counts = torch.tensor([prod(shape) for shape in shapes])
    gaps = torch.arange(len(members)).repeat_interleave(counts)  # rows of two members never follow each other
    numbers = cut(torch.arange(len(gaps)) + gaps, shapes)
    try:
        moved = conversion.convert(numbers)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError):
        return None
    is_whole = is_flat or all(rows.dim() > 1 and rows.shape[-1] == 1 for rows in moved)
    if not is_whole or len(moved) != len(conversion.names):
        return None
    width = torch.Size() if is_flat else members[0].shape[-1:]
    made = [rows.shape if is_flat else rows.shape[:-1] + width for rows in moved]
    return [(shape, _pieces(rows.reshape(-1), counts.tolist())) for shape, rows in zip(made, moved, strict=True)]


def _pieces(rows: Tensor, counts: Sequence[int]) -> list[_Piece]:
    """The pieces that `rows` are, by the numbers of `_moved_rows`; none if they are more than the members.

    `counts` are the rows of the members.
    """
    if not len(rows):
        return [(0, 0, 0)]
    first_rows = [0, *accumulate(count + 1 for count in counts)]
    starts = [0, *(torch.nonzero(rows.diff() != 1).flatten() + 1).tolist()]
    if len(starts) > len(counts):
        return []
    found = []
    for row, start, stop in zip(rows[starts].tolist(), starts, [*starts[1:], len(rows)], strict=True):
        member = bisect_right(first_rows, row) - 1
        found.append((member, row - first_rows[member], stop - start))
    return found


def _coding(shape: torch.Size, pieces: Sequence[_Piece], members: Sequence[StoredTensor]) -> ScaledRows | None:
    """What makes numbers of `pieces` of `members`, if these are codes; there are no pieces if it has no spans."""
    codings = [member.coding for member in members if member.coding is not None]
    if not codings or not pieces:
        return None
    return codings[0].with_rows(shape, [(codings[member], first, count) for member, first, count in pieces])


def _spans(pieces: Sequence[_Piece], members: Sequence[StoredTensor]) -> tuple[Span, ...]:
    """The spans of `pieces` of `members`, neighbours as one."""
    first_member, coding = members[0], members[0].coding
    width = 1 if len(first_member.shape) < 2 else first_member.shape[-1]
    row_nbytes = first_member.dtype.itemsize * width if coding is None else coding.row_nbytes
    spans: list[Span] = []
    for member, first, count in pieces:
        own = members[member].spans
        if not count:
            return own[:1]  # of an empty tensor
        if count * row_nbytes < members[member].nbytes:
            own = cut_out(own, first * row_nbytes, count * row_nbytes)
        spans += own
    return joined(spans)
