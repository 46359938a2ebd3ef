"""ScaledRows: float weights that are stored as codes of 8 or 4 bits, with a scale for each group of them.

What FP8 and int8 with scales and MXFP4 share. A number is the value of its code times a scale that it shares with the
numbers of a block: of a row, of some rows and columns, or of the whole matrix. Sources: OCP Microscaling formats (MX)
1.0 for MXFP4, DeepSeek-V3 (arXiv 2412.19437) for FP8 in blocks of 128 x 128.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch
from torch import Tensor

from bigq.checkpoint.byte_source import ByteSource
from bigq.checkpoint.spans import Span, cut_out
from bigq.ops.code_tables import row_chunks

__all__ = ["E2M1", "Codes", "ScaledRows", "Scales"]

E2M1 = "e2m1"  # 4 bits: sign, two of exponent and one of mantissa; the first of two elements is in the low nibble
Codes = torch.dtype | str  # a dtype of one byte, or E2M1

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1
_GPU_NUMEL = 1 << 25  # decoded at once on a GPU: 64 MiB of bfloat16, and as much of indices of 4-bit codes


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """The scales of `count` rows of codes that follow each other: rows of a stored tensor of scales.

    Args:
        name: what that tensor is called.
        dtype: of it; bytes are exponents of two, as in MX formats.
        groups: how many scales a row of it has.
        spans: where its bytes lie; none if it lies in no plain bytes.
        read: returns rows of it, from one on up to another, on the CPU, [rows of scales, groups]. It may open the
            sources of `spans`, and does not close them.
        first: the row of it for the first group of rows.
        rows: how many rows of codes share a row of scales.
        skipped: how many rows of the first group lie before the first row.
        count: how many rows of codes they are for.
    """

    name: str
    dtype: torch.dtype
    groups: int
    spans: tuple[Span, ...]
    read: Callable[[int, int], Tensor]
    first: int
    rows: int
    skipped: int
    count: int

    @property
    def stop(self) -> int:
        """The row after the last one of the stored tensor that is needed."""
        return self.first - (-(self.skipped + self.count) // self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are needed."""
        return (self.stop - self.first) * self.groups * self.dtype.itemsize

    @property
    def own_spans(self) -> tuple[Span, ...]:
        """Where the rows that are needed lie."""
        return cut_out(self.spans, self.first * self.groups * self.dtype.itemsize, self.nbytes)

    def of(self, start: int, stop: int) -> "Scales":
        """Those of rows from `start` on, up to `stop`."""
        groups, skipped = divmod(self.skipped + start, self.rows)
        return replace(self, first=self.first + groups, skipped=skipped, count=stop - start)

    def is_continued_by(self, other: "Scales") -> bool:
        """Whether one matrix of the rows of both has a row of scales for each group: no group is cut between them."""
        alike = (self.dtype, self.groups, self.rows) == (other.dtype, other.groups, other.rows)
        return alike and not other.skipped and (self.skipped + self.count) % self.rows == 0

    def spread(self, scales: Tensor, start: int, stop: int) -> Tensor:
        """The float32 scales of rows from `start` on, up to `stop`: [rows, groups], or [1, groups] if all share a row.

        Args:
            scales: the rows that are needed, as they are stored.
        """
        group, skipped = divmod(self.skipped + start, self.rows)
        found = _in_float32(scales.narrow(0, group, -(-(self.skipped + stop) // self.rows) - group))
        if self.rows == 1 or len(found) == 1:
            return found
        spread = found.unsqueeze(1).expand(-1, self.rows, -1).reshape(-1, self.groups)
        return spread.narrow(0, skipped, stop - start)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaledRows:
    """How the codes of a tensor become numbers.

    Args:
        codes: what a code is.
        shape: of the tensor, as its codes are stored: rows along the last dimension.
        dtype: of the numbers; each is computed in float32 and rounded once.
        scales: of all rows, in their order.
        width: how many columns share a scale; the last ones of a row may be fewer.
        transposed: whether the last two dimensions are exchanged after that.
    """

    codes: Codes
    shape: tuple[int, ...]
    dtype: torch.dtype
    scales: tuple[Scales, ...]
    width: int
    transposed: bool = False

    @property
    def kind(self) -> tuple[object, ...]:
        """What is alike in tensors whose rows can be put together."""
        return self.codes, self.shape[-1], self.dtype, self.width, self.transposed

    @property
    def row_nbytes(self) -> int:
        """Bytes of the codes of a row."""
        return self.shape[-1] // 2 if self.codes == E2M1 else self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all codes."""
        return prod(self.shape[:-1]) * self.row_nbytes

    @property
    def holders(self) -> dict[int, ByteSource]:
        """What `decode` reads scales from, and does not close; by identity."""
        return {id(span.source): span.source for part in self.scales for span in part.spans}

    @property
    def expansion(self) -> int:
        """How many bytes of numbers a byte of codes becomes."""
        return self.dtype.itemsize * (2 if self.codes == E2M1 else 1)

    def plain_scales(self, start: int, count: int) -> tuple[Scales, ...]:
        """The scales of `count` entries of the first dimension from `start` on; none if some lie in no plain bytes."""
        inner = prod(self.shape[1:-1])
        found = _of_rows(self.scales, start * inner, (start + count) * inner)
        return tuple(found) if all(part.spans for part in found) else ()

    def decode(self, codes: Tensor, start: int = 0, scales: Tensor | None = None) -> Tensor:
        """The numbers of entries of the first dimension from `start` on, on the device of `codes`.

        With `scales` nothing waits for a GPU: neither is memory copied there that is not pinned, nor a value asked for.

        Args:
            codes: uint8 with the bytes of whole entries, contiguous. Meta tensors give meta tensors.
            scales: uint8 with the bytes of the `plain_scales` of these entries, one after the other, on the device of
                `codes`. They are read here if they are None.
        """
        if not prod(self.shape[1:]):  # there are no bytes to say how many entries they are
            count = len(codes) if codes.dim() > 1 else self.shape[0]
            made = torch.empty(count, *self.shape[1:], dtype=self.dtype, device=codes.device)
            return made.mT if self.transposed else made
        columns, before = self.shape[-1], start * prod(self.shape[1:-1])
        rows = codes.reshape(-1, self.row_nbytes)
        out = torch.empty(len(rows), columns, dtype=self.dtype, device=codes.device)
        if not codes.is_meta and out.numel():
            parts = _of_rows(self.scales, before, before + len(rows))
            self._fill(out, rows, parts, _read(parts, codes.device) if scales is None else scales)
        made = out.view(-1, *self.shape[1:])
        return made.mT if self.transposed else made

    def window(self, start: int, stop: int) -> "ScaledRows":
        """The same of the entries of the first dimension from `start` on, up to `stop`."""
        inner = prod(self.shape[1:-1])
        scales = _of_rows(self.scales, start * inner, stop * inner)
        return replace(self, shape=(stop - start, *self.shape[1:]), scales=tuple(scales))

    def with_rows(self, shape: tuple[int, ...], pieces: Iterable[tuple["ScaledRows", int, int]]) -> "ScaledRows":
        """A tensor of `shape` whose rows are those of `pieces`: of each a tensor, its first row, and how many rows."""
        scales = [part for member, first, count in pieces for part in _of_rows(member.scales, first, first + count)]
        return replace(self, shape=tuple(shape), scales=tuple(scales))

    def _fill(self, out: Tensor, rows: Tensor, parts: Iterable[Scales], scales: Tensor) -> None:
        columns, begin = out.shape[1], 0
        step = {"numel": _GPU_NUMEL} if rows.is_cuda else {}
        for part, own_scales in _matrices(parts, scales):
            for first, last in row_chunks(part.count, columns, **step):
                # `narrow`, because a slice in brackets asks for the GPU itself, and tests have none.
                values = _values(rows.narrow(0, begin + first, last - first), self.codes)
                factors, made = part.spread(own_scales, first, last), out.narrow(0, begin + first, last - first)
                if part.groups * self.width == columns:
                    blocks = len(made), part.groups, self.width
                    _multiply(values.view(blocks), factors.unsqueeze(2), made.view(blocks))
                else:
                    _multiply(values, factors.repeat_interleave(self.width, dim=1).narrow(1, 0, columns), made)
            begin += part.count


def _of_rows(scales: Iterable[Scales], start: int, stop: int) -> list[Scales]:
    """Those of the rows from `start` on, up to `stop`, counted over all of `scales`."""
    found, before = [], 0
    for part in scales:
        first, last = max(start - before, 0), min(stop - before, part.count)
        if first < last:
            found.append(part.of(first, last))
        before += part.count
    return found


def _read(parts: Sequence[Scales], device: torch.device) -> Tensor:
    """The bytes of the rows that `parts` need, one after the other, on `device`."""
    found = [part.read(part.first, part.stop).contiguous().flatten().view(torch.uint8) for part in parts]
    return (found[0] if len(found) == 1 else torch.cat(found)).to(device)


def _matrices(parts: Iterable[Scales], scales: Tensor) -> Iterator[tuple[Scales, Tensor]]:
    """`parts` with their rows of the bytes `scales`, as few as can be: each takes several launches on a GPU."""
    merged: list[tuple[Scales, int]] = []  # with how many bytes they have
    for part in parts:
        if merged and merged[-1][0].is_continued_by(part):
            last, nbytes = merged[-1]
            merged[-1] = replace(last, count=last.count + part.count), nbytes + part.nbytes
        else:
            merged.append((part, part.nbytes))
    begin = 0
    for part, nbytes in merged:
        own = scales.narrow(0, begin, nbytes)
        if own.storage_offset() % part.dtype.itemsize:  # behind scales of a smaller dtype
            own = own.clone()
        yield part, own.view(part.dtype).view(-1, part.groups)
        begin += nbytes


def _multiply(values: Tensor, factors: Tensor, out: Tensor) -> None:
    """Write products in float32 to `out`, rounded once; it may use the memory of `values`."""
    if values.dtype == factors.dtype:
        out.copy_(values.mul_(factors))  # on a CPU, where a product in another dtype takes a seventh longer
    else:
        torch.mul(values, factors, out=out)  # rounded as it is written: no product crosses memory in float32


def _values(rows: Tensor, codes: Codes) -> Tensor:
    """What codes [R, bytes of a row] stand for, exactly: [R, columns] in memory of its own."""
    dtype = _dtype_of_values(rows.device)
    if isinstance(codes, torch.dtype):
        return rows.view(codes).to(dtype)
    pairs = _pairs(rows.device, dtype).index_select(0, rows.flatten().int())
    return pairs.view(dtype).view(len(rows), -1)


def _dtype_of_values(device: torch.device) -> torch.dtype:
    """That of what codes stand for, before they are scaled: no code has more than the 8 significant bits of bfloat16.

    On a GPU half the bytes cross its memory then, and a product with float32 converts them as it loads. On a CPU it
    would convert them in a pass of its own.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two values of each byte of E2M1 codes in `dtype`, [256], each pair as one integer."""
    cpu = torch.device("cpu")  # explicit, because a caller may be inside `with torch.device("meta")`
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=dtype, device=cpu)
    byte = torch.arange(256, device=cpu)
    pair = torch.int64 if dtype.itemsize == 4 else torch.int32
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).view(pair).flatten().to(device)


def _in_float32(scales: Tensor) -> Tensor:
    """Stored scales [R, groups] as numbers."""
    if scales.dtype != torch.uint8:
        return scales.float()
    return _powers(scales.device).index_select(0, scales.flatten().int()).view(scales.shape)


@cache
def _powers(device: torch.device) -> Tensor:
    """Two to the power of each byte of exponents, [256] in float32; the last one is NaN."""
    byte = torch.arange(256, dtype=torch.uint8, device=torch.device("cpu"))
    return byte.view(torch.float8_e8m0fnu).float().to(device)
