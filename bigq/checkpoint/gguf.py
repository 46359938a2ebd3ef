"""The header of a GGUF file: which tensors it holds, in which of llama.cpp's formats. bigq reads no GGUF weights."""

import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

from bigq.errors import CheckpointError

__all__ = ["GgufTensor", "is_gguf", "read_gguf"]

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FORMATS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_MAX_COUNT = 1 << 24  # tensors, entries or characters: a header that says more is damaged


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file; `nbytes` includes the padding up to the next one."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int


def is_gguf(path: Path) -> bool:
    """Whether the file at `path` begins as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def read_gguf(path: Path) -> tuple[dict[str, object], list[GgufTensor]]:
    """The metadata of a GGUF file, without its lists, and its tensors in their order.

    Raises:
        CheckpointError: the header is cut short or damaged.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path.stat().st_size)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged GGUF header: {error}; download it again") from error


def _read(file: IO[bytes], size: int) -> tuple[dict[str, object], list[GgufTensor]]:
    def number(code: str) -> int:
        (value,) = struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))
        return int(value)

    def count() -> int:
        value = number("Q")
        if value > _MAX_COUNT:
            raise ValueError(f"it counts {value} entries")
        return value

    def text() -> str:
        return file.read(count()).decode()

    if file.read(4) != _MAGIC or number("I") not in (2, 3):
        raise ValueError("expected GGUF of version 2 or 3")
    tensor_count, entry_count = count(), count()
    said = {}
    for _ in range(entry_count):
        name, value = text(), _value(file, number("I"), number, count, text)
        if value is not None:
            said[name] = value
    infos = [
        (text(), tuple(number("Q") for _ in range(min(number("I"), 8)))[::-1], number("I"), number("Q"))
        for _ in range(tensor_count)
    ]
    alignment = said.get("general.alignment", 32)
    step = alignment if isinstance(alignment, int) and alignment > 0 else 32
    data = size - -(-file.tell() // step) * step
    starts = sorted({*(offset for *_, offset in infos), data})
    after = dict(pairwise(starts))
    beyond = [name for name, _, _, offset in infos if offset >= data and offset not in after]
    if beyond:
        raise ValueError(f"{beyond[0]} lies beyond its end: it was cut short")
    return said, [
        GgufTensor(name, shape, _FORMATS.get(kind, f"type {kind}"), after.get(offset, offset) - offset)
        for name, shape, kind, offset in infos
    ]


def _value(
    file: IO[bytes], kind: int, number: Callable[[str], int], count: Callable[[], int], text: Callable[[], str]
) -> object:
    """The next value of metadata; None for a list, which is skipped."""
    if kind == _STRING:
        return text()
    if kind in _SCALARS:
        code = _SCALARS[kind]
        (value,) = struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))
        found: object = value
        return found
    if kind != _ARRAY:
        raise ValueError(f"it has a value of the unknown type {kind}")
    inner, length = number("I"), count()
    if inner in _SCALARS:
        file.seek(length * struct.calcsize(f"<{_SCALARS[inner]}"), 1)
    else:
        for _ in range(length):
            _value(file, inner, number, count, text)
    return None
