"""Span: where bytes of a tensor lie."""

from collections.abc import Iterable
from typing import NamedTuple

from bigq.checkpoint.byte_source import ByteSource

__all__ = ["Span", "cut_out", "joined"]


class Span(NamedTuple):
    """The `nbytes` bytes of `source` from `offset` on."""

    source: ByteSource
    offset: int
    nbytes: int


def cut_out(spans: tuple[Span, ...], start: int, nbytes: int) -> tuple[Span, ...]:
    """The spans of `nbytes` bytes from `start` on, counted over all of `spans`."""
    cut, before = [], 0  # bytes of the spans before this one
    for source, offset, length in spans:
        first, last = max(start - before, 0), min(start + nbytes - before, length)
        if first < last:
            cut.append(Span(source, offset + first, last - first))
        before += length
    return tuple(cut)


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same bytes in the same order, neighbours of one source as one span."""
    found: list[Span] = []
    for span in spans:
        last = found[-1] if found else None
        if last is not None and last.source is span.source and last.offset + last.nbytes == span.offset:
            found[-1] = last._replace(nbytes=last.nbytes + span.nbytes)
        else:
            found.append(span)
    return tuple(found)
