"""with_scaled: a checkpoint whose weights are FP8 or int8 with scales, or MXFP4, as one of float weights.

What is read are the codes. They become numbers on the device where their rows arrive (`scaled_rows`), so that a load
quantizes them as it quantizes other floats.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from bigq.checkpoint.adapters import Adapter
from bigq.checkpoint.model_config import read_config
from bigq.checkpoint.scaled_rows import E2M1, Codes, ScaledRows, Scales
from bigq.checkpoint.scaled_settings import block_size, dtype_of_numbers
from bigq.checkpoint.source import Source, StoredTensor, read_tensor, refuse_unknown
from bigq.errors import CheckpointError
from bigq.system.text import shortlist

__all__ = ["FLOAT8", "MXFP4_BLOCKS", "MXFP4_SCALES", "FoundWeight", "found_weights", "scale_beside", "with_scaled"]

FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"  # what follows the name of a stack of weights
_MXFP4_BLOCK = 32  # elements
_BYTES = {torch.uint8, torch.int8}
_ENDS = ("_scale_inv", "_scale")  # what follows the name of a weight; numbers are multiplied by either
# More than one scale makes numbers of such a weight: zero points, columns in another order, a scale of scales.
_MORE_ENDS = ("_zero_point", "_g_idx", "_scale_2", "_global_scale")
_MORE_BESIDE = "pre_quant_scale"  # inputs are multiplied by it
_BESIDE = {"input_scale", "input_zero_point", "activation_scale", "output_scale"}  # of activations: not needed
_OF_CACHE = {"k_scale", "v_scale", "q_scale"}  # of a KV cache
_SHOWN = 10  # problems


class FoundWeight(NamedTuple):
    """A weight of float numbers that are codes: its name, the tensors that hold it, what a code is, and what makes it.

    `method` is what the format is called.
    """

    name: str
    stored: StoredTensor
    scale: StoredTensor
    codes: Codes
    method: str


def found_weights(
    tensors: Mapping[str, StoredTensor], said: Mapping[str, object], held: Collection[str] = ()
) -> dict[str, FoundWeight]:
    """The weights among `tensors` that are codes with scales, and are made of these alone, by the names of their codes.

    Args:
        said: the quantization_config of config.json.
        held: names of tensors that the model has. A scale that it has itself makes no weight.
    """
    found: dict[str, FoundWeight] = {}
    for name, stored in tensors.items():
        stem = name.removesuffix(MXFP4_BLOCKS)
        if stem != name and _is_mxfp4(stored, tensors.get(stem + MXFP4_SCALES)):
            found[name] = FoundWeight(stem, stored, tensors[stem + MXFP4_SCALES], E2M1, "MXFP4")
        elif stored.dtype in FLOAT8 | _BYTES and len(stored.shape) > 1:
            scale = _scale_of(name, tensors)
            kind = None if scale is None else _kind(stored, scale, said.get("quant_method"))
            if scale is not None and kind is not None and scale.name not in held and not _needs_more(name, tensors):
                found[name] = FoundWeight(name, stored, scale, *kind)
    return found


def scale_beside(name: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """What a checkpoint calls a scale for its tensor `name`, which is then no number by itself; None without one."""
    module, _, leaf = name.rpartition(".")
    prefix = f"{module}." if module else ""
    return next((found for known in _names_of_scales(leaf) if (found := prefix + known) in tensors), None)


def with_scaled(source: Source, folder: Path, held: Callable[[], Collection[str]] = tuple) -> Source:
    """`source` with float weights in place of codes and their scales; itself where it holds none.

    The numbers are `dtype` of config.json, or of the configs in it, or bfloat16. Scales of activations and of KV caches
    are left out.

    Args:
        source: a checkpoint.
        folder: that holds it; its config.json says how large blocks are.
        held: returns the names of the model's tensors, as the checkpoint may have them. They stay as they are.

    Raises:
        CheckpointError: a scale does not fit its weight, or FP8 has a scale that is not known here.
    """
    if all(stored.dtype not in FLOAT8 | _BYTES for stored in source.tensors.values()):
        return source
    config = read_config(folder / "config.json")
    said = config.get("quantization_config")
    settings: Mapping[str, object] = said if isinstance(said, dict) else {}
    names = frozenset(held())
    found = found_weights(source.tensors, settings, names)
    _refuse_unknown_scales(source.tensors, found, names)
    if not found:
        return source
    return ScaledWeights(source, found, settings, dtype_of_numbers(config), names)


class ScaledWeights(Adapter):
    """`source` with the weights `found` as float tensors of `dtype`. A model has tensors called `held`."""

    def __init__(
        self,
        source: Source,
        found: Mapping[str, FoundWeight],
        said: Mapping[str, object],
        dtype: torch.dtype,
        held: Collection[str],
    ) -> None:
        super().__init__(source)
        block, problems = block_size(said), []
        self._codings: dict[str, ScaledRows] = {}  # by the name of the codes
        for name, weight in found.items():
            try:
                self._codings[name] = _coding(source, weight, said.get("quant_method"), block, dtype)
            except ValueError as problem:
                problems.append(f"{weight.scale.name} in {weight.scale.where}: {problem}")
        if problems:
            more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise CheckpointError(
                f"{len(problems)} scales do not fit their weights:\n  - " + "\n  - ".join([*problems[:_SHOWN], *more])
            )
        self._new_names = {name: weight.name for name, weight in found.items()}
        left_out = {weight.scale.name for weight in found.values()}
        left_out |= _of_activations(source.tensors, found, said).difference(held)
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
        for name, tensor in self._source.read(names):
            coding = self._codings.get(name)
            if coding is None:
                yield name, tensor
            else:
                yield self._new_names[name], coding.decode(tensor.contiguous().view(torch.uint8))


def _names_of_scales(leaf: str) -> tuple[str, ...]:
    """What a scale of the tensor `leaf` of a module may be called there, whoever has written it."""
    ends = ("scale", "scale_inv", "scales", "scale_2", "global_scale", "inv_scale", "descale", "dequant_scale")
    names = (f"{leaf}.scale", f"scale_{leaf}", f"qscale_{leaf}", f"{leaf}_scaling_factor", "scale")
    return *(f"{leaf}_{end}" for end in ends), *names


def _needs_more(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether more than a scale makes numbers of the codes `name`."""
    module, _, _ = name.rpartition(".")
    beside = f"{module}.{_MORE_BESIDE}" if module else _MORE_BESIDE
    return beside in tensors or any(name + end in tensors for end in _MORE_ENDS)


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


def _scale_of(name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    scales = [tensors[name + end] for end in _ENDS if name + end in tensors]
    is_scale = len(scales) == 1 and (scales[0].dtype.is_floating_point or scales[0].dtype == torch.uint8)
    return scales[0] if is_scale else None


def _kind(stored: StoredTensor, scale: StoredTensor, method: object) -> tuple[Codes, str] | None:
    """What the codes of a weight are, and what the format is called; None if that is not known.

    Bytes are read by what `method` is, because others store them with scales of other meanings: of "fp8" they are two
    codes of MXFP4, as some mixtures of experts have them.
    """
    if stored.dtype in FLOAT8:
        return stored.dtype, "FP8 with scales"
    if method == "fp8" and len(scale.shape) > 1 and 2 * stored.shape[-1] == scale.shape[-1] * _MXFP4_BLOCK:
        return E2M1, "MXFP4"
    if method == "compressed-tensors" and stored.dtype == torch.int8:
        return torch.int8, "int8 of compressed-tensors"
    return None


def _is_mxfp4(blocks: StoredTensor, scales: StoredTensor | None) -> bool:
    """Whether these are the codes [E, N, K/32, 16] and the exponents [E, N, K/32] of a stack of weights."""
    return (
        scales is not None
        and blocks.dtype == scales.dtype == torch.uint8
        and len(blocks.shape) == 4
        and blocks.shape[-1] == _MXFP4_BLOCK // 2
        and blocks.shape[:-1] == scales.shape
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
        shape = (*leading, groups * _MXFP4_BLOCK)
        scales = Scales(
            read=partial(_read_scales, source, weight.scale, groups), first=0, rows=1, skipped=0, count=prod(leading)
        )
        return ScaledRows(
            codes=E2M1, shape=shape, dtype=dtype, scales=(scales,), width=_MXFP4_BLOCK, transposed=is_stack
        )
    shape = tuple(weight.stored.shape)
    *leading, rows, columns = shape
    of_rows, of_columns = _scale_shape(shape, tuple(weight.scale.shape), method)
    per = _per(rows, of_rows, None if block is None else block[0])
    width = _per(columns, of_columns, None if block is None else block[1])
    if per is None or width is None:
        said = "config.json does not say how large a block is" if block is None else f"blocks are {list(block)}"
        raise ValueError(f"{list(weight.scale.shape)} for a weight of {list(shape)}, and {said}")
    read = partial(_read_scales, source, weight.scale, of_columns)
    if rows % per == 0:
        found = [Scales(read=read, first=0, rows=per, skipped=0, count=prod(shape[:-1]))]
    else:  # the last group of each matrix is smaller
        starts = range(0, prod(leading) * of_rows, of_rows)
        found = [Scales(read=read, first=start, rows=per, skipped=0, count=rows) for start in starts]
    return ScaledRows(codes=weight.codes, shape=shape, dtype=dtype, scales=tuple(found), width=width)


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


def _read_scales(source: Source, stored: StoredTensor, columns: int) -> Tensor:
    """The scales `stored` as a matrix of float32 with `columns`; bytes are exponents of two, as in MXFP4."""
    if stored.spans:
        scales = read_tensor(stored)
    else:
        ((_, scales),) = source.read([stored.name])
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float().reshape(-1, columns)


def _of_activations(
    tensors: Mapping[str, StoredTensor], found: Mapping[str, FoundWeight], said: Mapping[str, object]
) -> set[str]:
    """The scales of activations beside weights of `found`, and those of a KV cache if `said` has one."""
    modules = {weight.name.rpartition(".")[0] for weight in found.values()}
    left_out = set()
    for name, stored in tensors.items():
        module, _, leaf = name.rpartition(".")
        is_beside = leaf in _BESIDE and module in modules
        is_of_cache = leaf in _OF_CACHE and said.get("kv_cache_scheme") is not None
        if stored.shape.numel() == 1 and (is_beside or is_of_cache):
            left_out.add(name)
    return left_out
