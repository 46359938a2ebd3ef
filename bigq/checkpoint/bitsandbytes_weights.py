"""HeldWeights: which tensors of a checkpoint are weights of bitsandbytes, and what each of them becomes."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bigq.checkpoint.adapters import Conversion
from bigq.checkpoint.bitsandbytes_settings import BitsandbytesSettings
from bigq.checkpoint.source import Source, StoredTensor, read_small
from bigq.checkpoint.spans import cut_out
from bigq.errors import CheckpointError
from bigq.formats import QUANT_STATE, Description, Int8, encode_quant_state, state_name
from bigq.formats.bitsandbytes import (
    ABSMAX,
    INT8_FORMAT,
    INT8_SCALES,
    NESTED_ABSMAX,
    NESTED_MAP,
    QUANT_MAP,
    QUANT_STATES,
    Flat4,
    flat4,
    offset_bits,
    table,
    table_bytes,
)
from bigq.formats.quant_state import COMPUTE_DTYPES
from bigq.system.memory import memory_of
from bigq.system.text import itemized

__all__ = ["HeldWeights", "View"]

_LONGEST_JSON = 4096  # bytes; the longest that bitsandbytes writes has about 200


class View(NamedTuple):
    """The first bytes of the tensor `old` as another tensor."""

    old: str
    new: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).view(torch.uint8)[: self.nbytes].view(self.dtype).view(self.shape)

    def stored(self, old: StoredTensor) -> StoredTensor:
        spans = old.spans if self.nbytes == old.nbytes else cut_out(old.spans, 0, self.nbytes)
        return StoredTensor(name=self.new, shape=torch.Size(self.shape), dtype=self.dtype, where=old.where, spans=spans)


class HeldWeights:
    """The weights that `source` holds as bitsandbytes stores them: which tensors they are, and what they become."""

    def __init__(
        self,
        source: Source,
        settings: BitsandbytesSettings,
        threshold: float | None,
        is_transposed: Callable[[str], bool],
    ) -> None:
        self._tensors, self._settings, self._is_transposed = source.tensors, settings, is_transposed
        self._int8 = Int8(threshold=settings.threshold if threshold is None else threshold)
        self.views: dict[str, View] = {}  # by old name
        self.consumed: set[str] = set()  # what has no tensor of its own in the result
        self.straddling: dict[str, Conversion] = {}
        self._described: dict[str, dict[str, Description]] = {}  # by module, then by leaf
        self._offsets: dict[str, float] = {}  # by weight
        self._problems: list[str] = []
        found: list[tuple[str, str, str]] = []  # the weight, what follows its name, and the format
        int8: list[str] = []
        for name in self._tensors:
            module, _, leaf = name.rpartition(".")
            if leaf == INT8_SCALES:
                int8.append(module)
            elif leaf.startswith("bitsandbytes__"):
                ends = [end for end in QUANT_STATES if name.endswith(end)]
                found += [(name.removesuffix(end), end, QUANT_STATES[end]) for end in ends]
        self._small = self._read_small(source, found, int8)
        for name, suffix, kind in found:
            self._collect(name + suffix, partial(self._add_flat, name, suffix, kind))
        self._other_dtype = self._most_common_dtype(int8)
        for module in int8:
            prefix = f"{module}." if module else ""
            self._collect(prefix + INT8_SCALES, partial(self._add_int8, prefix, module))

    def refuse(self) -> None:
        """Raise one CheckpointError with everything that does not fit together, if there is anything."""
        if self._problems:
            raise CheckpointError(
                f"the checkpoint holds weights of bitsandbytes that bigq cannot read:{itemized(self._problems)}"
            )

    def made(self) -> dict[str, tuple[str, bytes]]:
        """{name: (what errors call its place, bytes)} of the tensors that are made: quant_states and offsets."""
        encoded: dict[tuple[object, ...], bytes] = {}  # layers are alike
        made = {}
        for module, weights in self._described.items():
            key = tuple(weights.items())
            if key not in encoded:
                encoded[key] = _bytes(encode_quant_state(weights))
            prefix = f"{module}." if module else ""
            first = next(iter(weights))
            made[prefix + QUANT_STATE] = self._tensors[prefix + first].where, encoded[key]
        for name, offset in self._offsets.items():
            made[state_name(name, "nested_offset")] = self._tensors[name].where, _bytes(offset_bits(offset))
        return made

    def _read_small(self, source: Source, found: list[tuple[str, str, str]], int8: list[str]) -> dict[str, bytes]:
        """The bytes of all descriptions and tables, in one pass; what is too long for one is left out."""
        wanted = [name + end for name, suffix, _ in found for end in (suffix, QUANT_MAP, NESTED_MAP)]
        wanted += [f"{module}.{INT8_FORMAT}" if module else INT8_FORMAT for module in int8]
        stored = [source.tensors[name] for name in wanted if name in source.tensors]
        return read_small(source, [tensor for tensor in stored if tensor.nbytes <= _LONGEST_JSON])

    def _collect(self, key: str, add: Callable[[], None]) -> None:
        try:
            add()
        except ValueError as error:  # a ConfigError is one
            self._problems.append(f"{key} in {self._tensors[key].where}: {error}")

    def _add_flat(self, name: str, suffix: str, kind: str) -> None:
        said = self._tensors[name + suffix]
        if said.dtype != torch.uint8 or name + suffix not in self._small:
            raise ValueError(f"expected uint8, at most {_LONGEST_JSON} bytes; found {_words(said)}")
        weight = flat4(self._small[name + suffix], kind)
        is_nested = weight.format.double_quant
        self._check_table(name + QUANT_MAP, kind)
        if is_nested:
            self._check_table(name + NESTED_MAP, "nested")
        packed = self._member(name)
        if packed.nbytes != weight.packed_nbytes or packed.dtype.is_complex:
            raise ValueError(
                f"{name} has {packed.nbytes} bytes; a weight of shape {list(weight.shape)} has {weight.packed_nbytes}"
            )
        absmax = self._check_scales(name + ABSMAX, weight.block_count, torch.uint8 if is_nested else torch.float32)
        members = [name, absmax]
        if is_nested:
            count = -(-weight.block_count // 256)
            members.append(self._check_scales(name + NESTED_ABSMAX, count, torch.float32))
        ends = (suffix, QUANT_MAP, *((NESTED_MAP,) if is_nested else ()))
        self.consumed |= {name + end for end in ends}
        transposed = self._is_transposed(name)
        if weight.straddles:
            decode = partial(_dequantized, weight, transposed)
            self.straddling[name] = Conversion(tuple(members), (name,), decode)
            return
        self._describe(
            name,
            Description(
                format=weight.format,
                shape=weight.shape,
                dtype=weight.dtype,
                compute_dtype=self._settings.compute_dtype,
                transposed=transposed,
            ),
            dict(zip(("packed", "absmax", "nested_absmax"), members, strict=False)),
        )
        if weight.offset is not None:
            self._offsets[name] = weight.offset

    def _add_int8(self, prefix: str, module: str) -> None:
        name, scales, layout = prefix + "weight", prefix + INT8_SCALES, prefix + INT8_FORMAT
        packed = self._member(name)
        if packed.dtype != torch.int8 or len(packed.shape) != 2:
            raise ValueError(f"expected {name} to be int8 [N, K], found {_words(packed)}")
        if layout in self._tensors:
            if self._small.get(layout) != b"\0":
                raise ValueError(
                    f"expected {layout} to be 0, a row-major weight; load it with transformers and save it"
                )
            self.consumed.add(layout)
        rows, _ = packed.shape
        found = self._tensors[scales]
        if found.dtype != torch.float32 or found.shape.numel() != rows:
            raise ValueError(f"expected float32 [{rows}], found {_words(found)}")
        description = Description(
            format=self._int8,
            shape=tuple(packed.shape),
            dtype=self._other_dtype,
            transposed=self._is_transposed(name),
        )
        self._describe(name, description, {"packed": name, "absmax": scales})

    def _describe(self, name: str, description: Description, members: Mapping[str, str]) -> None:
        module, _, leaf = name.rpartition(".")
        if leaf in self._described.get(module, ()):
            raise ValueError(f"{name} is described twice")
        self._described.setdefault(module, {})[leaf] = description
        for part, old in members.items():
            spec = description.state_spec[part]
            self.views[old] = View(old, state_name(name, part), spec.shape, spec.dtype)

    def _member(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise ValueError(f"the checkpoint holds no {name}")
        return self._tensors[name]

    def _check_table(self, name: str, kind: str) -> None:
        found, expected = self._member(name), table(kind)
        if found.dtype != torch.float32 or found.shape.numel() != len(expected):
            raise ValueError(f"expected {name} to be float32 [{len(expected)}], found {_words(found)}")
        bits = self._small[name]
        if bits == table_bytes(kind):
            return
        if not torch.equal(torch.frombuffer(bytearray(bits), dtype=torch.float32), expected):  # -0.0 is 0.0
            raise ValueError(f"{name} holds other values than those of bitsandbytes 0.50, which bigq computes with")

    def _check_scales(self, name: str, count: int, dtype: torch.dtype) -> str:
        found = self._member(name)
        padded = count + count % 2  # a kernel of bitsandbytes' for XPU stores an even number
        if found.dtype != dtype or found.shape.numel() not in (count, padded):
            raise ValueError(f"expected {name} to be {dtype} [{count}], found {_words(found)}")
        return name

    def _most_common_dtype(self, int8: list[str]) -> torch.dtype:
        """The floating dtype of most bytes of the other tensors: no file says what an int8 weight was before."""
        scales = {f"{module}.{INT8_SCALES}" if module else INT8_SCALES for module in int8}
        nbytes: Counter[torch.dtype] = Counter()
        for name, stored in self._tensors.items():
            if stored.dtype in COMPUTE_DTYPES.values() and name not in scales and name not in self.views:
                nbytes[stored.dtype] += stored.nbytes
        return max(nbytes, key=nbytes.__getitem__, default=torch.float16)


def _dequantized(weight: Flat4, transposed: bool, members: list[Tensor]) -> list[Tensor]:
    """The numbers of a weight, of its codes and scales: [..., N, K], or [..., K, N] if `transposed`."""
    packed, absmax, *nested = members
    if packed.is_meta:
        dense = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    else:
        flat = (1, math.prod(weight.shape))  # the blocks are those of a single row
        state = {
            "packed": packed.reshape(-1).view(torch.uint8).view(1, -1),
            "absmax": absmax.reshape(-1)[: weight.block_count].view(1, -1),
        }
        if weight.offset is not None:
            state |= {"nested_absmax": nested[0].reshape(-1), "nested_offset": offset_bits(weight.offset)}
        dense = weight.format.dequantize(state, flat, weight.dtype).view(weight.shape)
    return [dense.mT.contiguous() if transposed else dense]


def _bytes(tensor: Tensor) -> bytes:
    return bytes(memory_of(tensor))


def _words(stored: StoredTensor) -> str:
    return f"{stored.dtype} {list(stored.shape)}"
