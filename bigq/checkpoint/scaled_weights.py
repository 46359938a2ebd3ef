"""with_scaled: a checkpoint whose weights are FP8 or int8 with scales, or MXFP4, as one of float weights.

What is read are the codes. They become numbers on the device where their rows arrive (`scaled_rows`), so that a load
quantizes them as it quantizes other floats.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from bigq.checkpoint.adapters import Adapter
from bigq.checkpoint.byte_source import ByteSource
from bigq.checkpoint.model_config import read_config
from bigq.checkpoint.scaled_names import (
    CODE_BYTES,
    FLOAT8,
    MXFP4_BLOCK,
    FoundWeight,
    found_weights,
    scale_beside,
    scales_of_activations,
)
from bigq.checkpoint.scaled_rows import E2M1, ScaledRows, Scales
from bigq.checkpoint.scaled_settings import block_size, dtype_of_numbers
from bigq.checkpoint.source import Source, StoredTensor, read_tensor, refuse_unknown
from bigq.checkpoint.spans import cut_out
from bigq.errors import CheckpointError
from bigq.system.text import itemized, shortlist

__all__ = ["with_scaled"]


def with_scaled(source: Source, folder: Path, held: Callable[[], Collection[str]] = tuple) -> Source:
    """`source` with float weights in place of codes and their scales; itself where it holds none.

    The dtype of numbers is that of config.json, or of the configs in it, or of all other floats, or bfloat16. Scales of
    activations and of KV caches are left out.

    Args:
        source: a checkpoint.
        folder: that holds it; its config.json says how large blocks are.
        held: returns the names of the model's tensors, as the checkpoint may have them. They stay as they are.

    Raises:
        CheckpointError: a scale does not fit its weight, or FP8 has a scale that is not known here.
    """
    if all(stored.dtype not in FLOAT8 | CODE_BYTES for stored in source.tensors.values()):
        return source
    config = read_config(folder / "config.json")
    said = config.get("quantization_config")
    settings: Mapping[str, object] = said if isinstance(said, dict) else {}
    names = frozenset(held())
    found = found_weights(source.tensors, settings, names)
    _refuse_unknown_scales(source.tensors, found, names)
    if not found:
        return source
    return ScaledWeights(source, found, config, settings, names)


class ScaledWeights(Adapter):
    """`source` with the weights `found` as float tensors.

    Args:
        config: of config.json, with `said`, its quantization_config.
        held: names of tensors that the model has.
    """

    def __init__(
        self,
        source: Source,
        found: Mapping[str, FoundWeight],
        config: Mapping[str, object],
        said: Mapping[str, object],
        held: Collection[str],
    ) -> None:
        super().__init__(source)
        left_out = {weight.scale.name for weight in found.values()}
        left_out |= scales_of_activations(source.tensors, found, said).difference(held)
        kept = [stored for name, stored in source.tensors.items() if name not in left_out and name not in found]
        dtype = dtype_of_numbers(config, {stored.dtype for stored in kept if stored.dtype.is_floating_point})
        block, problems = block_size(said), []
        self._codings: dict[str, ScaledRows] = {}  # by the name of the codes
        for name, weight in found.items():
            try:
                self._codings[name] = _coding(source, weight, said.get("quant_method"), block, dtype)
            except ValueError as problem:
                problems.append(f"{weight.scale.name} in {weight.scale.where}: {problem}")
        if problems:
            raise CheckpointError(f"{len(problems)} scales do not fit their weights:{itemized(problems)}")
        self._new_names = {name: weight.name for name, weight in found.items()}
        tensors: dict[str, StoredTensor] = {}
        for name, stored in source.tensors.items():
            if name in left_out:
                continue
            new = self._new_names.get(name, name)
            if new in tensors or (new != name and new in source.tensors):
                raise CheckpointError(f"the checkpoint holds {new!r} both in floats and in codes ({name!r})")
            tensors[new] = _float_tensor(stored, new, self._codings[name]) if name in found else stored
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as `source` reads them; weights are decoded on the CPU."""
        refuse_unknown(names, self.tensors, "the checkpoint of scaled weights")
        codes = {new: name for name, new in self._new_names.items()}
        return self._decoded([codes.get(name, name) for name in names])

    def _decoded(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        opened: dict[int, ByteSource] = {}
        try:
            for name, tensor in self._source.read(names):
                coding = self._codings.get(name)
                if coding is None:
                    yield name, tensor
                    continue
                for key in opened.keys() - coding.holders.keys():
                    opened.pop(key).close()  # a checkpoint may have more files than a process may open
                opened |= coding.holders
                yield self._new_names[name], coding.decode(tensor.contiguous().view(torch.uint8))
        finally:
            for holder in opened.values():
                holder.close()


def _refuse_unknown_scales(
    tensors: Mapping[str, StoredTensor], found: Mapping[str, FoundWeight], held: Collection[str]
) -> None:
    """Raise a CheckpointError if there is FP8 that is not in `found`, and has a scale that the model does not have.

    Here every tensor has the name that it has in the file. Later its scale may have another module, or experts are a
    stack, and it would be a plain cast.
    """
    codes = [name for name, stored in tensors.items() if stored.dtype in FLOAT8 and name not in found]
    unknown = {name: scale for name in codes if (scale := scale_beside(name, tensors)) and scale not in held}
    if unknown:
        listed = shortlist([f"{scale} of {name} in {tensors[name].where}" for name, scale in unknown.items()], limit=3)
        raise CheckpointError(
            f"{len(unknown)} tensors in FP8 have a scale of an unknown kind: {listed}; it is a scaled storage format "
            "that bigq does not know: take the original weights of the model"
        )


def _float_tensor(stored: StoredTensor, name: str, coding: ScaledRows) -> StoredTensor:
    """The description of the tensor that `coding` makes of `stored`; what lies in no plain bytes comes by `read`."""
    *leading, rows, columns = coding.shape
    shape = torch.Size([*leading, columns, rows] if coding.transposed else coding.shape)
    has_spans = coding if stored.spans else None
    return StoredTensor(
        name=name, shape=shape, dtype=coding.dtype, where=stored.where, spans=stored.spans, coding=has_spans
    )


def _coding(
    source: Source, weight: FoundWeight, method: object, block: tuple[int, int] | None, dtype: torch.dtype
) -> ScaledRows:
    """How the codes of `weight` become numbers. Raises ValueError if its scale does not fit it."""
    if weight.codes == E2M1:
        *leading, groups = weight.scale.shape
        is_stack = weight.name != weight.stored.name  # of gpt-oss, which a model of transformers has as [E, K, N]
        if not is_stack and leading != list(weight.stored.shape[:-1]):
            raise ValueError(f"{list(weight.scale.shape)} for codes of {list(weight.stored.shape)}")
        shape = (*leading, groups * MXFP4_BLOCK)
        scales = _scales(source, weight.scale, groups, rows=1, count=prod(leading))
        return ScaledRows(
            codes=E2M1, shape=shape, dtype=dtype, scales=(scales,), width=MXFP4_BLOCK, transposed=is_stack
        )
    shape = tuple(weight.stored.shape)
    *leading, rows, columns = shape
    of_rows, of_columns = _scale_shape(shape, tuple(weight.scale.shape), method)
    per = _per(rows, of_rows, None if block is None else block[0])
    width = _per(columns, of_columns, None if block is None else block[1])
    if per is None or width is None:
        said = "config.json does not say how large a block is" if block is None else f"blocks are {list(block)}"
        raise ValueError(f"{list(weight.scale.shape)} for a weight of {list(shape)}, and {said}")
    scales = _scales(source, weight.scale, of_columns, rows=per, count=prod(shape[:-1]))
    found = [scales]
    if rows % per:  # the last group of each matrix is smaller
        found = [replace(scales, first=matrix * of_rows, count=rows) for matrix in range(prod(leading))]
    return ScaledRows(codes=weight.codes, shape=shape, dtype=dtype, scales=tuple(found), width=width)


def _scales(source: Source, stored: StoredTensor, columns: int, *, rows: int, count: int) -> Scales:
    """The scales `stored`, of which each row of `columns` is for `rows` rows of codes."""
    return Scales(
        name=stored.name,
        dtype=stored.dtype,
        groups=columns,
        spans=stored.spans,
        read=partial(_read_scales, source, stored, columns),
        first=0,
        rows=rows,
        skipped=0,
        count=count,
    )


def _scale_shape(shape: Sequence[int], scale: Sequence[int], method: object) -> tuple[int, int]:
    """How many scales `scale` has for the rows and for the columns of each matrix of `shape`. Raises ValueError."""
    *leading, rows, columns = shape
    if method == "fbgemm_fp8" and leading and list(scale) in ([*leading, 1, columns], [*leading, columns, 1]):
        return 1, columns  # a stack of transformers is [E, K, N], and each of N outputs has a scale
    if prod(scale) == 1 and not leading:
        return 1, 1
    if list(scale) == leading:
        return 1, 1
    if list(scale) == [*leading, rows]:
        return rows, 1
    if len(scale) == len(shape) and list(scale[:-2]) == leading:
        return scale[-2], scale[-1]
    raise ValueError(f"{list(scale)} for a weight of {list(shape)}")


def _per(size: int, groups: int, block: int | None) -> int | None:
    """How many of `size` rows or columns share a scale, if there are `groups` of them; None if it is not known."""
    if groups == 1:
        return max(1, size)
    if groups == size:
        return 1
    return block if block is not None and groups == -(-size // block) else None


def _read_scales(source: Source, stored: StoredTensor, columns: int, first: int, stop: int) -> Tensor:
    """Rows of the scales `stored` as a matrix with `columns`."""
    if not stored.spans:
        ((_, scales),) = source.read([stored.name])
        return scales.reshape(-1, columns)[first:stop]
    if (stop - first) * columns == stored.shape.numel():
        return read_tensor(stored).reshape(-1, columns)
    row_nbytes = columns * stored.dtype.itemsize
    spans = cut_out(stored.spans, first * row_nbytes, (stop - first) * row_nbytes)
    return read_tensor(replace(stored, shape=torch.Size([stop - first, columns]), spans=spans))
