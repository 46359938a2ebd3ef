"""ScaledRows: float weights that are stored as codes of 8 or 4 bits, with a scale for each group of them.

What FP8 and int8 with scales and MXFP4 share. A number is the value of its code times a scale that it shares with the
numbers of a block: of a row, of some rows and columns, or of the whole matrix. Sources: OCP Microscaling formats (MX)
1.0 for MXFP4, DeepSeek-V3 (arXiv 2412.19437) for FP8 in blocks of 128 x 128.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import torch
from torch import Tensor

from bigq.checkpoint.byte_source import ByteSource
from bigq.ops.code_tables import row_chunks

__all__ = ["E2M1", "Codes", "ScaledRows", "Scales"]

E2M1 = "e2m1"  # 4 bits: sign, two of exponent and one of mantissa; the first of two elements is in the low nibble
Codes = torch.dtype | str  # a dtype of one byte, or E2M1

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1
_GPU_NUMEL = 1 << 24  # decoded at once on a GPU: 64 MiB of float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """The scales of `count` rows of codes that follow each other.

    Args:
        read: returns rows of a stored tensor of scales, from one on up to another, as a matrix of float32 on the CPU,
            [rows of scales, groups]. It may open what `holders` are, and does not close it.
        holders: what holds the bytes of that tensor.
        first: the row of that matrix for the first group of rows.
        rows: how many rows of codes share a row of scales.
        skipped: how many rows of the first group lie before the first row.
        count: how many rows of codes they are for.
    """

    read: Callable[[int, int], Tensor]
    holders: tuple[ByteSource, ...] = ()
    first: int
    rows: int
    skipped: int
    count: int

    def of(self, start: int, stop: int) -> "Scales":
        """Those of rows from `start` on, up to `stop`."""
        groups, skipped = divmod(self.skipped + start, self.rows)
        return replace(self, first=self.first + groups, skipped=skipped, count=stop - start)

    def expanded(self) -> Tensor:
        """A row of scales for each row of codes: float32 [count, groups]."""
        groups = -(-(self.skipped + self.count) // self.rows)
        found = self.read(self.first, self.first + groups)
        if self.rows == 1:
            return found
        return found.repeat_interleave(self.rows, dim=0)[self.skipped : self.skipped + self.count]


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
        return {id(holder): holder for part in self.scales for holder in part.holders}

    @property
    def expansion(self) -> int:
        """How many bytes of numbers a byte of codes becomes."""
        return self.dtype.itemsize * (2 if self.codes == E2M1 else 1)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """The numbers of entries of the first dimension from `start` on, on the device of `codes`.

        Args:
            codes: uint8 with the bytes of whole entries, contiguous. Meta tensors give meta tensors.
        """
        if not prod(self.shape[1:]):  # there are no bytes to say how many entries they are
            count = len(codes) if codes.dim() > 1 else self.shape[0]
            made = torch.empty(count, *self.shape[1:], dtype=self.dtype, device=codes.device)
            return made.mT if self.transposed else made
        columns, before = self.shape[-1], start * prod(self.shape[1:-1])
        rows = codes.reshape(-1, self.row_nbytes)
        out = torch.empty(len(rows), columns, dtype=self.dtype, device=codes.device)
        if not codes.is_meta:
            scales = _of_rows(self.scales, before, before + len(rows)) if out.numel() else ()
            self._fill(out, rows, scales)
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

    def _fill(self, out: Tensor, rows: Tensor, scales: Iterable[Scales]) -> None:
        columns, begin = out.shape[1], 0
        for part in scales:
            expanded = part.expanded().to(rows.device, non_blocking=True)
            step = {"numel": _GPU_NUMEL} if rows.is_cuda else {}
            for first, last in row_chunks(part.count, columns, **step):
                values = _values(rows[begin + first : begin + last], self.codes)
                factors = expanded[first:last]
                if factors.shape[1] * self.width == columns:
                    values = values.view(len(values), -1, self.width)
                    made = torch.mul(values, factors[:, :, None], out=values).view(len(values), columns)
                else:
                    made = values.mul_(factors.repeat_interleave(self.width, dim=1)[:, :columns])
                out[begin + first : begin + last] = made
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


def _values(rows: Tensor, codes: Codes) -> Tensor:
    """What codes [R, bytes of a row] stand for: float32 [R, columns], in memory of its own."""
    if isinstance(codes, torch.dtype):
        return rows.view(codes).float()
    pairs = _pairs(rows.device).index_select(0, rows.flatten().int())  # an element of 8 bytes for each byte
    return pairs.view(torch.float32).view(len(rows), -1)


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two float32 values of each byte of E2M1 codes, [256] as int64."""
    cpu = torch.device("cpu")  # explicit, because a caller may be inside `with torch.device("meta")`
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.float32, device=cpu)
    byte = torch.arange(256, device=cpu)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).view(torch.int64).flatten().to(device)
